"""Rewritten weights: the checkpoint holds what the graph says, in every form of storage, or is refused."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import Node
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxq
from fxq.errors import FxqError, TraceError, VerifyError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.pattern import Match
from fxq.graph.program import Program
from fxq.graph.structure.experts import is_expert
from fxq.graph.structure.views import shape_of
from fxq.graph.text import parse
from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.passes.fuse_experts import FuseExperts
from fxq.passes.lower import Lower
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.passes.sync_groups import SyncGroups
from fxq.pipeline.base import Pass
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import Spec
from tests import reader, tiny
from tests.docs import ROOT, blocks
from tests.families import Zoo, load, save, zoo
from tests.sources.test_encodings_fp8 import fp8_copy

__all__ = ["zoo"]

ATEN = torch.ops.aten
FAMILIES = {family.name: family for family in tiny.families()}
# One of each form: tied, a scale of 1 + w, Conv1D, fused qkv, stacked experts, interleaved gate and up in one
# tensor, transposed experts, experts as rows of a matrix, a state-space mixer.
CHOSEN = ("gemma3_text", "gpt2", "phi3", "qwen3_moe", "gpt_oss", "llama4_text", "granitemoe", "mamba")
QUICK = ("gemma3_text", "qwen3_moe")
# Why a family may be refused.
REFUSALS = (
    "more than choose rows",
    "one tensor cannot be both",
    "there is nothing to emit",
    "is rewritten in part, but the graph never reads",
    "would be lost",
)
TEXT = [ids.tolist()[0] for ids in (tiny.text_ids(1, 17, seed) for seed in range(2))]


def _half(w: Node, users: list[Node]) -> Node:
    half = edit.call(w.graph, f"{w.name}_half", ATEN.mul.Tensor, w, 0.5)
    new = edit.call(w.graph, f"{w.name}_new", dialect.REWRITE, w, half)
    edit.replace(w, new, [user for user in users if user is not half])
    return new


@dataclass(frozen=True)
class HalveAll(Pass):
    """Every parameter that the graph reads becomes half of itself, which floating point does exactly."""

    name: ClassVar[str] = "halve-all"

    def sites(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            is_parameter = node.op == "get_attr" and node.target not in program.constants
            if is_parameter and node.meta["val"].is_floating_point():
                yield Match("parameter", node, {"w": node})

    def rewrite(self, site: Match) -> None:
        _half(site.node, list(site.node.users))


@dataclass(frozen=True)
class HalveExperts(Pass):
    """Every other expert of what fuse-experts found becomes half of itself, slice by slice."""

    name: ClassVar[str] = "halve-experts"

    def sites(self, program: Program) -> Iterator[Match]:
        for node in program.graph.nodes:
            if node.target is dialect.EXPERT_LINEAR:
                yield Match("experts", node, {"w": node_at(node, 1)})

    def rewrite(self, site: Match) -> None:
        w, graph = site["w"], site.node.graph
        pieces = []
        for e in range(shape_of(w)[0]):
            piece = edit.call(graph, f"{w.name}_e{e}", dialect.SLICE, w, e)
            pieces.append(_half(piece, []) if e % 2 else piece)
        edit.replace(w, edit.call(graph, f"{w.name}_again", dialect.STACK, pieces), [site.node])


def spec(*rewriting: Pass, experts: bool = False, only: tuple[str, ...] = ("*",)) -> Spec:
    """Rewrite, then quantize weights."""
    passes: list[Pass] = [FuseExperts(partial=True), *rewriting]
    passes += [QuantizeExperts(inputs="none", required=False)] if experts else []
    passes += [QuantizeLinears(inputs="none", only=only, partial=True)]
    passes += [SyncGroups(), CalibrateBootstrap(), Lower()]
    return Spec("rewriting", "", tuple(passes))


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def halved_keys(compiled: fxq.Compiled) -> set[str]:
    """The source's tensors that the graph reads."""
    stored, constants = compiled.program.hub.stored, compiled.program.constants
    read = [n for n in compiled.graph.nodes if n.op == "get_attr" and n.target not in constants]
    names = [str(n.target) for n in read if n.meta["val"].is_floating_point()]
    return {key for name in names if name in stored for keys in stored[name].keys for key in keys}


