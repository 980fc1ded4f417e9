"""`fxq.evaluate`: the figures are those of transformers, of the compilation that wrote a checkpoint, and of
independent decoding; a checkpoint counts as its files say, whoever wrote them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fxq
from fxq.cli.main import main
from fxq.evaluate.served import served
from fxq.model import open_model
from fxq.run import likelihood
from fxq.run.streaming import Streaming
from fxq.sources import Directory
from tests import oracle, reader, reference
from tests.families import (
    FAMILIES,
    VOCABULARY,
    Zoo,
    add_tensors,
    drop_tensors,
    load,
    random_model,
    samples,
    save,
    write_lines,
    zoo,
)
from tests.tiny import families, tiny_model

__all__ = ["zoo"]

DEFAULT, EXPERTS_ONLY = "nvfp4_default-fp8_kv", "nvfp4_experts_only_mse-fp8_cast_kv"
DEFAULT_CAST = "nvfp4_default_mse-fp8_cast_kv"
WEIGHT_ONLY, MIXED = "nvfp4_weight_only_mse", "nvfp4_experts_fp8_rest_mse-fp8_kv"
TEXT = samples(7, seed=5)
SLOW = pytest.mark.slow
E4M3 = torch.float8_e4m3fn
INPUTS_ONLY = """
passes:
  - quantize-linears
  - sync-groups
  - calibrate-max
  - calibrate-bootstrap
  - lower
