"""Specs that decide scales, codes and weights by calibration: the graph computes what the checkpoint holds,
in every form, and what it holds is better on text that calibration never saw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fxq
from fxq.audit import verify_checkpoint
from fxq.graph import dialect
from fxq.passes import PASSES
from fxq.passes.learn import Learn
from fxq.pipeline.spec import Spec, load
from tests import tiny
from tests.docs import ROOT
from tests.families import save

FAMILIES = {family.name: family for family in tiny.families()}
HESSIAN, GPTQ = "nvfp4_default_hessian-fp8_cast_kv", "nvfp4_default_gptq-fp8_cast_kv"
LEARNED = "nvfp4_default_learned-fp8_cast_kv"
ALL = [
    f"nvfp4_{scope}" for scope in ("default_{}-fp8_cast_kv", "experts_only_{}-fp8_cast_kv", "weight_only_{}")
]
# Stacked experts; a norm that adds one and tied embeddings, MLA, interleaved gate and up in one tensor,
# transposed experts, Conv1D, a linear attention.
QUICK = ("qwen3_moe",)
SLOW = ("gemma3_text", "deepseek_v3", "gpt_oss", "llama4_text", "gpt2", "qwen3_next")
LONG = (
    "llama",
    "mixtral",
    "granitemoe",
    "phi3",
    "mamba",
    "glm4_moe",
    "olmo2",
    "qwen2",
    "cohere",
    "falcon",
    "gpt_neox",
    "phimoe",
    "dots1",
)
FORMS = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    *(pytest.param(name, marks=pytest.mark.long) for name in LONG),
]


def _ids(count: int, length: int, seed: int) -> list[list[int]]:
    return [tiny.text_ids(1, length, seed + n).tolist()[0] for n in range(count)]


@pytest.mark.parametrize(
    "spec",
    [pytest.param(HESSIAN, marks=pytest.mark.long), GPTQ, pytest.param(LEARNED, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("family", FORMS)
def test_the_graph_computes_what_the_checkpoint_does(family: str, spec: str, tmp_path: Path) -> None:
    """With few tokens, of which some experts see none: nothing breaks."""
    save(tiny.tiny_model(FAMILIES[family]), tmp_path / "model")
    unseen = _ids(3, 40, seed=50)
    done = fxq.compile(tmp_path / "model", _few_steps(spec), calib=_ids(6, 60, seed=0))
    of_graph = done.perplexity(unseen)[1]
    done.save(tmp_path / "out")
    assert not verify_checkpoint(tmp_path / "out", base=tmp_path / "model").errors
    assert fxq.evaluate(tmp_path / "out", unseen).perplexity == pytest.approx(of_graph, rel=1e-5)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype.itemsize < 2 or torch.isfinite(tensor).all(), name


def _few_steps(spec: str) -> Spec:
    """A shipped spec, in which nothing takes more than five steps."""
    known = load(spec, PASSES)
    fewer = (replace(step, steps=5) if isinstance(step, Learn) else step for step in known.passes)
    return replace(known, passes=tuple(fewer))


@pytest.fixture(scope="module")
def divergences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Spec -> what `fxq.evaluate` finds of the demo model, on text that calibration did not see."""
    out = tmp_path_factory.mktemp("out")
    found = {}
    for spec in ("nvfp4_default_mse-fp8_cast_kv", HESSIAN, GPTQ):
        demo = ROOT / "demo"
        fxq.compile(demo / "model", spec, calib=demo / "calib.jsonl", samples=16, seq_len=128, out=out / spec)
        found[spec] = fxq.evaluate(
            out / spec, demo / "heldout.jsonl", base=demo / "model", samples=16, seq_len=128
        )
    return found


@pytest.mark.slow
def test_a_trained_model_keeps_more_of_itself_the_more_is_decided(divergences: dict[str, Any]) -> None:
    mse, hessian, gptq = (found.against.kl["mean"] for found in divergences.values())
    assert hessian < mse
    assert gptq < 0.95 * mse


@pytest.mark.parametrize("kind", [pytest.param("hessian", marks=pytest.mark.slow), "gptq"])
def test_a_checkpoint_is_the_same_every_time_and_reads_each_weight_once(kind: str, tmp_path: Path) -> None:
    save(tiny.tiny_model(FAMILIES["qwen3_moe"]), tmp_path / "model")
    made = [
        fxq.compile(
            tmp_path / "model", f"nvfp4_default_{kind}-fp8_cast_kv", calib=_ids(6, 60, 0), out=tmp_path / name
        )
        for name in ("a", "b")
    ]
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
    size = sum(t.nbytes for t in load_file(tmp_path / "model" / "model.safetensors").values())
    assert made[0].report.source_bytes_read == size


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.format(kind) for name in ALL for kind in ("hessian", "gptq")])
def test_every_spec_of_the_kind_rounds_by_what_calibration_shows(name: str, tmp_path: Path) -> None:
    save(tiny.tiny_model(FAMILIES["qwen3_moe"]), tmp_path / "model")
    graph = fxq.compile(tmp_path / "model", name, calib=_ids(2, 30, 0)).program.graph
    packs = [node for node in graph.nodes if dialect.is_pack(node)]
    assert packs
    assert all(len(node.all_input_nodes) == 3 for node in packs), "each has a statistic beside its amax"