def check_equals(out: Path, source: Path, changed: dict[str, Tensor], aside: Path) -> None:
    """An output is what a source with these tensors would have given: as they are, or packed (decoded by the
    independent reader)."""
    shutil.copytree(source, aside)
    before = tensors(source)
    assert changed.keys() <= before.keys()
    for file in aside.glob("*.safetensors"):
        own = load_file(file)
        save_file({key: changed.get(key, t) for key, t in own.items()}, file, {"format": "pt"})
    after = tensors(out)
    for key, tensor in tensors(aside).items():
        if key in after and after[key].dtype == tensor.dtype:
            assert torch.equal(after[key], tensor), key
    findings = reader.check(out, aside)
    # What a tied head is called is no matter of this test, and the reader knows one name.
    assert [f for f in findings if not f.startswith("exclude list:")] == []
    shutil.rmtree(aside)


def check_halved(name: str, tmp_path: Path) -> fxq.Compiled:
    source = save(tiny.tiny_model(FAMILIES[name]), tmp_path / "source")
    compiled = fxq.compile(source, spec(HalveAll()), out=tmp_path / "out")
    keys, before = halved_keys(compiled), tensors(source)
    assert len(keys) > 5
    changed = {key: before[key] * 0.5 for key in keys if key in before}
    check_equals(tmp_path / "out", source, changed, tmp_path / "aside")
    return compiled


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHOSEN]
)
def test_every_parameter_is_stored_as_the_graph_has_it(name: str, tmp_path: Path) -> None:
    check_halved(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba"])
def test_the_graph_computes_what_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    _, graph = check_halved(name, tmp_path).perplexity(TEXT)
    assert fxq.evaluate(tmp_path / "out", TEXT).perplexity == pytest.approx(graph, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_kept_exactly_or_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    try:
        model = tiny.tiny_model(FAMILIES[name])
        with torch.no_grad():
            model(input_ids=tiny.text_ids(1, 24), use_cache=False)
    except Exception as error:
        pytest.skip(f"transformers cannot run it on token ids: {type(error).__name__}")
    try:
        check_halved(name, tmp_path)
    except TraceError as error:
        pytest.skip(f"cannot be traced: {error}")
    except FxqError as error:
        if not re.search("|".join(REFUSALS), str(error)):
            raise


# How experts lie in files: each in tensors of its own, gate and up interleaved and transposed in one tensor,
# transposed, rows of one tensor.
EXPERT_FORMS = ("qwen3_moe", "gpt_oss", "llama4_text", "granitemoe")
QUICK_EXPERTS = (("qwen3_moe", True), ("gpt_oss", False))


def _experts_halved(source: Path, compiled: fxq.Compiled) -> dict[str, Tensor]:
    """The source's tensors, odd experts of each halved."""
    before, changed = tensors(source), dict[str, Tensor]()
    parameters = [n for n in compiled.graph.nodes if n.op == "get_attr" and is_expert(n)]
    for parameter in parameters:
        count = shape_of(parameter)[0]
        for keys in compiled.program.hub.stored[str(parameter.target)].keys:
            for e, key in enumerate(keys):
                if len(keys) == count:
                    changed[key] = before[key] * (0.5 if e % 2 else 1)
                else:
                    whole = before[key].clone().view(count, -1, before[key].shape[-1])
                    whole[1::2] *= 0.5
                    changed[key] = whole.view(before[key].shape)
    return changed


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        pytest.param(name, quantized, marks=() if (name, quantized) in QUICK_EXPERTS else pytest.mark.slow)
        for name in EXPERT_FORMS
        for quantized in (False, True)
    ],
)
def test_experts_are_rewritten_one_by_one(name: str, quantized: bool, tmp_path: Path) -> None:
    source = save(tiny.tiny_model(FAMILIES[name]), tmp_path / "source")
    done = fxq.compile(source, spec(HalveExperts(), experts=quantized), out=tmp_path / "out")
    changed = _experts_halved(source, done)
    assert len(changed) >= 2
    check_equals(tmp_path / "out", source, changed, tmp_path / "aside")


