"""Checkpoints in real vLLM: every tensor that it holds after loading is the one that was meant, to the
bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.engines.cases import CASES, DEFAULT, Case, build, loaded
from tests.engines.compare import compare
from tests.engines.engine import Vllm
from tests.engines.models import DENSE, LAYERS, MODELS
from tests.families import add_tensors

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest, root: Path) -> Iterator[Vllm]:
    """vLLM, in the environment that --engines names."""
    environment = request.config.getoption("--engines")
    if environment is None:
        pytest.skip("no --engines DIR; python tests/engines/environment.py DIR makes one")
    with Vllm(Path(environment), root / "vllm.log") as engine:
        yield engine


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vllm_holds_what_the_checkpoint_means(case: Case, root: Path, vllm: Vllm) -> None:
    comparison = loaded(case, root, vllm)
    assert comparison.compared > 9 * LAYERS  # seven linears and two norms, at the least
    assert not comparison.differences, f"{comparison.exact} of {comparison.compared} are exact"


def test_a_scale_that_a_group_does_not_share_is_seen(root: Path, vllm: Vllm, tmp_path: Path) -> None:
    """vLLM takes the largest scale of q, k and v for all three."""
    broken = tmp_path / "broken"
    shutil.copytree(build(Case("modelopt", "qwen3", DEFAULT), root), broken)
    name = "model.layers.0.self_attn.q_proj.weight_scale_2"
    add_tensors(broken, {name: 2 * load_file(broken / "model.safetensors")[name]})
    found = compare(broken, vllm.load(broken, root / "loaded.safetensors"))
    names = [difference.name for difference in found.differences]
    assert names == [f"model.layers.0.self_attn.{p}_proj.weight" for p in "kv"]


@pytest.mark.parametrize("model", DENSE)
def test_a_dense_w4a4_model_generates(model: str, root: Path, vllm: Vllm) -> None:
    tokens = vllm.generate(build(Case("modelopt", model, DEFAULT), root), prompt=[5, 17, 42], tokens=8)
    vocabulary = MODELS[model]().vocab_size
    assert len(tokens) == 8
    assert all(0 <= token < vocabulary for token in tokens)
