"""All variants of a model in one run: each is what compiling it alone gives, and weights are read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxq
from fxq.graph.program import Program
from fxq.model import open_model
from fxq.passes import PASSES
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.pipeline.base import Pass
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import Spec
from fxq.run.batches import batches_of
from fxq.run.variants import Variant, Variants
from tests.families import Zoo, samples, zoo

__all__ = ["zoo"]

CPU = torch.device("cpu")
TEXT = samples(8)
OPENED = ("fuse-experts", "quantize-experts", "quantize-linears", "sync-groups", "calibrate-bootstrap")


def opened(path: Path) -> tuple[Program, Variants, list[Tensor]]:
    """A model with a choice for each group, ready to be run."""
    model = open_model(path)
    program = model.program
    steps: list[Pass] = [
        QuantizeExperts(required=False) if name == "quantize-experts" else PASSES[name]() for name in OPENED
    ]
    run_passes([*steps, PASSES["calibrate-mse"](), PASSES["choose-formats"]()], program)
    return program, Variants(program, model.source, CPU), batches_of([program], TEXT)


def alone(parameters: tuple[str, ...], format: str) -> Spec:
    """The spec that quantizes these parameters, and nothing else."""
    names = tuple(name.removesuffix(".weight") for name in parameters)
    kind = QuantizeExperts if parameters == names else QuantizeLinears
    first = kind(weights=format, inputs=format, only=names)
    after = [
        "sync-groups",
        "calibrate-max",
        "calibrate-bootstrap",
        *(["calibrate-mse"] * (format == "nvfp4")),
    ]
    steps = (PASSES["fuse-experts"](), first, *(PASSES[name]() for name in (*after, "lower")))
    return Spec("alone", "one group", steps)


def check(path: Path, out: Path, groups: slice) -> None:
    program, run, batches = opened(path)
    asked = [(c, place) for c in program.choices[groups] for place in (0, 1)]
    found = run.divergences(batches, [Variant({c.which: place}) for c, place in asked])
    for number, ((choice, place), loss) in enumerate(zip(asked, found, strict=True)):
        made = out / str(number)
        fxq.compile(path, alone(choice.parameters, choice.formats[place]), calib=TEXT, out=made)
        against = fxq.evaluate(made, TEXT, base=path).against
        assert against is not None
        assert loss > 0
        assert loss == pytest.approx(against.kl["mean"], rel=1e-4), choice.parameters


def test_a_group_alone_loses_what_its_compilation_loses(zoo: Zoo, tmp_path: Path) -> None:
    check(zoo("qwen3_moe"), tmp_path, slice(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "mixtral"])
def test_each_group_alone_loses_what_its_compilation_loses(zoo: Zoo, tmp_path: Path, family: str) -> None:
    check(zoo(family), tmp_path, slice(None))


def test_a_weight_is_read_once_for_all_variants(zoo: Zoo) -> None:
    program, run, batches = opened(zoo("qwen3_moe"))
    variants = [Variant({c.which: place}) for c in program.choices for place in (0, 1)]
    before = run.source.bytes_read
    run.divergences(batches, variants)
    reads = (n for n in run.graph.nodes if n.op == "get_attr" and n.target not in program.constants)
    needed = {str(n.target): n.meta["val"] for n in reads}
    assert run.source.bytes_read - before == sum(val.nbytes for val in needed.values())


def test_a_variant_is_the_same_whatever_it_rides_on(zoo: Zoo) -> None:
    program, run, batches = opened(zoo("llama"))
    first, second, *_, last = [choice.which for choice in program.choices]
    base = {first: 0, last: 1}
    found = run.divergences(
        batches,
        [
            Variant(base),
            Variant({**base, second: 0}, parent=0),
            Variant({**base, second: 0}),
            Variant({**base, first: 1}, parent=0),
            Variant({first: 1, last: 1}),
            Variant({}),
        ],
    )
    assert found[1] == found[2] != found[0]
    assert found[3] == found[4] != found[0]
    assert found[5] == 0