@pytest.mark.slow
def test_a_live_model_is_rewritten_and_stays_as_it_was(zoo: Zoo, tmp_path: Path) -> None:
    live = load(zoo("qwen3_moe"))
    before = {key: t.clone() for key, t in live.state_dict().items()}
    compiled = fxq.compile(live, spec(HalveAll(), experts=True), out=tmp_path / "live")
    assert all(torch.equal(t, before[key]) for key, t in live.state_dict().items())
    fxq.compile(zoo("qwen3_moe"), spec(HalveAll(), experts=True), out=tmp_path / "files")
    ours, theirs = tensors(tmp_path / "live"), tensors(tmp_path / "files")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(_bytes(t), _bytes(theirs[key])) for key, t in ours.items())
    assert len(compiled.program.hub.stored) > 5


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


@pytest.mark.slow
def test_an_fp8_source_is_rewritten_as_it_decodes(zoo: Zoo, tmp_path: Path) -> None:
    source = fp8_copy(zoo("qwen3_moe"), tmp_path / "fp8", (24, 40))
    only = ("*q_proj", "*k_proj", "*v_proj")
    fxq.compile(source, spec(HalveAll(), experts=True, only=only), out=tmp_path / "out")
    fxq.compile(source, spec(experts=True, only=only), out=tmp_path / "plain")
    halved, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert halved.keys() == plain.keys()
    for key, t in plain.items():
        # Codes and block scales of a half are those of the whole; the scale of the tensor is half of it.
        is_same = t.dtype in (torch.uint8, torch.float8_e4m3fn)
        assert torch.equal(_bytes(halved[key]), _bytes(t if is_same else t * 0.5)), key
    assert any(key.endswith("o_proj.weight") and t.dtype == torch.bfloat16 for key, t in plain.items())


@dataclass(frozen=True)
class ScaleReading(Pass):
    """What the head, or what the embedding, reads of the shared table is another.

    head: whether it is the head that reads a multiple.
    """

    head: bool = True
    name: ClassVar[str] = "scale-reading"

    def sites(self, program: Program) -> Iterator[Match]:
        for node in program.graph.nodes:
            if node.target is ATEN.embedding.default and node_at(node, 0).op == "get_attr":
                yield Match("table", node, {"w": node_at(node, 0)})

    def rewrite(self, site: Match) -> None:
        others = [user for user in site["w"].users if user is not site.node]
        _half(site["w"], others if self.head else [site.node])


