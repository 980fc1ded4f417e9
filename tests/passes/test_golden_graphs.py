"""Golden graphs: what each pass does to a graph, and what must hold of every rewrite whatever the pass."""

import random
import re
import string

import pytest
import torch
from torch.fx import Graph, Node

from fxq.errors import VerifyError
from fxq.graph.pattern import Miss
from fxq.graph.program import Program
from fxq.graph.text import dump, parse
from fxq.graph.verify import verify
from fxq.passes import PASSES
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.pipeline.run import run_passes
from tests.passes.golden import Case, Evaluate, all_cases, apply, error_class

CASES = all_cases()
REWRITING = [case for case in CASES if "after" in case.sections]
# A lowered program is no model any more, and its names are the point of it.
MODELS = [case for case in REWRITING if case.header["pass"] != "lower"]
NAMED = {"only", "skip", "skip_first", "skip_last"}
RENAMED = [
    case
    for case in MODELS
    if not case.header.keys() & {"values", "weights", "inputs", "hub"}
    and not case.header.get("options", {}).keys() & NAMED
]


def by_id(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@by_id(CASES)
def test_golden(case: Case, update_golden: bool) -> None:
    program = case.program()
    verify(program.graph)
    if "miss" in case.sections:
        check_misses(case)
    if "error" in case.sections:
        check_error(case)
    if "after" not in case.sections:
        return
    after, count = apply(case, program)
    verify(parse(after))
    if update_golden:
        case.rewrite("after", after)
        return
    assert after == case.sections["after"]
    assert count == case.header.get("rewrites", count)


@by_id(CASES)
def test_text_round_trip(case: Case) -> None:
    for name in ("before", "after"):
        if name in case.sections:
            text = dump(parse(case.sections[name]))
            assert dump(parse(text)) == text
    assert dump(parse(case.before)) == case.before, "a golden graph is written as `dump` writes it"


@by_id(REWRITING)
def test_only_val_is_load_bearing(case: Case) -> None:
    program = case.program()
    for node in program.graph.nodes:
        node.meta["stack_trace"] = node.meta["nn_module_stack"] = node.meta["fxq"] = object()
    assert apply(case, program) == apply(case, case.program())


@by_id(MODELS)
def test_run_twice(case: Case) -> None:
    program = case.program()
    once, _ = apply(case, program)
    twice, count = apply(case, program)
    assert twice == once
    if case.session(program) is None:
        assert count == 0


def test_a_lowered_program_cannot_be_lowered_again() -> None:
    case = next(case for case in REWRITING if case.header["pass"] == "lower")
    program = case.program()
    apply(case, program)
    with pytest.raises(VerifyError, match="no weight is quantized"):
        run_passes([case.step()], program)


@by_id(MODELS)
def test_computes_the_same(case: Case) -> None:
    before = case.program()
    weights, inputs = case.weights(before), case.inputs(before)
    after = case.program()
    apply(case, after)
    weights |= case.weights(after)  # a pass may read more of the source
    expected = Evaluate(before, weights, exact=True).run(*inputs)
    found = Evaluate(after, weights, exact=True).run(*inputs)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype is b.dtype
        if case.header["pass"] == "fuse-experts":
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(a, b)
    assert all(torch.isfinite(t).all() for t in Evaluate(after, weights).run(*inputs)), "the simulator runs"


@by_id(RENAMED)
def test_names_decide_nothing(case: Case) -> None:
    """Whatever parameters and nodes are called, the rewrite is the same (globs are the user's own)."""
    mangled, back = _mangle(case.before, parse(case.before))
    after, _ = apply(case, case.program(mangled))
    for strange, name in back.items():
        after = after.replace(strange, name)
    assert after == apply(case, case.program())[0]


def _mangle(text: str, graph: Graph) -> tuple[str, dict[str, str]]:
    rng, back = random.Random(text), dict[str, str]()

    def strange(name: str) -> str:
        made = "q" + "".join(rng.choices(string.ascii_lowercase, k=12))
        back[made] = name
        return made

    for node in graph.nodes:
        if node.op == "get_attr":
            text = re.sub(rf"@{re.escape(str(node.target))}\b", f"@{strange(str(node.target))}", text)
        if node.op != "output":
            text = re.sub(rf"%{node.name}\b", f"%{strange(node.name)}", text)
    return text, back


def check_misses(case: Case) -> None:
    misses: dict[str, list[str]] = {}
    for site in case.step().sites(case.program()):
        misses.setdefault(site.node.name, []).append(
            site.reason if isinstance(site, Miss) else f"fires: {site.rule}"
        )
    for line in case.sections["miss"].splitlines():
        node, _, reason = line.partition(": ")
        assert node in misses, f"%{node} is no site; there are {', '.join(misses)}"
        assert any(reason in found for found in misses[node]), (
            f"%{node}: expected {reason!r}, found {misses[node]}"
        )


def check_error(case: Case) -> None:
    first, *rest = case.sections["error"].strip().splitlines()
    name, _, message = first.partition(": ")
    with pytest.raises(error_class(name)) as caught:
        apply(case, case.program())
    for part in (message, *rest):
        assert part in str(caught.value)


EXPERTS_TWICE = """\
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,32,32] = @experts.w
%y : bf16[4,32] = fxq.expert_linear(%x, %w, %ids)
%z : bf16[4,32] = fxq.expert_linear(%y, %w, %ids)
return [%z]
"""
LINEAR_TWICE = """\
%x : bf16[4,32] = placeholder()
%w : bf16[32,32] = @shared_block.o_proj.weight
%y : bf16[4,32] = aten.linear(%x, %w)
%act : bf16[4,32] = aten.relu(%y)
%z : bf16[4,32] = aten.linear(%act, %w)
%lm : bf16[8,32] = @lm_head.weight
%logits : bf16[4,8] = aten.linear(%z, %lm)
return [%logits]
"""
KEYS_TWICE = """\
%x : bf16[1,4,32] = placeholder()
%k : bf16[32,32] = @layers.0.self_attn.k_proj.weight
%k_out : bf16[1,4,32] = aten.linear(%x, %k)
%k_heads : bf16[1,1,4,32] = aten.unsqueeze(%k_out, 1)
%v : bf16[32,32] = @layers.0.self_attn.v_proj.weight
%v_out : bf16[1,4,32] = aten.linear(%x, %v)
%v_heads : bf16[1,1,4,32] = aten.unsqueeze(%v_out, 1)
%one : bf16[1,1,4,32] = aten.scaled_dot_product_attention(%k_heads, %k_heads, %v_heads)
%two : bf16[1,1,4,32] = aten.scaled_dot_product_attention(%one, %k_heads, %v_heads)
return [%two]
"""


def compiled(text: str, *names: str) -> Program:
    """The program after passes with their default options."""
    program = Program(parse(text))
    run_passes([PASSES[name]() for name in names], program)
    return program


def calls(program: Program, target: str) -> list[Node]:
    return [node for node in program.graph.nodes if str(node.target) == f"{target}.default"]


@pytest.mark.parametrize(
    ("text", "quantize"),
    [(EXPERTS_TWICE, "quantize-experts"), (LINEAR_TWICE, "quantize-linears")],
    ids=["experts", "linear"],
)
def test_a_weight_used_by_two_layers_is_stored_once(text: str, quantize: str) -> None:
    program = compiled(text, quantize, "sync-groups")
    weights = [
        str(node.args[0]) for node in calls(program, "fxq.quantize") if node.kwargs["scale"] != "dynamic"
    ]
    assert len(weights) == len(set(weights))
    if quantize == "quantize-linears":
        run_passes([PASSES["lower"]()], program)
        names = [node.args[0] for node in calls(program, "fxq.store_linear")]
        assert len(names) == len(set(names))


def test_a_weight_used_by_two_layers_has_one_input_amax() -> None:
    """A checkpoint holds one input scale a linear, so it must cover both inputs."""
    program = compiled(LINEAR_TWICE, "quantize-linears", "sync-groups", "lower")
    (store,) = calls(program, "fxq.store_linear")
    shared = store.args[2]
    assert isinstance(shared, Node)
    assert str(shared.target) == "fxq.sync.default"
    assert len(shared.args[0]) == 2  # type: ignore[arg-type]


def test_keys_that_two_attentions_read_have_one_scale() -> None:
    """Cross-layer KV reuse: there is one cache, and a checkpoint has one place for its scale."""
    program = compiled(KEYS_TWICE, "quantize-linears", "quantize-kv", "sync-groups", "lower")
    names = [node.args[0] for node in calls(program, "fxq.store_kv")]
    assert names == ["layers.0.self_attn"]


def test_a_cache_scale_without_a_module_to_hold_it_is_refused() -> None:
    text = KEYS_TWICE.replace("layers.0.self_attn.k_proj", "first.k_proj").replace(
        "layers.0.self_attn.v_proj", "second.v_proj"
    )
    with pytest.raises(VerifyError, match="lower"):
        compiled(text, "quantize-linears", "quantize-kv", "sync-groups", "lower")


def test_linears_quantized_by_two_entries_of_a_spec_join_one_group() -> None:
    text = LINEAR_TWICE.replace("aten.linear(%act, %w)", "aten.linear(%x, %v)").replace(
        "%act : bf16[4,32] = aten.relu(%y)",
        "%act : bf16[4,32] = aten.relu(%y)\n%v : bf16[32,32] = @other.weight",
    )
    program = Program(parse(text.replace("return [%logits]", "return [%logits, %act]")))
    first, second = QuantizeLinears(only=("other",)), QuantizeLinears(only=("shared_block.*",))
    run_passes([first, second, PASSES["sync-groups"]()], program)
    quantizes = calls(program, "fxq.quantize")
    for scale in ("max", "dynamic"):
        assert len({node.args[1] for node in quantizes if node.kwargs["scale"] == scale}) == 1