"""
Change = Callable[[Path], object]


def _compile(model: Any, spec: str | Path, out: Path, **options: Any) -> fxq.Compiled:
    calib = None if "weight_only" in str(spec) else samples(6)
    return fxq.compile(model, spec, calib=calib, out=out, **options)


def _config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "spec", "format"),
    [
        ("qwen3_moe", DEFAULT, "modelopt"),
        ("qwen3_moe", MIXED, "modelopt"),
        ("phi3", DEFAULT, "compressed-tensors"),
        pytest.param("qwen3_moe", EXPERTS_ONLY, "modelopt", marks=SLOW),
        pytest.param("qwen3_moe", WEIGHT_ONLY, "compressed-tensors", marks=SLOW),
        pytest.param("deepseek_v3", DEFAULT, "modelopt", marks=SLOW),
        pytest.param("mixtral", DEFAULT, "compressed-tensors", marks=SLOW),
        pytest.param("llama_tied", WEIGHT_ONLY, "modelopt", marks=SLOW),
        pytest.param("qwen3", DEFAULT_CAST, "modelopt", marks=SLOW),
    ],
)
def test_the_output_counts_as_the_compilation_said(
    family: str, spec: str, format: str, zoo: Zoo, tmp_path: Path
) -> None:
    compiled = _compile(zoo(family), spec, tmp_path / "out", format=format)
    before, after = compiled.perplexity(TEXT)
    found = fxq.evaluate(tmp_path / "out", TEXT, base=zoo(family))
    assert found.against is not None
    assert found.against.perplexity == before
    # A divisor is rounded once more than the multiplier that it stands for.
    assert found.perplexity == (after if format == "modelopt" else pytest.approx(after, rel=5e-3))
    assert found.notes == ()
    assert found.against.kl["mean"] > 0


@pytest.mark.parametrize(
    "kind", ["gpt2", pytest.param("gpt_oss", marks=SLOW), pytest.param("granitemoe", marks=SLOW)]
)
def test_weights_kept_turned_or_all_experts_in_one_tensor_count_too(kind: str, tmp_path: Path) -> None:
    model = tiny_model(next(f for f in families() if f.name == kind))
    model.save_pretrained(tmp_path / "model")
    compiled = _compile(tmp_path / "model", DEFAULT_CAST, tmp_path / "out", allow_partial=True)
    _, after = compiled.perplexity(samples(3, seed=5))
    assert fxq.evaluate(tmp_path / "out", samples(3, seed=5)).perplexity == after


@pytest.mark.parametrize("family", ["qwen3_moe", "llama_tied"])
def test_perplexity_of_an_unquantized_model_is_transformers(family: str, zoo: Zoo) -> None:
    found = fxq.evaluate(zoo(family), TEXT)
    assert found.perplexity == pytest.approx(oracle.perplexity(zoo(family), TEXT), rel=5e-3)
    assert (found.samples, found.tokens) == (7, sum(len(ids) - 1 for ids in TEXT))
    assert found.against is None


def test_a_model_does_not_differ_from_itself(zoo: Zoo) -> None:
    found = fxq.evaluate(load(zoo("qwen3_moe")), TEXT, base=zoo("qwen3_moe"))
    assert found.against is not None
    assert set(found.against.kl.values()) == {0.0}
    assert found.against.top1_agreement == 1
    assert found.against.perplexity == found.perplexity


def test_divergence_is_that_of_transformers_logits(zoo: Zoo, tmp_path: Path) -> None:
    other = save(random_model(FAMILIES["llama"](), seed=1), tmp_path / "other")
    found = fxq.evaluate(other, TEXT, base=zoo("llama"))
    apart, same = [], []
    models = [load(path) for path in (zoo("llama"), other)]
    for ids in TEXT:
        with torch.inference_mode():
            base, model = (m(torch.tensor([ids])).logits[0, :-1].double().softmax(-1) for m in models)
        apart += (base * (base / model).log()).sum(-1).tolist()
        same += (base.argmax(-1) == model.argmax(-1)).tolist()
    assert found.against is not None
    kl = found.against.kl
    assert kl["mean"] == pytest.approx(np.mean(apart), rel=0.02)
    assert kl["median"] == pytest.approx(np.median(apart), rel=0.05)
    assert kl["max"] == pytest.approx(max(apart), rel=0.02)
    assert kl["median"] <= kl["p90"] <= kl["p99"] <= kl["max"]
    assert found.against.top1_agreement == pytest.approx(np.mean(same), abs=0.03)


def test_divergence_of_rows_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base, model = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    ids = torch.randint(0, 11, (2, 5), generator=generator)
    whole = likelihood.divergences(base, model)
    monkeypatch.setattr(likelihood, "_ELEMENTS_AT_ONCE", 22)
    for ours, theirs in zip(likelihood.divergences(base, model), whole, strict=True):
        assert torch.equal(ours, theirs)
    expected = torch.nn.functional.cross_entropy(
        base[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    assert torch.equal(likelihood.losses(base, ids), expected.double())


def test_what_the_base_rules_out_costs_nothing_and_what_only_the_model_rules_out_is_infinite() -> None:
    base, model = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    base[..., 2] = -math.inf
    assert float(likelihood.divergences(base, model)[0]) == pytest.approx(math.log(3 / 2))
    assert float(likelihood.divergences(base, base)[0]) == 0
    assert float(likelihood.divergences(model, base)[0]) == math.inf


def test_logits_of_one_batch_each_are_alive_at_a_time(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[StorageWeakRef] = []
    alive: list[int] = []
    stream = Streaming.stream

    def watched(self: Streaming, *arguments: Any) -> Iterator[tuple[int, Tensor]]:
        for i, logits in stream(self, *arguments):
            handed.append(StorageWeakRef(logits.untyped_storage()))
            alive.append(sum(not storage.expired() for storage in handed))
            yield i, logits
            del logits

    monkeypatch.setattr(Streaming, "stream", watched)
    text = [[3] * length for length in range(2, 12)]  # a batch each
    fxq.evaluate(zoo("llama"), text, base=zoo("llama"))
    assert len(handed) == 20
    assert max(alive) == 2


def test_each_weight_is_read_once_for_both_models(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: dict[tuple[int, str], int] = {}
    read = Directory.read

    def counting(self: Directory, name: str, out: Tensor | None = None) -> Tensor:
        reads[id(self), name] = reads.get((id(self), name), 0) + 1
        return read(self, name, out)

    monkeypatch.setattr(Directory, "read", counting)
    fxq.evaluate(zoo("llama"), [[3] * length for length in range(2, 22)], base=zoo("llama"))
    assert set(reads.values()) == {1}


def test_weights_decode_as_the_independent_reader_has_them(zoo: Zoo, tmp_path: Path) -> None:
    for format in ("modelopt", "compressed-tensors"):
        _compile(zoo("qwen3_moe"), WEIGHT_ONLY, tmp_path / format, format=format)
    decoded = oracle.dequantized_model(tmp_path / "modelopt", tmp_path / "decoded")
    tensors = load_file(decoded / "model.safetensors")
    for format in ("modelopt", "compressed-tensors"):
        source = Directory(tmp_path / format, served=True)
        assert set(source.infos) == set(tensors)
        for key, expected in tensors.items():  # where bf16 ties, a float32 decides
            found = source.read_hub(key)
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
            assert (found == expected).float().mean() > 0.9
    perplexity = fxq.evaluate(tmp_path / "modelopt", TEXT).perplexity
    assert perplexity == pytest.approx(oracle.perplexity(decoded, TEXT), rel=5e-3)


def _as_kernels_see(x: Tensor, input_scale: float) -> Tensor:
    """An NVFP4 input in float64: FP8 block scales, then the nearest e2m1."""
    blocks = x.double().numpy().reshape(-1, 16)
    scale = reference.e4m3_round(np.minimum(np.abs(blocks).max(1) / 6 / input_scale, 448)) * input_scale
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ratio = np.abs(blocks) / np.where(scale > 0, scale, 1)[:, None]
    nearest = grid[np.abs(ratio[..., None] - grid).argmin(-1)]
    return torch.from_numpy((np.sign(blocks) * nearest * scale[:, None]).reshape(x.shape)).to(x.dtype)


def test_inputs_are_quantized_as_by_hand_in_transformers(zoo: Zoo, tmp_path: Path) -> None:
    spec = tmp_path / "inputs.yaml"
    spec.write_text(INPUTS_ONLY)
    _compile(zoo("llama"), spec, tmp_path / "out")
    out = reader.read_checkpoint(tmp_path / "out")
    model = load(oracle.dequantized_model(tmp_path / "out", tmp_path / "decoded"))
    for name in out.quantized_linears():
        scale = float(out.multiplier(name, "input_scale"))
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, scale=scale: _as_kernels_see(args[0], scale)
        )
    losses = []
    for ids in TEXT:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    expected = float(torch.cat(losses).mean())
    found = fxq.evaluate(tmp_path / "out", TEXT)
    plain = math.log(oracle.perplexity(tmp_path / "decoded", TEXT))
    assert abs(math.log(found.perplexity) - expected) < abs(plain - expected) / 4
    assert math.log(found.perplexity) == pytest.approx(expected, abs=0.01)


def _scales_of_one_element(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    add_tensors(path, {k: t.reshape(1) for k, t in tensors.items() if not t.dim()})


def _nested_config_alone(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))


def _cache_scales_beside_attention(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    named = {k: t for k, t in tensors.items() if k.endswith(("k_scale", "v_scale"))}
    assert named
    add_tensors(path, {k.replace("k_proj.", "").replace("v_proj.", ""): t for k, t in named.items()})
    drop_tensors(path, *named)


@pytest.fixture(scope="module")
def default(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint of the default spec, and what it counts."""
    out = tmp_path_factory.mktemp("default") / "out"
    compiled = _compile(zoo("qwen3_moe"), DEFAULT, out)
    return out, compiled.perplexity(TEXT)[1]


