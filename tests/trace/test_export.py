"""The traced graph computes what the model does, at other sizes too, and leaves the user's things alone."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    NemotronHConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3_5MoeForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import fxq
from fxq.graph import dialect, text
from fxq.graph.arguments import int_at
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.graph.structure.views import VIEWS, strip
from fxq.graph.verify import verify
from fxq.model import Model, open_model
from fxq.passes.fuse_experts import FuseExperts
from fxq.pipeline.run import run_passes
from fxq.run.simulate import simulation
from fxq.sources import Directory
from fxq.trace.export import EXAMPLE_BATCH, EXAMPLE_LENGTH, trace
from tests import tiny
from tests.families import FAMILIES, MOE, MOE_LAYERS, VOCABULARY, Zoo, load, random_model, save, zoo

__all__ = ["zoo"]

SIZES = [(1, 1), (1, 9), (2, 16), (EXAMPLE_BATCH, EXAMPLE_LENGTH), (1, 40), (5, 33)]
CPU = torch.device("cpu")
LATER = ("mixtral", "qwen3")  # close to others: slow
ALL = [pytest.param(f, marks=[pytest.mark.slow] if f in LATER else []) for f in FAMILIES]
EXPERTS = [pytest.param(f, marks=[pytest.mark.slow] if f in LATER else []) for f in MOE]


@pytest.fixture(scope="module")
def opened(zoo: Zoo) -> Callable[[str], Model]:
    """Family -> its traced model, traced once; tests must not change the graph."""
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            made[name] = open_model(zoo(name))
        return made[name]

    return model


Opened = Callable[[str], Model]


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCABULARY, size, generator=generator) for size in SIZES]


def _eager(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in _batches()]


@pytest.mark.parametrize("family", ALL)
def test_the_graph_computes_the_model_s_logits_bit_for_bit(family: str, zoo: Zoo, opened: Opened) -> None:
    model = opened(family)
    verify(model.program.graph)
    wanted = _eager(load(zoo(family), experts_implementation="batched_mm"))
    found = simulation(model.program, model.source, CPU).run_batches(_batches())
    for size, ours, theirs in zip(SIZES, found, wanted, strict=True):
        assert ours.shape == theirs.shape == (*size, VOCABULARY)
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).abs().max() == 0, size


@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_compute_the_same_but_for_rounding(family: str, zoo: Zoo, opened: Opened) -> None:
    model = opened(family)
    program = dataclasses.replace(model.program, graph=copy.deepcopy(model.program.graph))
    run_passes((FuseExperts(),), program)
    fused = [node for node in program.graph.nodes if node.target is dialect.EXPERT_LINEAR]
    assert len(fused) == 2 * MOE_LAYERS[family]
    wanted = _eager(load(zoo(family), experts_implementation="batched_mm"))
    found = simulation(program, model.source, CPU).run_batches(_batches())
    for ours, theirs in zip(found, wanted, strict=True):
        # One matmul an expert adds its bf16 products in another order than one an assignment does.
        difference = (ours.float() - theirs.float()).abs()
        assert difference.mean() < 0.02 * theirs.float().abs().mean()
        assert difference.median() <= 0.01 * theirs.float().abs().median()


@pytest.mark.parametrize("family", ALL)
def test_parameters_of_the_graph_are_those_of_the_checkpoint(family: str, opened: Opened) -> None:
    model = opened(family)
    read = {str(n.target) for n in model.program.graph.nodes if n.op == "get_attr"} - set(
        model.program.constants
    )
    assert read <= set(model.program.hub.stored)
    keys = {key for name in read for part in model.program.hub.stored[name].keys for key in part}
    unread = set(model.program.hub.tensors) - keys
    assert unread == set(model.program.hub.extra)
    assert bool(unread) == (family == "deepseek_v3")


def test_a_tied_head_is_one_parameter_under_one_name(opened: Opened) -> None:
    targets = [n.target for n in opened("llama_tied").program.graph.nodes if n.op == "get_attr"]
    assert len(targets) == len(set(targets))
    assert "model.embed_tokens.weight" in targets
    assert "lm_head.weight" not in targets
    untied = [n.target for n in opened("llama").program.graph.nodes if n.op == "get_attr"]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(untied)


@pytest.mark.parametrize("family", ALL)
def test_nodes_hold_plain_shapes_and_the_dump_parses_back(family: str, opened: Opened) -> None:
    graph = opened(family).program.graph
    for node in graph.nodes:
        assert set(node.meta) <= {"val"}, node.name
    dump = text.dump(graph)
    assert text.dump(text.parse(dump)) == dump


@pytest.mark.parametrize("family", ["qwen3_moe", "llama_tied"])
def test_tracing_reads_no_weight(family: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError(f"a weight was read: {args[1:]}")

    for name in ("read", "read_expert", "read_hub"):
        monkeypatch.setattr(Directory, name, refuse)
    assert len(open_model(zoo(family)).program.graph.nodes) > 50


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_tracing_a_live_model_leaves_it_as_it_was(family: str) -> None:
    model = random_model(FAMILIES[family]()).train()
    model.set_experts_implementation("eager")
    before, private = copy.deepcopy(model.config.to_dict()), dict(vars(model.config))
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    traced = open_model(model)
    assert model.config.to_dict() == before
    assert vars(model.config) == private
    assert model.config._experts_implementation == "eager"
    assert all(module.training for module in model.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0], name
        assert torch.equal(tensor, state[name][1]), name
    model.eval().set_experts_implementation("batched_mm")
    found = simulation(traced.program, traced.source, CPU).run_batches(_batches()[:3])
    for ours, theirs in zip(found, _eager(model)[:3], strict=True):
        assert torch.equal(ours, theirs)


def test_a_live_model_with_changed_weights_is_traced_with_those(zoo: Zoo) -> None:
    model = load(zoo("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-2)
    traced = open_model(model)
    found = simulation(traced.program, traced.source, CPU).run_batches(_batches()[:2])
    for ours, theirs in zip(found, _eager(model)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_tracing_twice_gives_the_same_graph(zoo: Zoo, opened: Opened) -> None:
    again = open_model(zoo("phi3"))
    assert text.dump(again.program.graph) == text.dump(opened("phi3").program.graph)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_other_dtypes_trace_in_their_own(dtype: torch.dtype, tmp_path: Path) -> None:
    random_model(FAMILIES["llama"]()).to(dtype).save_pretrained(tmp_path / "model")  # type: ignore[arg-type]
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    for parameter in source.parameters():  # mapped from a file they lie anywhere, and MKL rounds by alignment
        parameter.data = parameter.data.clone()
    model = open_model(tmp_path / "model")
    found = simulation(model.program, model.source, CPU).run_batches(_batches()[:2])
    for ours, theirs in zip(found, _eager(source)[:2], strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


def test_a_model_that_is_no_causal_language_model_is_refused_with_a_reason(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(fxq.TraceError, match=r"vit: "):
        _ = open_model(tmp_path / "vit").program


@pytest.mark.slow
def test_a_chunked_scan_is_exact_at_any_number_of_chunks(tmp_path: Path) -> None:
    """Mamba-2 counts its chunks in python, which a trace would bake: the scan is one opaque call instead."""
    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=32,
        layers_block_type=["mamba", "attention"],
    )
    model = open_model(save(random_model(config), tmp_path / "model"))
    eager = load(tmp_path / "model")
    for length in (1, 17, 31, 33, 100):
        assert model.program.accepts(2, length) is None
        ids = torch.randint(3, VOCABULARY, (2, length))
        (found,) = simulation(model.program, model.source, CPU).run_batches([ids])
        with torch.no_grad():
            assert torch.equal(found, eager(input_ids=ids, use_cache=False).logits)


@pytest.mark.slow
def test_a_trace_is_used_only_at_lengths_it_holds_for(tmp_path: Path) -> None:
    """MiniMax loops over blocks of the sequence within a module, so the trace holds for one block alone."""
    model = open_model(saved("minimax", tmp_path / "model"))
    assert model.program.accepts(2, 63) is None
    assert model.program.accepts(2, 65) is not None
    calib = [tiny.text_ids(1, 100)[0].tolist(), [5, 6]]
    compiled = fxq.compile(tmp_path / "model", "nvfp4_default-fp8_cast_kv", calib=calib)
    assert any("longer samples were cut" in warning for warning in compiled.report.warnings)


@pytest.mark.slow
def test_rotary_embeddings_that_switch_with_the_length_are_used_below_the_switch(tmp_path: Path) -> None:
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.1] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
            "factor": 8.0,
        },
    )
    model = open_model(save(random_model(config), tmp_path / "model"))
    eager = load(tmp_path / "model")
    ids = torch.randint(3, VOCABULARY, (2, 32))
    assert model.program.accepts(2, 32) is None
    (found,) = simulation(model.program, model.source, CPU).run_batches([ids])
    with torch.no_grad():
        assert torch.equal(found, eager(input_ids=ids, use_cache=False).logits)
    assert "32 tokens" in str(model.program.accepts(1, 33))
    compiled = fxq.compile(tmp_path / "model", "nvfp4_weight_only")
    assert compiled.report.warnings == []
    compiled.perplexity([list(range(3, 63))])
    (warning,) = compiled.report.warnings
    assert "up to 32 tokens" in warning


def saved(name: str, path: Path) -> Path:
    """A tiny model of a family, by the name of its model type or of its class."""
    family = next(f for f in tiny.families() if name in (f.name, f.architecture))
    tiny.tiny_model(family).save_pretrained(path)
    return path


# Which families find what: opaque calls, lengths beyond the example, values no checkpoint holds.
UNUSUAL = {
    "qwen3_next": "a gated delta rule as an opaque call, at lengths that its chunks do not divide",
    "falcon_h1": "buffers that only an outer `_init_weights` fills",
    "dbrx": "a loop over the experts that `nonzero` finds",
    "jetmoe": "splits by how many tokens an expert has",
    "ernie4_5_moe": "routers that stay in float32",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_constructs_compute_the_same_at_any_length(family: str, tmp_path: Path) -> None:
    model = open_model(saved(family, tmp_path / "model"))
    eager = load(tmp_path / "model", experts_implementation="batched_mm")
    batches = [tiny.text_ids(*size, seed=n) for n, size in enumerate([(1, 1), (2, 17), (2, 100), (1, 129)])]
    assert all(model.program.accepts(*ids.shape) is None for ids in batches)
    found = simulation(model.program, model.source, CPU).run_batches(batches)
    for ids, ours in zip(batches, found, strict=True):
        with torch.no_grad():
            theirs = eager(input_ids=ids, use_cache=False).logits
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), tuple(ids.shape)


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "qwen3_next", "mamba"))],
)
def test_a_padded_batch_computes_the_same_as_eager(family: str, side: str, tmp_path: Path) -> None:
    model = open_model(saved(family, tmp_path / "model"))
    eager = load(tmp_path / "model", experts_implementation="batched_mm")
    program = trace(model.fake, padded=True)
    program.hub = model.source.hub
    ids, mask = tiny.text_ids(3, 24), torch.ones(3, 24, dtype=torch.long)
    for row, padding in ((1, 5), (2, 11)):
        mask[row, :padding] = 0
    mask = mask if side == "left" else mask.flip(1)
    assert program.accepts(3, 24) is None
    (ours,) = simulation(program, model.source, CPU).run_batches([ids], [mask])
    with torch.no_grad():
        theirs = eager(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_parameters_that_from_pretrained_keeps_in_float32_are_traced_in_it(tmp_path: Path) -> None:
    model = open_model(saved("ernie4_5_moe", tmp_path / "model"))
    eager = dict(load(tmp_path / "model").named_parameters())
    read = {str(n.target): n.meta["val"] for n in model.program.graph.nodes if n.op == "get_attr"}
    wide = {name for name, val in read.items() if val.dtype == torch.float32 and name in eager}
    assert {name.rpartition(".mlp.")[2] for name in wide} >= {"gate.weight"}
    for name in read.keys() & eager.keys():
        assert read[name].dtype == eager[name].dtype, name


@pytest.mark.slow
def test_a_loop_over_chosen_experts_reads_each_of_them(tmp_path: Path) -> None:
    model = open_model(saved("dbrx", tmp_path / "model"))
    run_passes((FuseExperts(),), model.program)
    read: dict[str, set[int]] = {}
    for matmul in weight_matmuls(model.program.graph):
        w = strip(matmul.w, VIEWS)
        if w.target is dialect.SLICE:
            read.setdefault(str(matmul.parameter.target), set()).add(int_at(w, 1))
    assert len(read) == 3 * model.fake.config.num_hidden_layers
    assert all(experts == set(range(tiny.EXPERTS)) for experts in read.values())


@pytest.mark.slow
def test_a_multimodal_checkpoint_is_the_class_its_config_names(tmp_path: Path) -> None:
    path = saved("Qwen3_5MoeForConditionalGeneration", tmp_path / "model")
    model = open_model(path)
    assert type(model.fake.model).__name__ == "Qwen3_5MoeForConditionalGeneration"
    read = {str(n.target) for n in model.program.graph.nodes if n.op == "get_attr"}
    assert not any("visual" in name for name in read)
    assert any(name.startswith("model.language_model.layers.") for name in read)
    assert any(key.startswith("model.visual.") for key in model.program.hub.tensors)
    eager = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="batched_mm"
    ).eval()
    for size in ((1, 5), (2, 40)):
        ids = tiny.text_ids(*size)
        (found,) = simulation(model.program, model.source, CPU).run_batches([ids])
        with torch.no_grad():
            assert torch.equal(found, eager(input_ids=ids, use_cache=False).logits)


def test_a_checkpoint_of_the_text_model_alone_is_that_class(tmp_path: Path) -> None:
    """Gemma 3's text config belongs to a class of its own, whole or inside of a multimodal one."""
    text_only, whole = (
        saved(name, tmp_path / name) for name in ("gemma3_text", "Gemma3ForConditionalGeneration")
    )
    assert type(open_model(text_only).fake.model).__name__ == "Gemma3ForCausalLM"
    assert type(open_model(whole).fake.model).__name__ == "Gemma3ForConditionalGeneration"


def test_a_refusal_names_the_module_and_the_line(tmp_path: Path) -> None:
    with pytest.raises(fxq.TraceError) as caught:
        _ = open_model(saved("aria_text", tmp_path / "model")).program
    message = str(caught.value)
    assert re.match(
        r"aria_text: model\.layers\.0\.mlp\.experts\.fc1 \(AriaGroupedExpertsGemm\), modeling_aria\.py:\d+: ",
        message,
    )
    assert len(message.splitlines()) <= 3
