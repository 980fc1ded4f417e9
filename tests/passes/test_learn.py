"""learn and tune-norms on a small model: nearer to the original, the same every time, and resumed."""

from contextlib import closing

import pytest
import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.graph.text import dump, parse
from fxq.passes.calibrate_max import CalibrateMax
from fxq.passes.learn import Learn
from fxq.passes.tune_norms import TuneNorms
from fxq.pipeline.base import Pass, Session
from fxq.pipeline.run import run_passes
from fxq.run import training
from fxq.run.blocks import Blocks
from fxq.run.simulate import DEPLOYED, ORIGINAL
from tests.passes.golden import Tensors
from tests.run.test_blocks import CPU, TAKING, Weights

MODEL = TAKING.replace("%d, [2, 3, 32]", "%d, [-1, 3, 32]").replace(
    "%y : f32[2,3,48] = aten.linear(%h0, %a_q)",
    "%g : f32[32] = @norm\n"
    "%n0 : f32[2,3,32] = aten.mul.Tensor(%h0, %g)\n"
    "%y : f32[2,3,48] = aten.linear(%n0, %a_q)",
)
# What is fitted is what is held back: more of the model is kept then, whatever it is.
TEXT = [torch.tensor([[1, 2, 3], [4, 5, 6]])] * 2


def made(*steps: Pass, found: dict[str, dict[str, dict[str, Tensor]]] | None = None) -> Program:
    program = Program(parse(MODEL))
    weights = Weights(program)
    weights.values["norm"] = 1 + weights.values["norm"].abs()
    session = Session(Tensors(weights.values), batches=TEXT, found={} if found is None else found)
    return run_passes(steps, program, session)


def lost(program: Program) -> tuple[float, float]:
    """Of what the first block gives and of the logits, relative to those of the original model."""
    weights = Weights(program)
    weights.values["norm"] = 1 + weights.values["norm"].abs()
    with closing(Blocks(program, Tensors(weights.values), CPU).run(TEXT[:1])) as blocks:
        made = [[block.outputs(0, variant) for variant in (ORIGINAL, DEPLOYED)] for block in blocks]
    found = []
    for name in ("h1", "logits"):
        wanted, have = next(each for each in made if name in each[0])
        found.append(float((have[name] - wanted[name]).square().sum() / wanted[name].square().sum()))
    return found[0], found[1]


def start() -> tuple[float, float]:
    return lost(made(CalibrateMax(prefix="quantized")))


@pytest.mark.parametrize(
    "step",
    [
        Learn(steps=60),
        Learn(steps=60, norms=False),
        Learn(steps=60, scales=False, norms=False),
        Learn(steps=60, codes=False, scales=False),
        TuneNorms(steps=30),
    ],
    ids=["all", "codes and scales", "codes", "norms", "tune-norms"],
)
def test_less_is_lost_of_the_text_that_is_fitted(step: Pass) -> None:
    which = int(isinstance(step, TuneNorms))
    assert lost(made(step))[which] < 0.99 * start()[which]


def _bytes(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def test_it_is_the_same_every_time_and_when_it_is_resumed() -> None:
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    steps = Learn(steps=5), TuneNorms(steps=2)
    one, two = made(*steps, found=found), made(*steps)
    resumed = made(*steps, found=found)
    for other in (two, resumed):
        assert dump(other.graph) == dump(one.graph)
        assert other.values.keys() == one.values.keys()
        for name, value in one.values.items():
            assert torch.equal(_bytes(value), _bytes(other.values[name])), name


def test_all_that_is_found_is_read() -> None:
    program = made(Learn(steps=1))
    read = {str(n.args[0]) for n in program.graph.nodes if str(n.target) == "fxq.value.default"}
    assert read <= program.values.keys()
    assert {"a_q_codes", "w_q_scales", "g_found"} <= read


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"codes": False, "scales": False, "norms": False}], ids=["steps", "nothing"]
)
def test_options_that_learn_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="expected steps of 1 or more and codes, scales or norms"):
        Learn(**options)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.passes.tune_norms.free_memory", lambda device: 10_000)
    with pytest.raises(
        SpecError, match=r"tune-norms: the whole model .* 0\.0 GiB free on cpu; expected a smal"
    ):
        made(TuneNorms())
    free = training.free_memory(CPU)
    assert free is None or free > 10_000
