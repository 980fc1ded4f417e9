"""`fxq verify`: good checkpoints of many kinds have no errors, each kind of damage is found as what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxq
from fxq.audit import RULES, Findings, verify_checkpoint
from fxq.cli.main import main
from fxq.errors import CheckpointError, SourceError
from tests import tiny
from tests.families import Zoo, add_tensors, drop_tensors, samples, zoo

__all__ = ["zoo"]

SLOW = pytest.mark.slow
DEFAULT, EXPERTS_ONLY, WEIGHT_ONLY = (
    "nvfp4_default-fp8_kv",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_weight_only",
)
COMPRESSED = "compressed-tensors"
EXPERT = "model.layers.1.mlp.experts.3"
ATTENTION = "model.layers.0.self_attn"
Json = dict[str, Any]


def compiled(source: Path, spec: str, out: Path, **options: Any) -> Path:
    """What fxq makes of a model, with a tokenizer's file so that nothing is missing."""
    made = fxq.compile(source, spec, calib=None if spec == WEIGHT_ONLY else samples(4))
    made.save(out, **options)
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def good(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint with everything quantized and calibrated KV scales."""
    return compiled(zoo("qwen3_moe"), DEFAULT, tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """The good checkpoint, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def rules(findings: Findings) -> set[str]:
    """The errors and warnings found."""
    return {item.rule for item in (*findings.errors, *findings.warnings)}


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3_moe", EXPERTS_ONLY),
        ("qwen3_moe", WEIGHT_ONLY),
        ("deepseek_v3", DEFAULT),
        pytest.param("mixtral", DEFAULT, marks=SLOW),
        pytest.param("mixtral", EXPERTS_ONLY, marks=SLOW),
        ("llama_tied", DEFAULT),
        pytest.param("phi3", DEFAULT, marks=SLOW),
    ],
)
def test_what_fxq_writes_is_good(family: str, spec: str, zoo: Zoo, tmp_path: Path) -> None:
    findings = verify_checkpoint(compiled(zoo(family), spec, tmp_path / "out"), zoo(family))
    assert not rules(findings), findings.groups()
    assert findings.summary["sqnr_db"] > 18
    assert findings.summary["compared"] == sum(findings.summary["linears"].values())


@pytest.mark.parametrize(
    "family",
    [
        "gpt_oss",
        pytest.param("llama4_text", marks=SLOW),
        pytest.param("granitemoe", marks=SLOW),
        pytest.param("dbrx", marks=SLOW),
        pytest.param("jetmoe", marks=SLOW),
        pytest.param("gpt2", marks=SLOW),
        pytest.param("nemotron_h", marks=SLOW),
        pytest.param("qwen3_next", marks=SLOW),
    ],
)
def test_other_layouts_are_good(family: str, tmp_path: Path) -> None:
    """Experts in one tensor, along either axis, with and without biases; linears held transposed."""
    kind = next(f for f in tiny.families() if f.name == family)
    tiny.tiny_model(kind).save_pretrained(tmp_path / "source")
    made = fxq.compile(tmp_path / "source", DEFAULT, calib=[list(range(3, 40))], allow_partial=True)
    made.save(tmp_path / "out")
    findings = verify_checkpoint(tmp_path / "out", tmp_path / "source")
    assert rules(findings) == {"tokenizer-missing"}, findings.groups()
    assert findings.summary["worst_sqnr_db"] > 18


def test_shards_and_their_index_are_good(zoo: Zoo, tmp_path: Path) -> None:
    out = compiled(zoo("qwen3_moe"), WEIGHT_ONLY, tmp_path / "out", shard_bytes=40_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert not rules(verify_checkpoint(out, zoo("qwen3_moe")))


@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("deepseek_v3", marks=SLOW), pytest.param("llama_tied", marks=SLOW)]
)
def test_what_fxq_writes_as_compressed_tensors_is_good(family: str, zoo: Zoo, tmp_path: Path) -> None:
    fxq.compile(zoo(family), DEFAULT, calib=samples(4), out=tmp_path / "out", format=COMPRESSED)
    findings = verify_checkpoint(tmp_path / "out", zoo(family))
    assert rules(findings) == {"tokenizer-missing"}, findings.groups()
    assert findings.summary["format"] == COMPRESSED
    assert findings.summary["worst_sqnr_db"] > 18


