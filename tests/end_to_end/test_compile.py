"""Real models through real specs, read back by code that shares nothing with the writer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import fxq
from fxq.model import open_model
from fxq.run.simulate import simulation
from tests import oracle, reader, reference
from tests.families import (
    DENSE,
    EXPERTS,
    FAMILIES,
    LAYERS,
    MOE,
    MOE_LAYERS,
    Zoo,
    load,
    random_model,
    samples,
    without_times,
    zoo,
)

__all__ = ["zoo"]

DEFAULT, DEFAULT_MSE = "nvfp4_default-fp8_kv", "nvfp4_default_mse-fp8_cast_kv"
EXPERTS_ONLY, EXPERTS_ONLY_MSE = "nvfp4_experts_only-fp8_cast_kv", "nvfp4_experts_only_mse-fp8_cast_kv"
WEIGHT_ONLY_MSE, MLP_ONLY = "nvfp4_weight_only_mse", "nvfp4_mlp_only_mse-fp8_cast_kv"
# Linears that are no routed experts: attention, dense and shared MLPs; not routers, not lm_head.
LINEARS = {
    "qwen3_moe": LAYERS * 4,
    "mixtral": LAYERS * 4,
    "deepseek_v3": 3 * 4 + 3 + 2 * 3,
    "llama": LAYERS * 7,
    "llama_tied": LAYERS * 7,
    "qwen3": LAYERS * 7,
    "phi3": LAYERS * 4,
}
SLOW = pytest.mark.slow
SPECS = (DEFAULT_MSE, DEFAULT, WEIGHT_ONLY_MSE, EXPERTS_ONLY, EXPERTS_ONLY_MSE, MLP_ONLY)
FAST = {(family, DEFAULT_MSE) for family in (*MOE, "llama", "phi3")}
FAST |= {("qwen3_moe", EXPERTS_ONLY_MSE), ("qwen3_moe", WEIGHT_ONLY_MSE), ("mixtral", DEFAULT)}
CASES = [
    pytest.param(family, spec, marks=() if (family, spec) in FAST else SLOW)
    for family in FAMILIES
    for spec in SPECS
    if family in MOE or spec not in (EXPERTS_ONLY, EXPERTS_ONLY_MSE)
]


class Output(NamedTuple):
    path: Path
    compiled: fxq.Compiled


Build = Callable[..., Output]


@pytest.fixture(scope="module")
def build(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """(family, spec, samples) -> what `fxq.compile` made of it, compiled once."""
    root, made = tmp_path_factory.mktemp("out"), dict[tuple[str, str, int], Output]()

    def output(family: str, spec: str, count: int = 6) -> Output:
        key = (family, spec, count)
        if key not in made:
            out = root / "-".join(map(str, key))
            calib = None if spec == WEIGHT_ONLY_MSE else samples(count)
            made[key] = Output(out, fxq.compile(zoo(family), spec, calib=calib, out=out))
        return made[key]

    return output


@pytest.mark.parametrize(("family", "spec"), CASES)
def test_the_output_keeps_the_contract(family: str, spec: str, zoo: Zoo, build: Build) -> None:
    out, compiled = build(family, spec)
    assert reader.check(out, zoo(family)) == []
    slices = 2 * EXPERTS * MOE_LAYERS.get(family, 0)
    assert compiled.report.expert_nodes == slices
    quantized = reader.read_checkpoint(out).quantized_linears()
    experts = [name for name in quantized if reader.EXPERT.fullmatch(name)]
    assert 2 * len(experts) == 3 * slices  # the fused gate_up weight is two linears of the hub
    if spec in (DEFAULT, DEFAULT_MSE, WEIGHT_ONLY_MSE):
        assert len(quantized) - len(experts) == LINEARS[family]
    elif spec == MLP_ONLY:
        assert not [name for name in quantized if "attn" in name]
    else:
        assert experts == quantized
    assert compiled.report.tensors_quantized == len(quantized)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("phi3", marks=SLOW)])
def test_calibrated_kv_scales_are_there_for_every_attention(family: str, build: Build) -> None:
    tensors = reader.read_checkpoint(build(family, DEFAULT).path).tensors
    scales = [name for name in tensors if name.endswith(("k_proj.k_scale", "v_proj.v_scale"))]
    assert len(scales) == 2 * LAYERS


@pytest.mark.parametrize("spec", [DEFAULT_MSE, EXPERTS_ONLY_MSE])
def test_cast_kv_declares_fp8_and_stores_no_scale(spec: str, build: Build) -> None:
    checkpoint = reader.read_checkpoint(build("qwen3_moe", spec).path)
    assert not [name for name in checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))]
    assert checkpoint.quant
    assert checkpoint.quant["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_weight_only_declares_w4a16_without_input_scales(build: Build) -> None:
    checkpoint = reader.read_checkpoint(build("qwen3_moe", WEIGHT_ONLY_MSE).path)
    assert checkpoint.config
    assert checkpoint.config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    assert not [name for name in checkpoint.tensors if name.endswith(".input_scale")]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_routers_heads_and_embeddings_stay_as_they_were(family: str, zoo: Zoo, build: Build) -> None:
    out, source = (reader.read_checkpoint(p) for p in (build(family, DEFAULT_MSE).path, zoo(family)))
    kept = [
        n
        for n in source.tensors
        if "lm_head" in n or "embed" in n or n.endswith(("mlp.gate.weight", "norm.weight"))
    ]
    assert kept
    for name in kept:
        assert out.raw(name).tobytes() == source.raw(name).tobytes(), name


def test_multi_token_prediction_layers_pass_through_untouched(zoo: Zoo, build: Build) -> None:
    out, source = (
        reader.read_checkpoint(p) for p in (build("deepseek_v3", DEFAULT_MSE).path, zoo("deepseek_v3"))
    )
    extra = [name for name in source.tensors if name.startswith("model.layers.3.")]
    assert len(extra) == 3 + 3 * EXPERTS + 2
    for name in extra:
        assert out.raw(name).tobytes() == source.raw(name).tobytes(), name
    config = out.config or {}
    assert {n.removesuffix(".weight") for n in extra if len(source.tensors[n].shape) == 2} <= set(
        config["quantization_config"]["ignore"]
    )


def test_q_k_and_v_share_the_scale_of_the_largest(zoo: Zoo, build: Build) -> None:
    out, source = (reader.read_checkpoint(p) for p in (build("llama", DEFAULT_MSE).path, zoo("llama")))
    amaxes = set()
    for layer in range(LAYERS):
        names = [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
        amax = max(float(np.abs(source.array(f"{n}.weight")).max()) for n in names)
        amaxes.add(amax)
        for name in names:
            assert out.array(f"{name}.weight_scale_2") == reference.weight_scale_2(amax)
        assert len({float(out.array(f"{n}.input_scale")) for n in names}) == 1
    assert len(amaxes) == LAYERS


def test_gate_and_up_of_an_expert_share_the_scale_of_the_larger(zoo: Zoo, build: Build) -> None:
    out, source = (reader.read_checkpoint(p) for p in (build("mixtral", DEFAULT).path, zoo("mixtral")))
    for expert in range(EXPERTS):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{p}" for p in ("w1", "w3")]
        amax = max(float(np.abs(source.array(f"{n}.weight")).max()) for n in names)
        assert [out.array(f"{n}.weight_scale_2") for n in names] == [reference.weight_scale_2(amax)] * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_searched_scales_are_the_best_of_all_126(family: str, zoo: Zoo, build: Build) -> None:
    out, source = (reader.read_checkpoint(p) for p in (build(family, DEFAULT_MSE).path, zoo(family)))
    for name in out.quantized_linears():
        w = source.array(f"{name}.weight").astype(np.float64)
        amax = float(out.array(f"{name}.weight_scale_2")) * 2688
        codes = out.array(f"{name}.weight_scale")
        scale_2 = float(out.array(f"{name}.weight_scale_2"))
        best = _brute_force(w, scale_2)
        error = np.square(w - out.dequantize(name).astype(np.float64)).reshape(len(w), -1, 16).sum(-1)
        assert (error <= best * (1 + 1e-5) + 1e-30).all(), name
        assert codes.shape == best.shape
        assert amax > 0


def _brute_force(w: Any, scale_2: float) -> Any:
    """float64 [N, K/16]: the least squared error of each block over all positive e4m3 scales."""
    blocks = np.abs(w).reshape(len(w), -1, 1, 16)
    grid = reference.E2M1[:, None] * (reference.POSITIVE_E4M3 * scale_2)
    best = np.full(blocks.shape[:2], np.inf)
    for column in grid.T:
        nearest = np.abs(blocks - column[:, None]).min(2)
        best = np.minimum(best, np.square(nearest).sum(-1))
    return best


@pytest.mark.parametrize(
    ("family", "spec"),
    [("qwen3_moe", EXPERTS_ONLY_MSE), pytest.param("deepseek_v3", DEFAULT_MSE, marks=SLOW)],
)
def test_weights_do_not_depend_on_how_much_data_calibrated_them(family: str, spec: str, build: Build) -> None:
    few, many = (reader.read_checkpoint(build(family, spec, n).path) for n in (2, 24))
    for name in few.quantized_linears():
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            assert few.raw(f"{name}.{suffix}").tobytes() == many.raw(f"{name}.{suffix}").tobytes(), name
    inputs = [n for n in few.tensors if n.endswith(".input_scale")]
    assert any(few.raw(n).tobytes() != many.raw(n).tobytes() for n in inputs)
    assert all(float(few.array(n)) > 0 for n in inputs)


def test_two_samples_leave_dead_experts_and_they_get_scales_all_the_same(build: Build) -> None:
    out, compiled = build("qwen3_moe", EXPERTS_ONLY_MSE, 2)
    assert compiled.report.experts == EXPERTS * MOE_LAYERS["qwen3_moe"]
    assert len(reader.read_checkpoint(out).quantized_linears()) == 3 * EXPERTS * MOE_LAYERS["qwen3_moe"]


def test_one_token_of_calibration_is_enough(zoo: Zoo, tmp_path: Path) -> None:
    compiled = fxq.compile(zoo("qwen3_moe"), EXPERTS_ONLY, calib=[[5]], out=tmp_path / "out")
    assert reader.check(tmp_path / "out", zoo("qwen3_moe")) == []
    # One token reaches two of eight experts in each of two layers.
    assert compiled.report.dead_experts == (EXPERTS - 2) * LAYERS


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek_v3", marks=SLOW)])
def test_without_data_expert_weights_are_bit_identical(
    family: str, zoo: Zoo, build: Build, tmp_path: Path
) -> None:
    spec = tmp_path / "bootstrap_only.yaml"
    spec.write_text(
        "passes:\n  - fuse-experts\n  - quantize-experts: {weights: nvfp4, inputs: nvfp4}\n  - sync-groups\n"
        "  - calibrate-bootstrap\n  - calibrate-mse\n  - lower: {format: modelopt}\n"
    )
    compiled = fxq.compile(zoo(family), spec, out=tmp_path / "out")
    assert compiled.report.warnings, "constants stand in for input amaxes: the user is told"
    assert reader.check(tmp_path / "out", zoo(family)) == []
    blind, seeing = (
        reader.read_checkpoint(p) for p in (tmp_path / "out", build(family, EXPERTS_ONLY_MSE).path)
    )
    assert blind.quantized_linears() == seeing.quantized_linears()
    for name in seeing.quantized_linears():
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            assert blind.raw(f"{name}.{suffix}").tobytes() == seeing.raw(f"{name}.{suffix}").tobytes(), name


def _files(directory: Path) -> dict[str, bytes]:
    files = {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }
    return without_times(files)


IN_MEMORY = [pytest.param(f, marks=() if f == "qwen3_moe" else SLOW) for f in FAMILIES]


@pytest.mark.parametrize("family", IN_MEMORY)
def test_a_live_model_gives_the_files_of_its_directory_and_is_left_alone(
    family: str, zoo: Zoo, build: Build, tmp_path: Path
) -> None:
    model = load(zoo(family)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    private = dict(vars(model.config))
    fxq.compile(model, DEFAULT_MSE, calib=samples(6), out=tmp_path / "out")
    assert _files(tmp_path / "out") == _files(build(family, DEFAULT_MSE).path)
    assert model.config.to_dict() == config.to_dict()
    assert vars(model.config) == private
    assert model.generation_config.to_dict() == generation.to_dict()
    assert model.training
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert {n: t.data_ptr() for n, t in after.items()} == pointers
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not [p for p in model.parameters() if p.grad is not None]


@SLOW
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_model_that_was_never_saved_compiles_to_the_same_tensors(
    family: str, build: Build, tmp_path: Path
) -> None:
    model = random_model(FAMILIES[family]())
    fxq.compile(model, EXPERTS_ONLY_MSE, calib=samples(6), out=tmp_path / "out")
    assert reader.check(tmp_path / "out") == []
    ours, theirs = (
        reader.read_checkpoint(p) for p in (tmp_path / "out", build(family, EXPERTS_ONLY_MSE).path)
    )
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        assert ours.raw(name).tobytes() == theirs.raw(name).tobytes(), name
    assert ours.config
    assert ours.config["architectures"] == [type(model).__name__]


def test_the_source_directory_is_left_alone(zoo: Zoo, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in zoo("qwen3").rglob("*")}
    fxq.compile(zoo("qwen3"), WEIGHT_ONLY_MSE, out=tmp_path / "out")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in zoo("qwen3").rglob("*")} == before


def _logits(model: PreTrainedModel, seed: int = 3) -> torch.Tensor:
    ids = torch.tensor(samples(2, 24, seed))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double().flatten(0, 1)


@pytest.mark.parametrize(("family", "spec"), CASES)
def test_the_dequantized_model_loads_and_speaks_like_its_source(
    family: str, spec: str, zoo: Zoo, build: Build, tmp_path: Path
) -> None:
    twin = load(oracle.dequantized_model(build(family, spec).path, tmp_path / "dequantized"))
    ours, theirs = _logits(twin), _logits(load(zoo(family)))
    similarity = torch.nn.functional.cosine_similarity(ours, theirs)
    # 4 bits through 2 or 3 layers; where noise flips a router's choice single tokens differ more.
    assert similarity.median() > 0.93
    text = samples(4, 24, seed=5)
    before, after = oracle.perplexity(zoo(family), text), oracle.perplexity(tmp_path / "dequantized", text)
    assert abs(np.log(after / before)) < 0.3


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("llama", marks=SLOW)])
def test_perplexity_of_the_simulation_is_that_of_the_written_files(
    family: str, zoo: Zoo, build: Build, tmp_path: Path
) -> None:
    out, compiled = build(family, WEIGHT_ONLY_MSE)
    text = samples(6, 24, seed=11)
    before, after = compiled.perplexity(text)
    work = oracle.dequantized_model(out, tmp_path / "dequantized")
    assert before == pytest.approx(oracle.perplexity(zoo(family), text), rel=5e-3)
    assert after == pytest.approx(oracle.perplexity(work, text), rel=5e-3)
    assert before != after
    assert (compiled.report.perplexity_before, compiled.report.perplexity_after) == (before, after)


def test_perplexity_with_quantized_inputs_and_kv_is_near_the_source(build: Build) -> None:
    before, after = build("mixtral", DEFAULT).compiled.perplexity(samples(4, 24, seed=2))
    assert abs(np.log(after / before)) < 0.3


def test_saving_twice_gives_the_same_files(build: Build, tmp_path: Path) -> None:
    out, compiled = build("qwen3_moe", EXPERTS_ONLY_MSE)
    compiled.save(tmp_path / "again")
    assert _files(tmp_path / "again") == _files(out)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek_v3", marks=SLOW)])
def test_the_number_of_threads_changes_no_byte(family: str, zoo: Zoo, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            fxq.compile(zoo(family), DEFAULT, calib=samples(6), out=out)
    finally:
        torch.set_num_threads(before)
    assert _files(tmp_path / "1") == _files(tmp_path / "2")


def test_the_report_measures_what_the_files_show(zoo: Zoo, build: Build) -> None:
    out, compiled = build("qwen3_moe", EXPERTS_ONLY_MSE)
    report = compiled.report
    assert report.sqnr_db == pytest.approx(reader.sqnr_db(out, zoo("qwen3_moe")), abs=1e-3)
    assert report.expert_sqnr_db == pytest.approx(report.sqnr_db or 0, abs=1e-9)
    shards = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert report.output_bytes
    assert 0 <= shards - report.output_bytes < 100_000
    assert report.bits_per_weight == pytest.approx(4.5, abs=0.1)
    assert report.dead_experts == 0
    json.dumps(report.as_dict())


def test_searching_scales_never_costs_quality(zoo: Zoo, build: Build) -> None:
    largest, searched = (build("mixtral", spec) for spec in (DEFAULT, DEFAULT_MSE))
    assert (searched.compiled.report.sqnr_db or 0) > (largest.compiled.report.sqnr_db or 0)


def test_scales_are_read_only_and_named_after_amax_nodes(build: Build) -> None:
    compiled = build("qwen3_moe", EXPERTS_ONLY_MSE).compiled
    scales: Mapping[str, torch.Tensor] = compiled.scales
    names = {node.name for node in compiled.graph.nodes}
    assert scales
    assert set(scales) <= names
    assert all(value.shape == () and bool(torch.isfinite(value)) for value in scales.values())
    with pytest.raises(TypeError):
        scales["new"] = torch.tensor(0.0)  # type: ignore[index]


def test_generation_config_of_the_output_loads(build: Build) -> None:
    assert GenerationConfig.from_pretrained(build("llama", DEFAULT_MSE).path).eos_token_id == 1


@pytest.mark.parametrize("family", DENSE[:1])
def test_an_experts_only_spec_refuses_a_model_without_experts(family: str, zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(fxq.VerifyError, match="quantize-experts rewrote nothing"):
        fxq.compile(zoo(family), EXPERTS_ONLY, calib=samples(2), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_live_model_cast_as_a_whole_is_traced_with_its_buffers_cast() -> None:
    """`.to(bfloat16)` also casts rotary frequencies, which from_pretrained keeps in float32."""
    model = random_model(FAMILIES["llama"]())
    torch.nn.Module.to(model, torch.float32)
    torch.nn.Module.to(model, torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    ids = torch.tensor([samples(1)[0]])
    opened = open_model(model)
    (ours,) = simulation(opened.program, opened.source, torch.device("cpu")).run_batches([ids])
    with torch.no_grad():
        assert torch.equal(ours, model(input_ids=ids, use_cache=False).logits)