@pytest.mark.parametrize(
    "change",
    [
        _scales_of_one_element,
        _nested_config_alone,
        _cache_scales_beside_attention,
        lambda path: (path / "hf_quant_config.json").unlink(),
    ],
)
def test_other_tools_ways_of_saying_the_same_count_the_same(
    change: Change, default: tuple[Path, float], tmp_path: Path
) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    change(path)
    found = fxq.evaluate(path, TEXT)
    assert found.perplexity == default[1]
    assert found.notes == ()


def _amaxes(path: Path, ending: str) -> set[float]:
    program = served(open_model(path, served=True))
    return {float(value) for name, value in program.values.items() if name.endswith(ending)}


def test_experts_share_their_largest_input_scale_as_engines_have_it(
    default: tuple[Path, float], tmp_path: Path
) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    key = "model.layers.1.mlp.experts.5.down_proj.input_scale"
    larger = 3 * load_file(path / "model.safetensors")[key]
    add_tensors(path, {key: larger})
    found = fxq.evaluate(path, TEXT)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("model.layers.1.mlp.experts.0.down_proj.weight: its input scale differs")
    assert found.perplexity != default[1]
    assert any(value == pytest.approx(float(larger) * 2688) for value in _amaxes(path, "_input_amax"))


def test_a_missing_input_scale_leaves_the_input_alone_with_a_note(
    default: tuple[Path, float], tmp_path: Path
) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    drop_tensors(path, "model.layers.0.self_attn.o_proj.input_scale")
    found = fxq.evaluate(path, TEXT)
    assert len(found.notes) == 1
    assert "model.layers.0.self_attn.o_proj.weight: no input scale" in found.notes[0]
    assert found.perplexity != default[1]
    assert len(_amaxes(path, "o_proj_weight_input_amax")) == 1


def test_weight_only_configs_keep_inputs_as_they_are(default: tuple[Path, float], tmp_path: Path) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    _config(path, lambda stated: stated.update(quant_algo="W4A16_NVFP4", kv_cache_scheme=None))
    assert not served(open_model(path, served=True)).values
    assert fxq.evaluate(path, TEXT).notes == ()