@pytest.mark.parametrize("spec", ["nvfp4_experts_fp8_rest_mse-fp8_kv", "nvfp4_mlp_fp8_attention_mse-fp8_kv"])
@pytest.mark.parametrize(
    "family", [pytest.param("qwen3_moe", marks=SLOW), pytest.param("deepseek_v3", marks=SLOW), "mixtral"]
)
def test_what_fxq_mixes_is_good(family: str, spec: str, zoo: Zoo, tmp_path: Path) -> None:
    findings = verify_checkpoint(compiled(zoo(family), spec, tmp_path / "out"), zoo(family))
    assert not rules(findings), findings.groups()
    assert set(findings.summary["linears"]) == {"NVFP4", "FP8"}
    assert findings.summary["worst_sqnr_db"] > 18


Damage = Callable[[Path], object]


def edit(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """A damage: one tensor changed."""

    def damage(path: Path) -> None:
        add_tensors(path, {name: change(load_file(path / "model.safetensors")[name])})

    return damage


def edit_all(suffix: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """A damage: every tensor of that suffix changed."""

    def damage(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        add_tensors(path, {name: change(t) for name, t in tensors.items() if name.endswith(suffix)})

    return damage


def put(name: str, tensor: Tensor) -> Damage:
    """A damage: one tensor added or replaced."""
    return lambda path: add_tensors(path, {name: tensor})


def drop(*names: str) -> Damage:
    """A damage: tensors removed."""
    return lambda path: drop_tensors(path, *names)


def byte(code: int) -> Callable[[Tensor], Tensor]:
    """One element of an FP8 tensor replaced."""

    def change(scales: Tensor) -> Tensor:
        codes = scales.view(torch.uint8).clone()
        codes[1, 1] = code
        return codes.view(torch.float8_e4m3fn)

    return change


def config(change: Callable[[Json], None], file: str = "config.json") -> Damage:
    """A damage: a config file's quantization changed."""

    def damage(path: Path) -> None:
        whole = json.loads((path / file).read_text())
        change(whole["quantization_config" if file == "config.json" else "quantization"])
        (path / file).write_text(json.dumps(whole))

    return damage


def both(change: Callable[[list[str]], None]) -> Damage:
    """A damage: both exclude lists changed alike."""

    def damage(path: Path) -> None:
        config(lambda c: change(c["ignore"]))(path)
        config(lambda c: change(c["exclude_modules"]), "hf_quant_config.json")(path)

    return damage


def source_config(path: Path) -> None:
    """A damage: a sub-config that kept the source's quantization."""
    whole = json.loads((path / "config.json").read_text())
    whole["text_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(whole))


def cut_off(path: Path) -> None:
    """A damage: the end of a shard is missing."""
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1000])


def double(tensor: Tensor) -> Tensor:
    """Twice the values."""
    return tensor * 2


SCALE = f"{EXPERT}.up_proj.weight_scale"
SCALE_2 = f"{EXPERT}.up_proj.weight_scale_2"
INPUT = f"{EXPERT}.down_proj.input_scale"
GATE_1 = "model.layers.1.mlp.gate"
# kind of damage -> what does it, the errors and warnings that it is, and where the first of them is
BROKEN: dict[str, tuple[Damage, set[str], str]] = {
    "a NaN block scale": (edit(SCALE, byte(0x7F)), {"scale-value"}, SCALE),
    "a negative NaN block scale": (edit(SCALE, byte(0xFF)), {"scale-value"}, SCALE),
    "a zero block scale": (edit(SCALE, byte(0)), {"scale-value"}, SCALE),
    "a negative block scale": (edit(SCALE, byte(0x90)), {"scale-value"}, SCALE),
    "a zero input scale": (
        edit(INPUT, torch.zeros_like),
        {"scale-value", "experts-input-scale"},
        INPUT,
    ),
    "an infinite global scale": (
        edit(SCALE_2, lambda t: t / 0),
        {"scale-value", "group-weight-scale"},
        SCALE_2,
    ),
    "block scales of another dtype": (edit(SCALE, lambda t: t.bfloat16()), {"tensor-dtype"}, SCALE),
    "block scales of another shape": (edit(SCALE, lambda t: t[:, :-1].clone()), {"tensor-shape"}, SCALE),
    "swizzled block scales": (edit(SCALE, lambda t: t.reshape(-1)), {"tensor-shape"}, SCALE),
    "packed weights of another dtype": (
        edit(f"{EXPERT}.up_proj.weight", lambda t: t.view(torch.int8)),
        {"tensor-dtype"},
        f"{EXPERT}.up_proj.weight",
    ),
    "a K that is no multiple of 16": (
        edit(f"{EXPERT}.up_proj.weight", lambda t: t[:, :-4].clone()),
        {"tensor-shape"},
        SCALE,
    ),
    "a global scale for each row": (
        edit(SCALE_2, lambda t: t.repeat(32)),
        {"tensor-shape"},
        SCALE_2,
    ),
    "a missing global scale": (drop(SCALE_2), {"part-missing"}, SCALE_2),
    "missing block scales": (drop(SCALE), {"part-missing"}, SCALE),
    "one missing input scale": (drop(INPUT), {"input-scale-missing"}, INPUT),
    "a scale of no linear": (put("model.norm.input_scale", torch.tensor(1.0)), {"part-extra"}, "model.norm"),
    "an AWQ scale": (
        put(f"{EXPERT}.up_proj.pre_quant_scale", torch.ones(64)),
        {"part-extra"},
        f"{EXPERT}.up_proj.pre_quant_scale",
    ),
    "a bias of another length": (
        put(f"{ATTENTION}.q_proj.bias", torch.ones(7).bfloat16()),
        {"tensor-shape"},
        f"{ATTENTION}.q_proj.bias",
    ),
    "FP8 without scales": (
        put("model.layers.0.extra.weight", torch.ones(16, 16).to(torch.float8_e4m3fn)),
        {"tensor-unknown"},
        "model.layers.0.extra.weight",
    ),
    "an inverted global scale": (
        edit(f"{ATTENTION}.o_proj.weight_scale_2", lambda t: 1 / t),
        {"scale-reciprocal"},
        f"{ATTENTION}.o_proj.weight_scale_2",
    ),
    "inverted scales of all inputs": (
        edit_all(".input_scale", lambda t: 1 / t),
        {"scale-reciprocal"},
        INPUT,
    ),
    "one inverted input scale": (
        edit(f"{ATTENTION}.o_proj.input_scale", lambda t: 1 / t),
        {"scale-reciprocal"},
        f"{ATTENTION}.o_proj.input_scale",
    ),
    "zero weights": (
        edit(f"{EXPERT}.up_proj.weight", torch.zeros_like),
        {"weights-zero"},
        f"{EXPERT}.up_proj.weight",
    ),
    "saturated weights": (
        edit(f"{EXPERT}.up_proj.weight", lambda t: torch.full_like(t, 0xF7)),
        {"codes-saturated"},
        f"{EXPERT}.up_proj.weight",
    ),
    "q unlike k and v": (
        edit(f"{ATTENTION}.q_proj.weight_scale_2", double),
        {"group-weight-scale"},
        f"{ATTENTION}.k_proj.weight_scale_2",
    ),
    "up unlike gate": (edit(SCALE_2, double), {"group-weight-scale"}, SCALE_2),
    "an input scale unlike its group's": (
        edit(f"{ATTENTION}.v_proj.input_scale", double),
        {"group-input-scale"},
        f"{ATTENTION}.v_proj.input_scale",
    ),
    "an expert's input scale unlike the others'": (
        edit(INPUT, double),
        {"experts-input-scale"},
        INPUT,
    ),
    "k left in bf16": (
        lambda path: [
            drop(f"{ATTENTION}.k_proj.weight_scale", f"{ATTENTION}.k_proj.weight_scale_2")(path),
            drop(f"{ATTENTION}.k_proj.input_scale")(path),
            put(f"{ATTENTION}.k_proj.weight", torch.ones(32, 64).bfloat16())(path),
            both(lambda e: e.append(f"{ATTENTION}.k_proj"))(path),
        ],
        {"group-partial"},
        f"{ATTENTION}.k_proj",
    ),
    "a lost expert": (
        lambda path: drop(
            *(
                f"{EXPERT}.{p}_proj.{s}"
                for p in ("gate", "up", "down")
                for s in ("weight", "weight_scale", "weight_scale_2", "input_scale")
            )
        )(path),
        {"experts-incomplete"},
        "model.layers.1.mlp.experts",
    ),
    "a router that is not excluded": (both(lambda e: e.remove(GATE_1)), {"exclude-missing"}, GATE_1),
    "a quantized linear that is excluded": (
        both(lambda e: e.append(f"{ATTENTION}.o_proj")),
        {"exclude-quantized"},
        f"{ATTENTION}.o_proj",
    ),
    "an entry inside a quantized name": (
        both(lambda e: e.append("model.layers.0.self_attn.o")),
        {"exclude-quantized", "exclude-unknown"},
        f"{ATTENTION}.o_proj",
    ),
    "a wildcard over everything": (both(lambda e: e.append("*.experts*")), {"exclude-quantized"}, ""),
    "an exclusion by its parent": (
        both(lambda e: e.__setitem__(e.index("lm_head"), "lm_hea")),
        {"exclude-unportable", "exclude-unknown"},
        "lm_head",
    ),
    "an exclusion of nothing": (
        both(lambda e: e.append("model.layers.9.mlp.gate")),
        {"exclude-unknown"},
        "exclude list: model.layers.9",
    ),
    "lists that differ": (
        config(lambda c: c["ignore"].append("model.norm")),
        {"config-disagree"},
        "exclude list: model.norm",
    ),
    "algorithms that differ": (
        config(lambda c: c.update(quant_algo="FP8"), "hf_quant_config.json"),
        {"config-disagree"},
        "quant_algo",
    ),
    "an unknown algorithm": (
        config(lambda c: c.update(quant_algo="NVFP5"), "hf_quant_config.json"),
        {"config-key", "config-disagree"},
        "hf_quant_config.json",
    ),
    "another group size": (
        config(lambda c: c.update(group_size=32), "hf_quant_config.json"),
        {"config-key"},
        "hf_quant_config.json: quantization.group_size",
    ),
    "a missing key": (
        config(lambda c: c.pop("kv_cache_quant_algo"), "hf_quant_config.json"),
        {"config-key", "config-disagree"},
        "hf_quant_config.json: quantization.kv_cache_quant_algo",
    ),
    "8-bit groups": (
        config(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8)),
        {"config-groups"},
        "config.json: quantization_config.group_0.weights",
    ),
    "one config file": (
        lambda path: (path / "hf_quant_config.json").unlink(),
        {"config-one-file"},
        "hf_quant_config.json",
    ),
    "a config that is no JSON": (
        lambda path: [(path / "hf_quant_config.json").write_text("{")][1:],
        {"json-invalid", "config-one-file"},
        "hf_quant_config.json",
    ),
    "a source's quantization config": (source_config, {"config-stray"}, "config.json: text_config"),
    "KV scales without a declaration": (
        lambda path: [
            config(lambda c: c.pop("kv_cache_scheme"))(path),
            config(lambda c: c.update(kv_cache_quant_algo=None), "hf_quant_config.json")(path),
        ],
        {"kv-undeclared"},
        f"{ATTENTION}.k_proj.k_scale",
    ),
    "k_scale without v_scale": (
        drop(f"{ATTENTION}.v_proj.v_scale"),
        {"kv-incomplete"},
        f"{ATTENTION}.v_scale",
    ),
    "an attention without KV scales": (
        drop(f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"),
        {"kv-incomplete"},
        ATTENTION,
    ),
    "a KV scale of zero": (
        edit(f"{ATTENTION}.k_proj.k_scale", torch.zeros_like),
        {"scale-value"},
        f"{ATTENTION}.k_proj.k_scale",
    ),
    "a shard that is cut off": (cut_off, {"header-invalid"}, "model.safetensors"),
    "a second shard without an index": (
        lambda path: save_file({"x": torch.ones(1)}, path / "more.safetensors"),
        {"index-missing"},
        "model.safetensors.index.json",
    ),
    "a tensor in two shards": (
        lambda path: [
            save_file({"model.norm.weight": torch.ones(64)}, path / "more.safetensors"),
            index(path, **{"model.norm.weight": "more.safetensors"}),  # type: ignore[func-returns-value]
        ],
        {"tensor-twice"},
        "model.norm.weight",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), {"tokenizer-missing"}, "model"),
    "weights in another format": (
        lambda path: (path / "pytorch_model.bin").touch(),
        {"weights-stray"},
        "pytorch_model.bin",
    ),
}


def index(path: Path, **changes: str | None) -> None:
    """An index of the directory's shards; `changes` puts tensors elsewhere, or leaves them out."""
    places: dict[str, str | None] = {}
    for shard in sorted(path.glob("*.safetensors"), reverse=True):
        places |= dict.fromkeys(load_file(shard), shard.name)
    places = {name: shard for name, shard in (places | changes).items() if shard is not None}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("kind", BROKEN)
def test_damage_is_found_and_is_all_that_is_found(kind: str, copy: Path) -> None:
    damage, expected, where = BROKEN[kind]
    damage(copy)
    findings = verify_checkpoint(copy)
    cut = kind == "a shard that is cut off"  # what was cut off is missing then, too
    assert rules(findings) == expected or (cut and expected <= rules(findings)), findings.groups()
    first = [item for item in findings if item.rule in expected]
    assert any(item.where.startswith(where) for item in first), first


def test_a_massive_activation_is_no_inverse(copy: Path) -> None:
    edit(f"{ATTENTION}.o_proj.input_scale", lambda t: torch.full_like(t, 1.26))(copy)
    findings = verify_checkpoint(copy)
    assert not rules(findings), findings.groups()
    (outlier,) = (item for item in findings if item.rule == "input-outlier")
    assert outlier.where == f"{ATTENTION}.o_proj.input_scale"
    assert outlier.message.startswith("an amax of 3386.88, the median is ")


def test_all_input_scales_missing_fold_into_few_lines(copy: Path) -> None:
    inputs = [name for name in load_file(copy / "model.safetensors") if name.endswith("input_scale")]
    drop(*inputs)(copy)
    findings = verify_checkpoint(copy)
    assert len(findings.errors) == len(inputs) == 56
    assert rules(findings) == {"input-scale-missing"}
    assert {(g.pattern, g.count) for g in findings.groups()} >= {
        ("model.layers.*.mlp.experts.*.up_proj.input_scale", 16)
    }


def test_a_quantized_latent_is_a_doubt(zoo: Zoo, tmp_path: Path) -> None:
    """Other tools quantize MLA's kv_b_proj, which engines absorb."""
    out = compiled(zoo("deepseek_v3"), DEFAULT, tmp_path / "out")
    kv_b, o = "model.layers.0.self_attn.kv_b_proj", "model.layers.0.self_attn.o_proj"
    tensors = load_file(out / "model.safetensors")
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        put(f"{kv_b}.{suffix}", tensors[f"{o}.{suffix}"])(out)
    both(lambda e: e.remove(kv_b))(out)
    assert rules(verify_checkpoint(out)) == {"latent-quantized"}


def test_an_index_is_held_against_the_shards(copy: Path) -> None:
    index(copy, **{"model.norm.weight": "other.safetensors", "lm_head.weight": None})
    found = {(item.rule, item.where) for item in verify_checkpoint(copy).errors}
    assert found == {("index-wrong", "model.norm.weight"), ("index-unlisted", "lm_head.weight")}
    index(copy)
    save_file({"x": torch.ones(1)}, copy / "more.safetensors")
    assert rules(verify_checkpoint(copy)) == {"shard-orphan"}


def test_scalars_may_have_one_dimension(copy: Path) -> None:
    edit(SCALE_2, lambda t: t.reshape(1))(copy)
    assert not rules(verify_checkpoint(copy))


# Against the base.


def test_the_base_finds_changed_lost_and_added_tensors(copy: Path, zoo: Zoo) -> None:
    edit("model.norm.weight", lambda t: torch.nextafter(t, t + 1))(copy)
    drop("model.layers.0.input_layernorm.weight")(copy)
    put("model.rotary.inv_freq", torch.ones(8))(copy)
    edit("lm_head.weight", lambda t: t.float())(copy)
    found = {(item.rule, item.where) for item in verify_checkpoint(copy, zoo("qwen3_moe"))}
    assert found >= {
        ("base-changed", "model.norm.weight"),
        ("base-lost", "model.layers.0.input_layernorm.weight"),
        ("base-added", "model.rotary.inv_freq"),
        ("base-changed", "lm_head.weight"),
        ("dtype-mixed", "lm_head"),
    }


@pytest.mark.parametrize(
    "damage",
    {
        "swapped nibbles": edit(f"{EXPERT}.up_proj.weight", lambda t: t << 4 | t >> 4),
        "a wrong order of rows": edit(f"{EXPERT}.up_proj.weight", lambda t: t.roll(1, 0)),
        "block scales of other rows": edit(SCALE, lambda t: t.view(torch.uint8).roll(1, 0).view(t.dtype)),
        "a doubled global scale": edit(SCALE_2, double),
        "a NaN": edit(SCALE, byte(0x7F)),
        "zeros": edit(f"{EXPERT}.up_proj.weight", torch.zeros_like),
    }.items(),
    ids=lambda item: item[0],
)
def test_weights_that_decode_to_something_else_are_found(
    damage: tuple[str, Damage], copy: Path, zoo: Zoo
) -> None:
    damage[1](copy)
    findings = verify_checkpoint(copy, zoo("qwen3_moe"))
    broken = [item.where for item in findings if item.rule == "error-broken"]
    assert broken == [f"{EXPERT}.up_proj.weight"]


def test_an_error_between_good_and_broken_is_a_warning(copy: Path, zoo: Zoo) -> None:
    edit(SCALE_2, lambda t: t * 1.2)(copy)
    findings = verify_checkpoint(copy, zoo("qwen3_moe"))
    assert [i.where for i in findings if i.rule == "error-large"] == [f"{EXPERT}.up_proj.weight"]
    assert findings.summary["worst"] == f"{EXPERT}.up_proj"


def test_an_fp8_base_is_decoded(zoo: Zoo, tmp_path: Path) -> None:
    """128 x 128 blocks with weight_scale_inv, as DeepSeek-V3 is published."""
    source = Path(shutil.copytree(zoo("llama"), tmp_path / "fp8"))
    weights = load_file(source / "model.safetensors")
    plain = Path(shutil.copytree(source, tmp_path / "plain"))
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        scale = weights[name].float().abs().amax().reshape(1, 1) / 448
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
        add_tensors(plain, {name: (weights[name].float() * scale).bfloat16()})
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out = compiled(plain, WEIGHT_ONLY, tmp_path / "out")
    findings = verify_checkpoint(out, source)
    assert not rules(findings), findings.groups()
    assert findings.summary["worst_sqnr_db"] > 18


def test_a_base_with_stacked_experts_is_compared(tmp_path: Path, good: Path, zoo: Zoo) -> None:
    source = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "stacked"))
    weights = load_file(source / "model.safetensors")
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        parts = {
            p: torch.stack([weights.pop(f"{layer}.{e}.{p}_proj.weight") for e in range(8)])
            for p in ("gate", "up", "down")
        }
        weights[f"{layer}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), 1)
        weights[f"{layer}.down_proj"] = parts["down"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    findings = verify_checkpoint(good, source)
    assert not rules(findings), findings.groups()
    assert findings.summary["compared"] == 56


def test_a_base_in_another_quantization_is_said_to_be_not_compared(
    tmp_path: Path, good: Path, zoo: Zoo
) -> None:
    source = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "int8"))
    put(f"{ATTENTION}.q_proj.weight", torch.ones(64, 64, dtype=torch.int8))(source)
    assert rules(verify_checkpoint(good, source)) == {"base-uncompared"}


