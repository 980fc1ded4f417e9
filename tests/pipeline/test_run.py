"""Passes run in an order that their facts allow, and are held to what they promise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fxq.errors import SpecError, VerifyError
from fxq.graph import dialect, edit
from fxq.graph.hub import Hub, Part, Stored
from fxq.graph.pattern import Bind, Call, Match, Miss, Rule
from fxq.graph.program import Program
from fxq.graph.text import dump, parse
from fxq.graph.verify import verify
from fxq.passes import PASSES
from fxq.pipeline.architecture import architecture, difference
from fxq.pipeline.base import CalibrationPass, Pass, Session, bystanders
from fxq.pipeline.facts import Fact, tensors_whole
from fxq.pipeline.run import check_order, needs_data, run_passes
from fxq.pipeline.spec import load, shipped
from fxq.run.weights import amaxes
from tests.passes.golden import Tensors

MODEL = """\
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed_tokens.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%q : bf16[32,32] = @layers.0.self_attn.q_proj.weight
%q_out : bf16[1,4,32] = aten.linear(%x, %q)
%q_heads : bf16[1,1,4,32] = aten.unsqueeze(%q_out, 1)
%k : bf16[32,32] = @layers.0.self_attn.k_proj.weight
%k_out : bf16[1,4,32] = aten.linear(%x, %k)
%k_heads : bf16[1,1,4,32] = aten.unsqueeze(%k_out, 1)
%v : bf16[32,32] = @layers.0.self_attn.v_proj.weight
%v_out : bf16[1,4,32] = aten.linear(%x, %v)
%v_heads : bf16[1,1,4,32] = aten.unsqueeze(%v_out, 1)
%attention : bf16[1,1,4,32] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%tokens : bf16[4,32] = aten.view(%attention, [4, 32])
%router : bf16[2,32] = @layers.0.mlp.gate.weight
%r : bf16[4,2] = aten.linear(%tokens, %router)
%which : i64[4] = aten.argmax(%r, -1)
%w : bf16[2,16,32] = @layers.0.mlp.experts.up_proj
%picked : bf16[4,16,32] = aten.index.Tensor(%w, [%which])
%column : bf16[4,32,1] = aten.unsqueeze(%tokens, -1)
%bmm : bf16[4,16,1] = aten.bmm(%picked, %column)
%up_out : bf16[4,16] = aten.squeeze.dim(%bmm, -1)
%act : bf16[4,16] = aten.relu(%up_out)
%shared : bf16[32,16] = @layers.0.mlp.shared.down_proj.weight
%d : bf16[4,32] = aten.linear(%act, %shared)
%lm : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%d, %lm)
return [%logits]
"""
EXPERTS = Stored(
    (Part(("layers.0.mlp.experts.0.up_proj.weight", "layers.0.mlp.experts.1.up_proj.weight"), range(16)),),
    stacked=True,
)
HUB = Hub(stored={"layers.0.mlp.experts.up_proj": EXPERTS}, names={"layers.0.mlp.experts.up_proj": EXPERTS})


def holds(program: Program) -> str | None:
    return None


def fails(program: Program) -> str | None:
    return "it does not"


def doubled(program: Program) -> str | None:
    """Holds once the graph has a node called `twice`."""
    return None if any(node.name == "twice" for node in program.graph.nodes) else "no node is called twice"


@dataclass(frozen=True)
class Step(Pass):
    """A pass with facts of its own; `does` is what it does to the graph."""

    name: ClassVar[str] = "step"
    same_function: ClassVar[bool] = True
    requires: tuple[Fact, ...] = ()  # type: ignore[misc]
    ensures: tuple[Fact, ...] = ()  # type: ignore[misc]
    breaks: tuple[Fact, ...] = ()  # type: ignore[misc]
    does: str = "nothing"

    def run(self, program: Program) -> int:
        x = next(iter(program.graph.nodes))
        if self.does == "double":
            edit.replace(x, edit.call(program.graph, "twice", torch.ops.aten.add.Tensor, x, x))
        if self.does == "break":
            x.meta["val"] = torch.empty(3, device="meta")
        return int(self.does == "double")


@dataclass(frozen=True)
class Calibration(Step, CalibrationPass):
    """A calibration pass that fills one value."""

    name: ClassVar[str] = "calibration"
    needs_data: ClassVar[bool] = True

    def calibrate(self, program: Program, session: Session) -> int:
        program.values["a"] = torch.tensor(2.0)
        return 1


def small() -> Program:
    return Program(parse("%x : f32[4] = placeholder()\n%y : f32[4] = aten.relu(%x)\nreturn [%y]\n"))


def steps(*found: Step) -> list[Pass]:
    return list(found)


def test_order_is_right_when_a_pass_before_ensures_what_is_required() -> None:
    check_order(steps(Step(ensures=(holds,)), Step(), Step(requires=(holds,))), ["s.yaml"] * 3)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Step(requires=(holds,))], "s.yaml: pass 1, step, requires holds; no pass here ensures it"),
        (
            [Step(requires=(holds,)), Calibration(ensures=(holds,))],
            "s.yaml: pass 1, step, requires holds; calibration ensures it and must come before",
        ),
        (
            [Calibration(ensures=(holds,)), Step(breaks=(holds,)), Step(requires=(holds,))],
            "s.yaml: pass 3, step, requires holds; calibration ensures it and must come before",
        ),
        ([Step(requires=(holds,), ensures=(holds,))], "s.yaml: pass 1, step, requires holds"),
    ],
)
def test_a_wrong_order_is_an_error(passes: list[Step], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_order(steps(*passes), ["s.yaml"] * len(passes))
    assert message in str(caught.value)


def test_a_pass_may_ensure_again_what_it_breaks() -> None:
    check_order(steps(Step(breaks=(holds,), ensures=(holds,)), Step(requires=(holds,))), ["s.yaml"] * 2)


def test_a_pass_that_does_not_do_what_it_ensures_is_an_error() -> None:
    with pytest.raises(VerifyError, match="step ensures doubled: no node is called twice"):
        run_passes(steps(Step(ensures=(doubled,))), small())
    run_passes(steps(Step(ensures=(doubled,), does="double")), small())


def test_a_pass_whose_graph_lacks_what_it_requires_is_an_error_before_it_runs() -> None:
    program = small()
    before = dump(program.graph)
    with pytest.raises(VerifyError, match="step requires fails: it does not"):
        run_passes(steps(Step(requires=(fails,), does="double")), program)
    assert dump(program.graph) == before


def test_a_pass_that_leaves_a_broken_graph_is_an_error() -> None:
    with pytest.raises(VerifyError, match="%y: expected type"):
        run_passes(steps(Step(does="break")), small())


def test_a_broken_graph_never_reaches_a_pass() -> None:
    program = small()
    next(iter(program.graph.nodes)).meta["val"] = torch.empty(5, device="meta")
    with pytest.raises(VerifyError, match="%y: expected type"):
        run_passes(steps(Step(requires=(fails,))), program)


def test_every_stage_is_seen_tidy_and_with_its_count() -> None:
    seen: list[tuple[str, int, str]] = []
    run_passes(
        steps(Step(does="double"), Step()),
        small(),
        after=lambda step, program, count: seen.append((step.name, count, dump(program.graph))),
    )
    assert [(name, count) for name, count, _ in seen] == [("step", 1), ("step", 0)]
    assert seen[0][2].splitlines()[1] == "%twice : f32[4] = aten.add.Tensor(%x, %x)"


def test_a_calibration_pass_runs_only_with_a_session_and_is_only_then_held_to_its_word() -> None:
    program = small()
    run_passes(steps(Calibration(ensures=(fails,))), program)
    assert program.values == {}
    with pytest.raises(VerifyError, match="calibration ensures fails"):
        run_passes(steps(Calibration(ensures=(fails,))), program, Session(Tensors({})))
    assert float(program.values["a"]) == 2.0


NO_DATA = (
    "nvfp4_cast_mxfp4",
    "nvfp4_cast_mxfp4_input_scale_1",
    "nvfp4_weight_only",
    "nvfp4_weight_only_mse",
)


FIRST = {"learned": "learn", "auto": "choose-formats"}


def test_the_pass_that_needs_data_is_named() -> None:
    assert needs_data(steps(Step(), Calibration())) == "calibration"
    assert needs_data(steps(Step())) is None
    for name in shipped():
        first = next((step for kind, step in FIRST.items() if kind in name), "calibrate-max")
        expected = None if name in NO_DATA else first
        assert needs_data(load(name, PASSES).passes) == expected


@pytest.mark.parametrize("name", list(PASSES))
def test_every_pass_keeps_the_protocol(name: str) -> None:
    step = PASSES[name]()
    assert isinstance(step, Pass)
    assert step.name == name
    calibrating = ("calibrate-max", "choose-formats", "learn", "tune-norms")
    assert isinstance(step, CalibrationPass) == (name in calibrating)
    with pytest.raises(AttributeError):
        step.name = "other"  # type: ignore[misc]


RELU = Rule("relu", Call(torch.ops.aten.relu.default, Bind("x", rank=1)))


@dataclass(frozen=True)
class Rectify(Pass):
    """What is rectified once is rectified twice: a pass that only rewrites."""

    name: ClassVar[str] = "rectify"
    same_function: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        return (RELU.match(node) for node in program.graph.nodes if node.op == "call_function")

    def rewrite(self, site: Match) -> None:
        again = edit.call(site.node.graph, f"{site.node.name}_again", torch.ops.aten.relu.default, site.node)
        edit.replace(site.node, again)


def test_a_pass_that_only_rewrites_gives_sites_and_rewrite() -> None:
    program, counts = small(), list[int]()
    run_passes([Rectify()], program, after=lambda step, stage, count: counts.append(count))
    assert counts == [1]
    assert "%y_again : f32[4] = aten.relu(%y)" in dump(program.graph)


def test_the_misses_of_every_pass_are_kept_with_their_reasons() -> None:
    program = Program(parse(MODEL), HUB)
    run_passes([Rectify(), *load("nvfp4_default-fp8_cast_kv", PASSES).passes], program)
    reasons = {(miss.step, miss.node): miss.reason for miss in program.misses}
    assert reasons["rectify", "act"].startswith("`x`: expected 1 dimensions")
    assert reasons["quantize-linears", "r"] == "a router: %which chooses by its result"
    assert {step for step, _ in reasons} >= {"rectify", "quantize-linears", "quantize-experts", "sync-groups"}
    assert program.why_left()["layers.0.mlp.gate.weight"] == "a router: %which chooses by its result"


def test_a_pass_that_the_spec_lacks_says_why_weights_stay() -> None:
    program = Program(parse(MODEL), HUB)
    passes = load("nvfp4_experts_only-fp8_cast_kv", PASSES).passes
    run_passes(passes, program, beside=bystanders(passes, PASSES))
    why = program.why_left()
    assert why["layers.0.self_attn.q_proj.weight"] == "no pass of the spec quantizes linears"
    assert why["layers.0.mlp.gate.weight"] == "a router: %which chooses by its result"


@dataclass(frozen=True)
class Scale(Pass):
    """Halve what a relu gives, or a weight: a call that no checkpoint can hold."""

    weight: bool = False

    name: ClassVar[str] = "scale"

    def run(self, program: Program) -> int:
        name = "q" if self.weight else "act"
        node = next(node for node in program.graph.nodes if node.name == name)
        edit.replace(node, edit.call(program.graph, f"{name}_half", torch.ops.aten.mul.Tensor, node, 0.5))
        return 1


@dataclass(frozen=True)
class Skip(Pass):
    """Leave an activation function out: no node is new."""

    name: ClassVar[str] = "skip"

    def run(self, program: Program) -> int:
        act = next(node for node in program.graph.nodes if node.name == "act")
        edit.replace(act, act.all_input_nodes[0])
        return 1


@dataclass(frozen=True)
class SameScale(Scale):
    """The same, by a pass that says that the function stays what it is."""

    same_function: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (Scale(weight=True), "found `%q_half = aten.mul.Tensor(%q, 0.5)`"),
        (Scale(), "found `%act_half = aten.mul.Tensor(%act, 0.5)`"),
        (Skip(), "`%d = aten.linear(%bmm_experts, %shared)`; it was `%d = aten.linear(%act, %shared)`"),
    ],
)
def test_a_pass_that_changes_what_the_graph_computes_is_refused(step: Pass, line: str) -> None:
    passes = load("nvfp4_weight_only", PASSES).passes
    with pytest.raises(VerifyError, match=f"{step.name} changes what the graph computes") as refused:
        run_passes([passes[0], step, *passes[1:]], Program(parse(MODEL), HUB))
    assert line in str(refused.value)
    run_passes([SameScale(), *passes], Program(parse(MODEL), HUB))


def test_quantizing_and_taking_it_back_keep_the_architecture() -> None:
    program = Program(parse(MODEL), HUB)
    run_passes(load("nvfp4_default-fp8_cast_kv", PASSES).passes[:1], program)
    before = architecture(program.graph)
    run_passes(load("nvfp4_default-fp8_cast_kv", PASSES).passes[1:-1], program)
    assert "fxq.quantize" in dump(program.graph)
    assert difference(before, architecture(program.graph)) is None


# That one takes weights of whole blocks of 128; tests/end_to_end/test_fp8_blocks.py has some.
@pytest.fixture(params=[name for name in shipped() if "fp8_blocks" not in name])
def spec(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


def _model_for(spec: str) -> Program:
    """The small graph, its weights held as a spec wants them."""
    program = Program(parse(MODEL), HUB)
    if "cast_mxfp4" in spec:
        names = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
        held = dict.fromkeys([*names, *(key for keys in EXPERTS.keys for key in keys)], "MXFP4")
        program.hub = replace(HUB, encodings=held)
    return program


def test_every_shipped_spec_runs_over_a_small_graph_without_weights(spec: str) -> None:
    program = _model_for(spec)
    run_passes(load(spec, PASSES).passes, program)
    verify(program.graph)
    text = dump(program.graph)
    assert dump(parse(text)) == text
    stored = {
        str(node.args[0]) for node in program.graph.nodes if str(node.target).startswith("fxq.store_linear")
    }
    experts = {f"layers.0.mlp.experts.{e}.up_proj" for e in (0, 1)}
    mlp = {"layers.0.mlp.shared.down_proj"}
    attention = {f"layers.0.self_attn.{p}_proj" for p in "qkv"}
    expected = experts | mlp | attention
    if "experts_only" in spec:
        expected = experts
    elif "mlp_only" in spec:
        expected = experts | mlp
    elif "fp8_attention" in spec and "experts" in spec:
        expected = experts | attention
    head = {"lm_head"} if "lm_head" in spec else set()
    assert stored == expected | head
    caches = [node for node in program.graph.nodes if str(node.target).startswith("fxq.store_kv")]
    assert [node.args[0] for node in caches] == (["layers.0.self_attn"] if spec.endswith("_kv") else [])
    assert [any(isinstance(a, torch.fx.Node) for a in node.args) for node in caches] == [
        spec.endswith("-fp8_kv")
    ] * len(caches)
    copied = {str(node.args[0]) for node in program.graph.nodes if str(node.target) == "fxq.store.default"}
    assert {"embed_tokens.weight", "layers.0.mlp.gate.weight"} <= copied
    assert ("lm_head.weight" in copied) == (not head)
    assert not {f"{linear}.weight" for linear in stored} & copied, "nothing is stored twice"
    packs = [node for node in program.graph.nodes if node.target is dialect.PACK]
    blocks = [node for node in packs if node.kwargs["format"] == "nvfp4"]
    modes = {node.kwargs["scale"] for node in blocks}  # FP8 weights have no block scales to search
    decided = any(kind in spec for kind in ("hessian", "gptq", "learned", "cast_mxfp4"))
    assert modes == (set() if decided else {"mse" if "mse" in spec or "auto" in spec else "max"})


def test_every_shipped_spec_fills_every_amax(spec: str) -> None:
    if "auto" in spec:
        pytest.skip("it compares predictions [B, S, V]; the small graph makes none")
    program = _model_for(spec)
    weights = {str(n.target): n.meta["val"] for n in program.graph.nodes if n.op == "get_attr"}
    held: dict[str, Tensor] = {name: torch.ones(val.shape, dtype=val.dtype) for name, val in weights.items()}
    passes = load(spec, PASSES).passes
    run_passes(passes, program, Session(Tensors(held), batches=[torch.tensor([[0, 1, 2, 3]])] * 2))
    wanted = {str(node.args[0]) for node in program.graph.nodes if str(node.target).startswith("fxq.value")}
    assert wanted == set(program.values)
    assert bool(wanted) == (needs_data(passes) is not None)
    found = amaxes(program, Tensors(held), torch.device("cpu"))
    assert all(float(value) > 0 and torch.isfinite(value) for value in found.values())
    assert {name for name in program.values if name.endswith("amax")} < found.keys()
    kept = "w_e1_amax_found" if "learned" in spec else "w_e1_amax"
    assert found[kept] == pytest.approx(
        1, rel=1e-2
    )  # all router outputs are equal, so every token goes to expert 0
    if needs_data(passes):
        assert program.tokens["layers.0.mlp.experts.up_proj"].tolist() == [8, 0]


def test_a_parameter_of_which_parts_have_different_formats_is_refused() -> None:
    lines = ["%w : bf16[2,16,32] = @w"]
    for e, format in enumerate(("nvfp4", "fp8")):
        lines += [
            f"%e{e} : bf16[16,32] = fxq.slice(%w, {e})",
            f"%a{e} : f32[] = fxq.amax(%e{e})",
            f"%q{e} : bf16[16,32] = fxq.quantize(%e{e}, %a{e}, format='{format}', scale='max')",
        ]
    text = "\n".join([*lines, "return [%q0, %q1]", ""])
    reason = tensors_whole(Program(parse(text)))
    assert reason is not None
    assert reason.startswith("w is quantized to nvfp4 in one part and to fp8 in another")
    assert tensors_whole(Program(parse(text.replace("fp8", "nvfp4")))) is None