@pytest.mark.parametrize("head", [True, False], ids=["head", "embedding"])
def test_a_table_of_which_one_reading_is_rewritten_becomes_two(head: bool, zoo: Zoo, tmp_path: Path) -> None:
    source = zoo("llama_tied")
    compiled = fxq.compile(source, spec(ScaleReading(head)), out=tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    table = before["model.embed_tokens.weight"]
    assert "lm_head.weight" not in before
    assert torch.equal(after["lm_head.weight"], table * 0.5 if head else table)
    assert torch.equal(after["model.embed_tokens.weight"], table if head else table * 0.5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    decoded = decoded_model(tmp_path / "out", tmp_path / "decoded")
    assert not decoded.config.tie_word_embeddings
    assert perplexity(decoded) == pytest.approx(compiled.perplexity(TEXT)[1], rel=2e-3)  # bf16 rounds


def decoded_model(out: Path, to: Path) -> PreTrainedModel:
    """transformers' own class with what the independent reader decodes, in the source's dtype."""
    found = reader.read_checkpoint(out)
    quantized, plain = found.quantized_linears(), tensors(out)
    dtype = next(t.dtype for key, t in plain.items() if key.endswith("norm.weight"))
    scales = {found.part(name, scale) for name in quantized for scale in reader.SCALES}
    kept = {key: t for key, t in plain.items() if key not in scales}
    for name in quantized:
        kept[found.part(name)] = torch.from_numpy(found.dequantize(name).copy()).to(dtype)
    to.mkdir()
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    config = {key: v for key, v in (found.config or {}).items() if key != "quantization_config"}
    (to / "config.json").write_text(json.dumps(config))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(to, dtype=dtype)
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel) -> float:
    losses = []
    for ids in TEXT:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.fixture(scope="session")
def fold_norms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pass of docs/passes.md."""
    (block,) = [b for b in blocks(ROOT / "docs" / "passes.md", "python") if b.file == "fold_norms.py"]
    path = tmp_path_factory.mktemp("passes") / "fold_norms.py"
    path.write_text(block.text)
    return path


FOLDED = """
passes:
  - fuse-experts
  - fold-norms
  - quantize-experts: {inputs: none, required: false}
  - quantize-linears: {inputs: none, partial: true}
  - sync-groups
  - calibrate-bootstrap
  - calibrate-mse
  - lower
"""


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_moe", "phi3", "mixtral", "deepseek_v3", "granitemoe", "qwen2")
        ),
    ],
)
def test_a_fold_of_norms_gives_one_perplexity_everywhere(name: str, fold_norms: Path, tmp_path: Path) -> None:
    source = save(tiny.tiny_model(FAMILIES[name], torch.float32), tmp_path / "source")
    (tmp_path / "folded.yaml").write_text(FOLDED)
    out = tmp_path / "out"
    compiled = fxq.compile(source, tmp_path / "folded.yaml", passes=[fold_norms], out=out)
    assert sum(n.target is dialect.REWRITE for n in compiled.graph.nodes) > 4
    _, graph = compiled.perplexity(TEXT)
    assert fxq.evaluate(out, TEXT).perplexity == pytest.approx(graph, rel=1e-5)
    assert perplexity(decoded_model(out, tmp_path / "decoded")) == pytest.approx(graph, rel=1e-5)


@dataclass(frozen=True)
class RewriteQuantized(Pass):
    """Halve what is quantized already."""

    name: ClassVar[str] = "rewrite-quantized"

    def sites(self, program: Program) -> Iterator[Match]:
        for node in program.graph.nodes:
            if node.target is dialect.QUANTIZE:
                yield Match("quantized", node, {})

    def rewrite(self, site: Match) -> None:
        _half(site.node, list(site.node.users))


@dataclass(frozen=True)
class OfLinears(Pass):
    """Change an operand of each linear without `fxq.rewrite`."""

    def sites(self, program: Program) -> Iterator[Match]:
        for node in program.graph.nodes:
            if node.target is ATEN.linear.default:
                yield Match("linear", node, {"x": node_at(node, 0), "w": node_at(node, 1)})


@dataclass(frozen=True)
class Rotate(OfLinears):
    """Multiply what a linear reads by a matrix, while the model runs."""

    name: ClassVar[str] = "rotate"

    def rewrite(self, site: Match) -> None:
        x, matrix = site["x"], site["w"]
        turned = edit.call(x.graph, f"{x.name}_turned", ATEN.matmul.default, x, matrix)
        edit.replace(x, turned, [site.node])


@dataclass(frozen=True)
class FoldWithoutRewrite(OfLinears):
    """Let a linear read its weight times a norm's scale, without saying that the checkpoint is to hold it."""

    name: ClassVar[str] = "fold-without-rewrite"

    def rewrite(self, site: Match) -> None:
        w, product = site["w"], site["x"]
        scaled = edit.call(w.graph, f"{w.name}_scaled", ATEN.mul.Tensor, w, node_at(product, 0))
        edit.replace(w, scaled, [site.node])
        edit.replace(product, node_at(product, 1), [site.node])


LINEAR = """\
%x : f32[4,32] = placeholder()
%scale : f32[32] = @scale
%normed : f32[4,32] = aten.mul.Tensor(%scale, %x)
%w : f32[32,32] = @w
%y : f32[4,32] = aten.linear(%normed, %w)
return [%y]
"""


@pytest.mark.parametrize(
    ("step", "is_late", "reason"),
    [
        (RewriteQuantized(), True, "what is rounded already cannot be rewritten"),
        (Rotate(), False, r"^rotate changes what the graph .*%normed_turned = aten\.matmul\(%normed, %w\)"),
        (FoldWithoutRewrite(), False, r"^fold-without-rewrite changes what .*%w_scaled = aten\.mul\.Tensor"),
    ],
    ids=lambda value: value.name if isinstance(value, Pass) else "",
)
def test_what_no_checkpoint_can_say_is_refused(step: Pass, is_late: bool, reason: str) -> None:
    quantize = QuantizeLinears(inputs="none", only=("w",))
    with pytest.raises(VerifyError, match=reason):
        run_passes([quantize, step] if is_late else [step, quantize], Program(parse(LINEAR)))