# Other producers and schemes.


@pytest.fixture
def packed(good: Path, tmp_path: Path) -> Path:
    """compressed-tensors made by hand from the good checkpoint: divisors, other names, one config."""
    path = Path(shutil.copytree(good, tmp_path / "packed"))
    made = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and tensor.dtype == torch.uint8:
            made[f"{module}.weight_packed"] = tensor
        elif suffix in ("weight_scale_2", "input_scale"):
            renamed = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[suffix]
            made[f"{module}.{renamed}"] = (1 / tensor).reshape(1)
        else:
            made[name.replace("k_proj.k_scale", "k_scale").replace("v_proj.v_scale", "v_scale")] = tensor
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((path / "config.json").read_text())
    floats: Json = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16}
    floats |= {"strategy": "tensor_group", "dynamic": False}
    whole["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": floats,
                "input_activations": {**floats, "dynamic": "local"},
            }
        },
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    (path / "config.json").write_text(json.dumps(whole))
    (path / "hf_quant_config.json").unlink()
    return path


def test_compressed_tensors_are_good(packed: Path, zoo: Zoo) -> None:
    findings = verify_checkpoint(packed, zoo("qwen3_moe"))
    assert not rules(findings), findings.groups()
    assert findings.summary["format"] == "compressed-tensors"
    assert findings.summary["worst_sqnr_db"] > 18


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (edit(f"{EXPERT}.down_proj.weight_global_scale", lambda t: 1 / t), {"scale-reciprocal"}),
        (edit(f"{EXPERT}.up_proj.weight_global_scale", double), {"group-weight-scale"}),
        (drop(f"{EXPERT}.down_proj.input_global_scale"), {"input-scale-missing"}),
        (config(lambda c: c.update(ignore=["lm_head"])), {"exclude-missing"}),
        (config(lambda c: c["ignore"].append("re:.*o_proj")), {"exclude-quantized"}),
        (config(lambda c: c.update(quantization_status="frozen")), {"config-key"}),
        (
            config(lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="group")),
            {"config-groups"},
        ),
    ],
)
def test_broken_compressed_tensors_are_found(damage: Damage, expected: set[str], packed: Path) -> None:
    damage(packed)
    assert rules(verify_checkpoint(packed)) == expected


