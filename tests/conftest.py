"""Options of the test run, and what all tests share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of one would wait for another's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported; test_kernels.py runs it

import fxq.model
from fxq.graph.program import Program
from fxq.trace.export import trace
from fxq.trace.fake_model import FakeModel

TRACES: dict[str, Program] = {}


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


@pytest.fixture(autouse=True)
def traces_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models that are alike are traced once a process, which is most of the time of a test; those of
    tests/trace, which is about that, every time."""
    if Path(__file__).parent / "trace" in request.path.parents:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxq.model, "trace", _kept_trace)
        yield


def _kept_trace(fake: FakeModel) -> Program:
    key = _what_a_trace_sees(fake)
    if key is None:
        return trace(fake)
    if key not in TRACES:
        TRACES[key] = trace(fake)
    kept = TRACES[key]
    made = dataclasses.replace(kept, graph=copy.deepcopy(kept.graph), constants=dict(kept.constants))
    made.values, made.tokens, made.packs, made.left = {}, {}, {}, {}
    made.untied, made.notes, made.misses, made.choices = [], list(kept.notes), [], []
    assert [str(n) for n in made.graph.nodes] == [str(n) for n in kept.graph.nodes]
    return made


def _plain(config: Any) -> Any:
    """A config without where it came from and how its weights are stored."""
    if isinstance(config, dict):
        return {k: _plain(v) for k, v in config.items() if k not in ("_name_or_path", "quantization_config")}
    return config


def _what_a_trace_sees(fake: FakeModel) -> str | None:
    """Equal for models that are traced alike; None if a model has code of its own."""
    modules = list(fake.model.named_modules())
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for _, m in modules):
        return None
    config = fake.model.config
    parameters = list(fake.model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(parameters)}  # tied ones have one of them
    parts = [
        json.dumps(_plain(config.to_dict()), sort_keys=True, default=str),
        str([getattr(c, "_attn_implementation", None) for c in (config, config.get_text_config())]),
        str([getattr(c, "_experts_implementation", None) for c in (config, config.get_text_config())]),
        *(f"{name} {type(module).__module__} {id(type(module))}" for name, module in modules),
        *(f"{n} {first[id(p)]} {p.shape} {p.dtype}" for n, p in parameters),
        *(f"{n} {t.shape} {t.dtype} {t.tolist()}" for n, t in fake.buffers.items()),
        str(fake.longest),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
