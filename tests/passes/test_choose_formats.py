"""What choose-formats measures, and that its choice is the best that the budget allows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxq
from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.model import open_model
from fxq.numbers.budget import least
from fxq.passes import PASSES
from fxq.passes.choose_formats import ChooseFormats
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.pipeline.base import Session
from fxq.pipeline.choosing import (
    MEASURED,
    MEASURED_BEFORE,
    TOGETHER,
    Budget,
    average_bits,
    frontier,
    predicted_loss,
    smallest,
    total_bytes,
)
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import Spec, dump, load, parse
from fxq.run.batches import batches_of
from tests.families import Zoo, samples, zoo

__all__ = ["zoo"]

AUTO = "nvfp4_auto-fp8_cast_kv"
TEXT = samples(6)


def chosen(path: Path, found: dict[str, Any] | None = None, **options: Any) -> Program:
    """A model for which formats were chosen."""
    model = open_model(path)
    program = model.program
    steps = [
        PASSES["fuse-experts"](),
        QuantizeExperts(required=False),
        *(PASSES[name]() for name in ("quantize-linears", "sync-groups", "calibrate-bootstrap")),
        PASSES["calibrate-mse"](),
        ChooseFormats(**options),
    ]
    session = Session(model.source, batches=batches_of([program], TEXT), found={} if found is None else found)
    run_passes(steps, program, session)
    return program


def places(program: Program) -> list[int]:
    return [choice.place(program.values) for choice in program.choices]


def losses(program: Program) -> list[list[float]]:
    return [choice.losses(program.values) for choice in program.choices]


@pytest.mark.parametrize("score", ["kl", "gram", "squared"])
def test_more_bits_lose_less_by_every_score(zoo: Zoo, score: str) -> None:
    program = chosen(zoo("llama"), score=score, bits=6.0)
    for nvfp4, fp8, none in losses(program):
        assert nvfp4 > fp8 > none == 0
    assert 4.5 < average_bits(program.choices, places(program)) <= 6.0
    assert (MEASURED in program.values) == (score == "kl")


def test_the_squared_error_needs_no_text(zoo: Zoo, tmp_path: Path) -> None:
    spec = load("nvfp4_weight_only_mse", PASSES)
    steps = [step for step in spec.passes if step.name != "lower"]
    choosing = ChooseFormats(("nvfp4 weight-only", "none"), bits=8.0, score="squared")
    made = Spec("free", "", (*steps, choosing, PASSES["resolve-choices"](), spec.passes[-1]))
    done = fxq.compile(zoo("llama"), made, out=tmp_path / "out")
    assert done.report.tensors_quantized
    assert 4.5 < average_bits(done.program.choices, places(done.program)) <= 8.0


def test_what_is_chosen_is_the_best_within_the_budget(zoo: Zoo) -> None:
    program = chosen(zoo("llama"), score="squared", bits=6.0)
    own, table = places(program), losses(program)

    def loss(tried: tuple[int, ...]) -> float:
        return sum(row[place] for row, place in zip(table, tried, strict=True))

    every = itertools.product(range(3), repeat=len(own))
    assert len(own) <= 8, "few enough to try all"
    fitting = (tried for tried in every if average_bits(program.choices, tried) <= 6.0)
    assert loss(tuple(own)) == pytest.approx(min(map(loss, fitting)), rel=1e-9)


def test_the_frontier_falls(zoo: Zoo) -> None:
    program = chosen(zoo("qwen3_moe"), score="squared")
    points = [
        (average_bits(program.choices, p), predicted_loss(program, p))
        for p in frontier(program, losses(program))
    ]
    assert points == sorted(points)
    assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)
    assert points[0][0] == 4.5
    assert points[-1] == (16, 0)


def test_a_largest_loss_takes_the_smallest_model(zoo: Zoo) -> None:
    program = chosen(zoo("llama"), max_kl=10.0)
    assert places(program) == smallest(program)
    table, together = losses(program), float(program.values[TOGETHER])
    most, bits = predicted_loss(program, smallest(program)), [4.5]
    for share in (0.5, 0.1):
        found = Budget(max_kl=share * most).choose(program, table, together)
        assert predicted_loss(program, found) <= share * most
        bits.append(average_bits(program.choices, found))
    assert bits == sorted(set(bits))


def test_a_size_is_that_of_the_tensors_written(zoo: Zoo, tmp_path: Path) -> None:
    settings = ["choose-formats.size=150 KB"]
    done = fxq.compile(zoo("qwen3_moe"), AUTO, calib=TEXT, settings=settings, out=tmp_path / "out")
    assert done.report.output_bytes == total_bytes(done.program, places(done.program))
    assert 140_000 < done.report.output_bytes <= 150_000


def test_operations_count_what_a_token_multiplies(zoo: Zoo) -> None:
    """Two of eight experts run: their bits weigh a quarter of what they do in the file."""
    size, compute = (
        chosen(zoo("qwen3_moe"), score="squared"),
        chosen(zoo("qwen3_moe"), score="squared", cost="compute"),
    )
    experts, linears = compute.choices[2], compute.choices[0]
    assert experts.work / experts.numbers == pytest.approx(linears.work / linears.numbers * 2 / 8)
    assert average_bits(compute.choices, smallest(compute), "compute") == 4
    assert average_bits(compute.choices, places(compute), "compute") <= 5.0
    assert places(size) != places(compute)


def test_what_the_user_settles_stays(zoo: Zoo) -> None:
    program = chosen(
        zoo("qwen3_moe"), score="squared", bits=12.0, groups=("*.o_proj=fp8", "*.layers.1.mlp.*=none")
    )
    for choice, place in zip(program.choices, places(program), strict=True):
        if "o_proj" in choice.parameters[0]:
            assert choice.formats[place] == "fp8"
        if "layers.1.mlp" in choice.parameters[0]:
            assert choice.formats[place] == "none"


def test_a_second_round_never_loses_more(zoo: Zoo) -> None:
    program = chosen(zoo("llama"), bits=6.0, rounds=2)
    assert program.values[MEASURED] <= program.values[MEASURED_BEFORE]
    assert average_bits(program.choices, places(program)) <= 6.0


def test_a_resumed_run_measures_nothing_again(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    first = chosen(zoo("llama"), found, score="squared")

    def calibrate(*args: object) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(ChooseFormats, "calibrate", calibrate)
    assert places(chosen(zoo("llama"), found, score="squared")) == places(first)


def test_the_spec_of_what_was_chosen_writes_the_same_bytes(zoo: Zoo, tmp_path: Path) -> None:
    settings = ["choose-formats.bits=6.5"]
    fxq.compile(zoo("qwen3_moe"), AUTO, calib=TEXT, settings=settings, out=tmp_path / "auto")
    text = (tmp_path / "auto" / "fxq-report" / "chosen.yaml").read_text()
    content = json.loads((tmp_path / "auto" / "fxq-report" / "choices.json").read_text())
    assert 4.5 < content["chosen"]["bits"] <= 6.5
    assert content["chosen"]["measured"] > 0
    assert {group["chosen"] for group in content["groups"]} <= {"nvfp4", "fp8", "none"}
    assert [point["bits"] for point in content["frontier"]][:1] == [4.5]
    assert (tmp_path / "auto" / "fxq-report" / "choices.html").exists()
    spec = parse(text, PASSES, "chosen.yaml")
    assert dump(spec) == text
    assert not {step.name for step in spec.passes} & {"choose-formats", "resolve-choices"}
    fxq.compile(zoo("qwen3_moe"), spec, calib=TEXT, out=tmp_path / "again")
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_all_formats_in_one_model_are_declared_layer_by_layer(zoo: Zoo, tmp_path: Path) -> None:
    offered = "choose-formats.formats=[nvfp4, nvfp4 weight-only, fp8, none]"
    settled = (
        "choose-formats.groups=['*.0.self_attn.q*=nvfp4 weight-only', '*.0.self_attn.o*=fp8', "
        "'*.1.self_attn.q*=none']"
    )
    settings = [offered, settled, "choose-formats.bits=6", "choose-formats.score=squared"]
    out = tmp_path / "out"
    fxq.compile(zoo("qwen3_moe"), AUTO, calib=TEXT, settings=settings, out=out)
    assert not fxq.verify_checkpoint(out, base=zoo("qwen3_moe")).errors
    found = fxq.evaluate(out, TEXT, base=zoo("qwen3_moe")).against
    assert found is not None
    assert 0 < found.kl["mean"] < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": ("nvfp4",)}, "formats is two or more, each once; found ['nvfp4']"),
        ({"formats": ("nvfp4", "nvfp4")}, "formats is two or more, each once"),
        (
            {"formats": ("nvfp4", "int4")},
            "no format is called 'int4'; there are nvfp4, fp8",
        ),
        ({"formats": ("nvfp4", "fp8 weight-only")}, "weights: fp8 and inputs: none do not go together"),
        ({"bits": 5.0, "max_kl": 0.1}, "expected one budget, found bits and max_kl"),
        ({"bits": float("nan")}, "bits is a positive number; found nan"),
        ({"max_kl": -0.1}, "max_kl is a positive number; found -0.1"),
        ({"size": "18 XB"}, "size is a number of B, KB, MB, GB or TB, as in 18 GB; found '18 XB'"),
        ({"max_kl": 0.1, "score": "gram"}, "max_kl goes with score: kl alone"),
        ({"size": "1 GB", "cost": "compute"}, "cost: compute goes with bits; found size"),
        ({"rounds": 3}, "rounds 1 or 2; found 2048 and 3"),
        ({"groups": ("*.o_proj",)}, "groups is a list of GLOB=FORMAT"),
        ({"groups": ("*.o_proj=int4",)}, "no format is called 'int4'"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        ChooseFormats(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [["choose-formats.bits=4.4"], ["choose-formats.size=1 KB"], ["choose-formats.groups=['*.x=fp8']"]],
)
def test_a_budget_that_nothing_fits_writes_nothing(zoo: Zoo, tmp_path: Path, settings: list[str]) -> None:
    with pytest.raises(SpecError, match="choose-formats: "):
        fxq.compile(zoo("llama"), AUTO, calib=TEXT, settings=settings, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_least_of_all_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lost = torch.rand(4, 3, generator=generator).tolist()
        costs = (torch.randint(1, 2000, (4, 1), generator=generator) * torch.tensor([4.5, 8, 16])).tolist()
        limit = sum(map(min, costs)) + float(torch.rand((), generator=generator)) * (
            sum(map(max, costs)) - sum(map(min, costs))
        )
        every = itertools.product(range(3), repeat=4)
        sums = [(sum(map(list.__getitem__, costs, p)), sum(map(list.__getitem__, lost, p))) for p in every]
        found = least(lost, costs, limit)
        assert found is not None
        assert sum(map(list.__getitem__, costs, found)) <= limit
        assert sum(map(list.__getitem__, lost, found)) == pytest.approx(min(b for a, b in sums if a <= limit))
    assert least([[1, 0]], [[4.5, 8]], 4) is None