@pytest.fixture
def mixed(good: Path, zoo: Zoo, tmp_path: Path) -> Path:
    """MIXED_PRECISION by hand: attention in FP8 (one scale a tensor), experts in NVFP4."""
    path = Path(shutil.copytree(good, tmp_path / "mixed"))
    tensors, source = (load_file(p / "model.safetensors") for p in (path, zoo("qwen3_moe")))
    layers = {}
    for module in [n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == torch.uint8]:
        layers[module] = {"quant_algo": "NVFP4", "group_size": 16}
        if "self_attn" in module:
            layers[module] = {"quant_algo": "FP8"}
            w = source[f"{module}.weight"].float()
            scale = w.abs().amax() / 448
            tensors[f"{module}.weight"] = (w / scale).to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale"] = scale
            del tensors[f"{module}.weight_scale_2"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "hf_quant_config.json"):
        config(lambda c: c.update(quant_algo="MIXED_PRECISION", quantized_layers=layers), file)(path)
    return path


def test_mixed_precision_is_good(mixed: Path, zoo: Zoo) -> None:
    findings = verify_checkpoint(mixed, zoo("qwen3_moe"))
    assert not rules(findings), findings.groups()
    assert findings.summary["linears"] == {"NVFP4": 48, "FP8": 8}
    assert findings.summary["worst_sqnr_db"] > 18


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop(f"{ATTENTION}.o_proj.weight_scale"), {"tensor-unknown", "part-extra", "config-layers"}),
        (drop(f"{ATTENTION}.o_proj.input_scale"), {"input-scale-missing"}),
        (
            lambda path: [
                config(lambda c: c["quantized_layers"][f"{ATTENTION}.o_proj"].update(quant_algo="NVFP4"), f)(
                    path
                )
                for f in ("config.json", "hf_quant_config.json")
            ],
            {"config-layers"},
        ),
        (
            lambda path: [
                config(lambda c: c["quantized_layers"].pop(f"{ATTENTION}.o_proj"), f)(path)
                for f in ("config.json", "hf_quant_config.json")
            ],
            {"config-layers"},
        ),
        (
            config(lambda c: c["quantized_layers"].pop(f"{ATTENTION}.o_proj"), "hf_quant_config.json"),
            {"config-disagree"},
        ),
    ],
)
def test_broken_mixed_precision_is_found(damage: Damage, expected: set[str], mixed: Path) -> None:
    damage(mixed)
    assert rules(verify_checkpoint(mixed)) == expected


