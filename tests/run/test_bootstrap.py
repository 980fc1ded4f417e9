"""Amaxes: when they are found, how often a weight is read for it, and passes that change them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.fx import Node

import fxq
from fxq.checkpoint.shards import Shards
from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at, node_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.graph.structure.views import root
from fxq.passes import PASSES
from fxq.passes.calibrate_max import CalibrateMax
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import Fact, amaxes_filled, is_weight_quantize
from fxq.pipeline.spec import Spec, load
from fxq.run.statistics import Prefix
from fxq.sources import Directory
from tests.families import EXPERTS, LAYERS, Zoo, samples, without_times, zoo
from tests.families import load as load_model

__all__ = ["zoo"]

WEIGHT_ONLY, DEFAULT = "nvfp4_weight_only_mse", "nvfp4_default-fp8_kv"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each parameter, and each expert of one, was read."""
    found: Counter[Any] = Counter()
    read, read_expert = Directory.read, Directory.read_expert

    def counted(self: Directory, name: str, *args: Any) -> Any:
        found[name] += 1
        return read(self, name, *args)

    def counted_expert(self: Directory, name: str, expert: int, *args: Any) -> Any:
        found[name, expert] += 1
        return read_expert(self, name, expert, *args)

    monkeypatch.setattr(Directory, "read", counted)
    monkeypatch.setattr(Directory, "read_expert", counted_expert)
    return found


def _compile(model: Path, spec: str | Spec, **options: Any) -> fxq.Compiled:
    """Compiled on data, if the spec needs some."""
    calib = samples(4) if spec not in (WEIGHT_ONLY, CLIPPED) else None
    return fxq.compile(model, spec, calib=calib, **options)


@pytest.mark.parametrize("spec", [WEIGHT_ONLY, DEFAULT])
def test_every_weight_is_read_once_if_it_is_written_at_once(
    spec: str, reads: Counter[Any], zoo: Zoo, tmp_path: Path
) -> None:
    _compile(zoo("qwen3_moe"), spec, out=tmp_path / "out")
    experts = {name: count for name, count in reads.items() if isinstance(name, tuple)}
    assert len(experts) == LAYERS * 2 * EXPERTS
    linears = {str(name).split(".")[-2] for name in reads if "_proj.weight" in str(name)}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(reads.values()) == {1}


def test_without_data_an_amax_is_no_reason_to_read_a_weight(reads: Counter[Any], zoo: Zoo) -> None:
    compiled = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY)
    assert not reads
    assert not compiled.program.values
    assert compiled.report.bootstrapped == 0
    assert len(compiled.scales) == LAYERS * (2 * EXPERTS + 4)
    assert set(reads.values()) == {1}  # `scales` computes them


@pytest.mark.parametrize("spec", [WEIGHT_ONLY, DEFAULT])
def test_when_an_amax_is_found_changes_neither_scales_nor_bytes(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    at_once = _compile(zoo("qwen3_moe"), spec, out=tmp_path / "at_once")
    before = _compile(zoo("qwen3_moe"), spec)
    before.save(tmp_path / "before")
    assert at_once.program.values == before.program.values
    assert at_once.scales.keys() == before.scales.keys()
    assert all(torch.equal(before.scales[name], value) for name, value in at_once.scales.items())
    assert _files(tmp_path / "at_once") == _files(tmp_path / "before")


def test_amaxes_of_weights_are_those_of_the_weights_and_lie_beside_what_calibration_found(zoo: Zoo) -> None:
    compiled = _compile(zoo("qwen3_moe"), DEFAULT)
    model, scales = load_model(zoo("qwen3_moe")), compiled.scales
    of_weights = 0
    for node in (n for n in compiled.graph.nodes if n.target is dialect.AMAX):
        if (parameter := root(node_at(node, 0))) is None:
            assert torch.equal(scales[node.name], compiled.program.values[node.name])
            continue
        of_weights += 1
        piece, weight = node_at(node, 0), model.get_parameter(str(parameter.target)).detach()
        weight = weight[int_at(piece, 1)] if piece.target is dialect.SLICE else weight
        assert scales[node.name] == weight.abs().max()
        assert node.name not in compiled.program.values
    assert of_weights == LAYERS * (2 * EXPERTS + 4)
    assert len(scales) == of_weights + len(compiled.program.values)


def test_perplexity_is_the_same_before_and_after_a_dead_expert_is_written(zoo: Zoo, tmp_path: Path) -> None:
    texts = [[5] * 4]  # few experts are reached
    compiled = fxq.compile(zoo("qwen3_moe"), DEFAULT, calib=texts, out=tmp_path / "out")
    assert compiled.report.dead_experts
    evaluated = fxq.compile(zoo("qwen3_moe"), DEFAULT, calib=texts, evaluate=samples(2))
    after = evaluated.report.perplexity_after
    assert after is not None
    assert compiled.perplexity(samples(2))[1] == after


@dataclass(frozen=True)
class Halve(Pass):
    """Clip every activation at half of what calibration found."""

    name: ClassVar[str] = "halve"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)

    def run(self, program: Program) -> int:
        for value in program.values.values():
            value /= 2
        return len(program.values)


