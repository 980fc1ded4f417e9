"""Options of the test run."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported; test_kernels.py runs it


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes what the passes do now into tests/passes/*/*.fx; read the diff then."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the `--- after` sections of golden graphs"
    )
    parser.addoption("--engines", metavar="DIR", help="the environment of tests/engines: vLLM is in it")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden sections are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))