# What is no checkpoint at all, and the command line.


def test_what_is_no_quantized_checkpoint_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"expected config\.json, found none"):
        verify_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a quantized checkpoint"):
        verify_checkpoint(zoo("llama"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors files, found none"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "fp8", "awq", "mxfp4"])
def test_other_quantizations_are_named_and_refused(method: str, copy: Path) -> None:
    config(lambda c: c.update(quant_method=method))(copy)
    with pytest.raises(CheckpointError, match=f"not an NVFP4 checkpoint: quant_method is '{method}'"):
        verify_checkpoint(copy)


def test_a_base_without_weights_is_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a model's directory"):
        verify_checkpoint(good, tmp_path)


def test_the_command_says_good_and_exits_0(good: Path, zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(good), "--base", str(zoo("qwen3_moe"))]) == 0
    assert "good: every rule holds" in capsys.readouterr().out


def test_the_command_exits_1_with_errors_and_prints_json(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(SCALE_2)(copy)
    assert main(["verify", str(copy), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "broken: 1 error, 0 warnings"
    assert printed["findings"][0]["where"] == SCALE_2
    assert main(["verify", str(copy)]) == 1
    assert "part-missing" in capsys.readouterr().out


def test_bad_directories_are_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_every_rule_says_why() -> None:
    assert all(why and not why.endswith(".") for _, why in RULES.values())


def test_the_audit_imports_nothing_that_writes() -> None:
    """A mistake in the emitter must not be able to hide in what checks it."""
    for file in (Path(fxq.__file__).parent / "audit").glob("*.py"):
        modules = [
            line.split()[1]
            for line in file.read_text().splitlines()
            if line.startswith(("from fxq", "import fxq"))
        ]
        assert all(m.startswith("fxq.audit") or m == "fxq.errors" for m in modules), file


def test_memory_is_a_chunk_and_not_a_tensor(tmp_path: Path) -> None:
    """A tensor far larger than a chunk is read in pieces."""
    from fxq.audit import store

    save_file({"w": torch.zeros(4096, 40_960, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    opened = store.open_store(tmp_path)
    sizes = [opened.raw("w", *rows).nbytes for rows in opened.chunks("w")]
    assert sum(sizes) == 4096 * 40_960
    assert max(sizes) <= store.CHUNK_BYTES