@pytest.mark.slow
def test_a_cache_without_scales_is_cast_and_one_scale_alone_is_for_both(
    default: tuple[Path, float], tmp_path: Path
) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    scales = [key for key in load_file(path / "model.safetensors") if key.endswith(("k_scale", "v_scale"))]
    drop_tensors(path, *[key for key in scales if key.endswith("v_scale")])
    tensors = load_file(path / "model.safetensors")
    expected = sorted(float(tensors[key]) * 448 for key in scales if key.endswith("k_scale"))
    assert sorted(_amaxes(path, "_v_amax")) == pytest.approx(expected)
    drop_tensors(path, *[key for key in scales if key.endswith("k_scale")])
    assert _amaxes(path, "_v_amax") == _amaxes(path, "_k_amax") == {448.0}
    assert fxq.evaluate(path, TEXT).notes == ()


def _drop(*names: str) -> Change:
    return lambda path: drop_tensors(path, *names)


def _stated(**changes: Any) -> Change:
    return lambda path: _config(path, lambda stated: stated.update(changes))


DOWN = "model.layers.0.mlp.experts.0.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_stated(quant_algo="NVFP4_AWQ"), "modelopt's NVFP4_AWQ"),
        (_stated(quant_method="gptq"), "quantized by gptq"),
        (_stated(kv_cache_scheme={"num_bits": 4, "type": "float"}), "a KV cache of .*num_bits"),
        (_drop(f"{DOWN}.weight_scale"), f"no {DOWN}.weight_scale to decode it with"),
        (_drop(f"{DOWN}.weight_scale_2"), f"no {DOWN}.weight_scale_2 to decode it with"),
        (
            lambda path: add_tensors(path, {f"{DOWN}.weight_scale_2": torch.tensor(math.nan)}),
            f"{DOWN}.weight_scale_2 holds NaN",
        ),
        (
            lambda path: add_tensors(path, {f"{DOWN}.weight_scale": torch.ones(3, 3).to(E4M3)}),
            r"down_proj.weight_scale is float8_e4m3fn \[3, 3\]; .* needs float8_e4m3fn \[64, 2\]",
        ),
        (
            lambda path: add_tensors(path, {f"{DOWN}.input_scale": torch.tensor(0.0)}),
            f"{DOWN}.input_scale: expected a positive finite scale, found",
        ),
        (
            lambda path: add_tensors(path, {f"{DOWN}.pre_quant_scale": torch.ones(32)}),
            "AWQ, which scales inputs",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    change: Change, message: str, default: tuple[Path, float], tmp_path: Path
) -> None:
    path = shutil.copytree(default[0], tmp_path / "out")
    change(path)
    with pytest.raises(fxq.SourceError, match=message):
        fxq.evaluate(path, TEXT)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ([[5]], {}, fxq.SourceError, "two tokens or more"),
        ([[VOCABULARY, 3]], {}, fxq.SourceError, "outside the model's vocabulary of 160"),
        ("nowhere.jsonl", {}, fxq.SourceError, "nowhere.jsonl: cannot read text"),
        (TEXT, {"seq_len": 1}, fxq.SpecError, "seq_len is at least 2"),
        (TEXT, {"samples": 0}, fxq.SpecError, "samples is at least 1"),
        (TEXT, {"device": "tpu"}, fxq.SpecError, "tpu"),
    ],
)
def test_bad_input_is_named(
    text: Any, options: dict[str, Any], error: type[Exception], message: str, zoo: Zoo
) -> None:
    with pytest.raises(error, match=message):
        fxq.evaluate(zoo("llama"), text, **options)


def test_models_of_different_vocabularies_are_not_compared(zoo: Zoo, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 128
    other = save(random_model(config), tmp_path / "other")
    with pytest.raises(fxq.SourceError, match=r"a vocabulary of 128 tokens, the base .* one of 160"):
        fxq.evaluate(other, TEXT, base=zoo("llama"))


def test_samples_are_cut_to_what_the_model_holds_and_to_what_was_asked(zoo: Zoo) -> None:
    text = [[5, 6, 7] * 100] * 3  # the model has 128 positions
    assert fxq.evaluate(zoo("llama"), text, samples=2).tokens == 2 * 127
    assert fxq.evaluate(zoo("llama"), text, seq_len=9).tokens == 3 * 8


def test_the_command_line_prints_a_table_or_json(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_lines(tmp_path / "text.jsonl", [{"input_ids": ids} for ids in TEXT])
    command = ["eval", str(zoo("llama")), "--text", str(text), "--base", str(zoo("llama"))]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for word in ("perplexity", "of the base", "KL from the base", "0.00000", "top-1 agreement", "100.00%"):
        assert word in printed
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == sum(len(ids) - 1 for ids in TEXT)
    assert found["against"]["kl"]["p99"] == 0
    assert main(["eval", str(zoo("llama")), "--text", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("fxq: ")