def test_a_pass_that_reads_values_sees_every_one(zoo: Zoo, tmp_path: Path) -> None:
    spec = load(DEFAULT, PASSES)
    halved = dataclasses.replace(spec, passes=(*spec.passes[:-1], Halve(), spec.passes[-1]))
    compiled = _compile(zoo("qwen3_moe"), halved, out=tmp_path / "out")
    plain = _compile(zoo("qwen3_moe"), spec)
    found, values = compiled.scales, plain.program.values
    assert len(values) == LAYERS * 6  # what q, o, the experts' two weights, keys and values read
    assert found.keys() == plain.scales.keys()
    for name, value in plain.scales.items():
        assert torch.equal(found[name] * 2 if name in values else found[name], value)


@dataclass(frozen=True)
class Clip(Pass):
    """Clip every weight at half of its amax."""

    name: ClassVar[str] = "clip"
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        for node in program.graph.nodes:
            if is_weight_quantize(node) and node_at(node, 1).target is not torch.ops.aten.mul.Tensor:
                yield Match("rounding of a weight", node, {"amax": node_at(node, 1)})

    def run(self, program: Program) -> int:
        halves: dict[Node, Node] = {}
        for site in [site for site in self.sites(program) if isinstance(site, Match)]:
            amax, quantize = site["amax"], site.node
            if amax not in halves:
                mul = torch.ops.aten.mul.Tensor
                halves[amax] = edit.call(program.graph, f"{amax.name}_half", mul, amax, 0.5)
            quantize.args = (quantize.args[0], halves[amax])
        return len(halves)


_PASSES = load(WEIGHT_ONLY, PASSES)
CLIPPED = dataclasses.replace(_PASSES, passes=(*_PASSES.passes[:-1], Clip(), _PASSES.passes[-1]))


def test_a_pass_can_compute_an_amax_from_that_of_the_weight(
    reads: Counter[Any], zoo: Zoo, tmp_path: Path
) -> None:
    _compile(zoo("qwen3_moe"), CLIPPED, out=tmp_path / "clipped")
    assert set(reads.values()) == {1}
    _compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "plain")
    clipped, plain = (load_file(tmp_path / out / "model.safetensors") for out in ("clipped", "plain"))
    scales = [name for name in plain if name.endswith("weight_scale_2")]
    assert len(scales) == LAYERS * (3 * EXPERTS + 4)
    assert all(torch.equal(clipped[name] * 2, plain[name]) for name in scales)


@dataclass(frozen=True)
class ScaleColumns(Pass):
    """Scale each column of a linear's weight by the largest input that it sees, and one."""

    name: ClassVar[str] = "scale-columns"
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        for matmul in list(weight_matmuls(program.graph)):
            if matmul.node.target is torch.ops.aten.linear.default and matmul.w.name.endswith("proj_weight"):
                yield Match("linear", matmul.node, {"x": matmul.x, "w": matmul.w})

    def rewrite(self, site: Match) -> None:
        w, aten = site["w"], torch.ops.aten
        largest = edit.call(w.graph, f"{w.name}_largest", dialect.ABSMAX, site["x"])
        factor = edit.call(w.graph, f"{w.name}_factor", aten.add.Tensor, largest, 1.0)
        scaled = edit.call(w.graph, f"{w.name}_scaled", aten.mul.Tensor, w, factor)
        edit.replace(w, edit.call(w.graph, f"{w.name}_new", dialect.REWRITE, w, scaled), [site.node])


@pytest.mark.parametrize("prefix", ["original", "quantized"])
def test_weights_that_statistics_decide_are_the_same_when_these_are_found_while_writing(
    prefix: Prefix, reads: Counter[Any], zoo: Zoo, tmp_path: Path
) -> None:
    passes = [
        dataclasses.replace(step, prefix=prefix) if isinstance(step, CalibrateMax) else step
        for step in load(DEFAULT, PASSES).passes
    ]
    spec = dataclasses.replace(load(DEFAULT, PASSES), passes=(passes[0], ScaleColumns(), *passes[1:]))
    _compile(zoo("llama"), spec, out=tmp_path / "at_once")
    linears = {name: count for name, count in reads.items() if "_proj" in str(name)}
    assert len(linears) == LAYERS * 7
    assert set(linears.values()) == {1}
    _compile(zoo("llama"), spec).save(tmp_path / "before")
    _compile(zoo("llama"), DEFAULT).save(tmp_path / "plain")
    at_once, before, plain = (
        (tmp_path / out / "model.safetensors").read_bytes() for out in ("at_once", "before", "plain")
    )
    assert at_once == before
    assert at_once != plain


@pytest.mark.slow
def test_an_interrupted_run_can_be_resumed_with_an_evaluation(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "whole")
    plain, calls = Shards.write, itertools.count()

    def write(self: Shards, *args: Any) -> int:
        if next(calls) >= 100:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", write)
        with pytest.raises(KeyboardInterrupt):
            fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "out")
    resumed = fxq.compile(
        zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "out", resume=True, evaluate=samples(2)
    )
    assert resumed.report.perplexity_after == whole.perplexity(samples(2))[1]
    resumed_files, files = (_files(tmp_path / name) for name in ("out", "whole"))
    for name in ("fxq-report/report.json", "README.md"):  # these say what was measured
        assert resumed_files.pop(name) != files.pop(name)
    assert resumed_files == files


def _files(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return without_times(files)
