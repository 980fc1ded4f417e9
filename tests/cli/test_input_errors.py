"""What users get wrong, through `fxq.compile`: the right exception, a short message, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3MoeConfig

import fxq
from tests.families import (
    FAMILIES,
    VOCABULARY,
    Zoo,
    add_tensors,
    drop_tensors,
    random_model,
    samples,
    write_lines,
    zoo,
)

__all__ = ["zoo"]

DEFAULT, EXPERTS_ONLY, WEIGHT_ONLY = (
    "nvfp4_default-fp8_kv",
    "nvfp4_experts_only-fp8_cast_kv",
    "nvfp4_weight_only",
)

Refuse = Callable[..., None]
Model = Callable[[str], Path]


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Refuse]:
    """Asserts that `fxq.compile(..., out=)` raises `kind`, says `words` in 1 to 3 lines, writes nothing."""

    def check(
        kind: type[fxq.FxqError], words: tuple[str, ...], model: Any, spec: Any, **options: Any
    ) -> None:
        out = options.pop("out", tmp_path / "results" / "out")
        before = _tree(tmp_path)
        with pytest.raises(fxq.FxqError) as caught:
            fxq.compile(model, spec, out=out, **options)
        assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
        message = str(caught.value)
        assert 1 <= len(message.splitlines()) <= 3, message
        assert len(message) < 1500, message
        for word in words:
            assert word in message, message
        left = [name for name in _tree(tmp_path) if name not in before and name != "results"]
        assert left == []
        assert _tree(tmp_path).items() >= before.items()

    yield check
    assert not list(tmp_path.rglob("*.partial"))


def _tree(root: Path) -> dict[str, bytes | None]:
    """Every path below `root`, hidden ones too, with the contents of files."""
    found = sorted(root.rglob("*"))
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.fixture
def model(zoo: Zoo, tmp_path: Path) -> Model:
    """A family's checkpoint as a copy to break."""
    return lambda name: Path(shutil.copytree(zoo(name), tmp_path / name))


def _sharded(directory: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_no_such_directory(refused: Refuse, tmp_path: Path) -> None:
    refused(
        fxq.SourceError, (str(tmp_path / "nothing"), "no such directory"), tmp_path / "nothing", WEIGHT_ONLY
    )


def test_a_hub_name_is_no_directory(refused: Refuse) -> None:
    refused(fxq.SourceError, ("somebody/some-model", "directory"), "somebody/some-model", WEIGHT_ONLY)


def test_no_config(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    (directory / "config.json").unlink()
    refused(fxq.SourceError, ("config.json",), directory, WEIGHT_ONLY)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "no_such_family"}', '{"hidden_size": 64}']
)
def test_a_config_that_is_none(content: str, refused: Refuse, model: Model) -> None:
    directory = model("llama")
    (directory / "config.json").write_text(content)
    refused(fxq.SourceError, ("config.json",), directory, WEIGHT_ONLY)


def test_no_safetensors(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    (directory / "model.safetensors").unlink()
    refused(fxq.SourceError, (str(directory), "safetensors"), directory, WEIGHT_ONLY)


def test_pickle_is_refused_by_name_and_never_opened(refused: Refuse, model: Model, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    directory = model("llama")
    (directory / "model.safetensors").unlink()
    torch.save(Bomb(), directory / "pytorch_model.bin")
    refused(fxq.SourceError, ("pytorch_model.bin", "safetensors"), directory, WEIGHT_ONLY)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_shard_is_named(refused: Refuse, model: Model) -> None:
    directory = _sharded(model("llama"))
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(fxq.SourceError, ("model-00002-of-00002.safetensors",), directory, WEIGHT_ONLY)


def test_an_index_entry_that_leads_out_of_the_directory(
    refused: Refuse, model: Model, tmp_path: Path
) -> None:
    directory = _sharded(model("llama"))
    shutil.copy(directory / "model-00002-of-00002.safetensors", tmp_path / "elsewhere.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../elsewhere"))
    refused(fxq.SourceError, ("../elsewhere.safetensors",), directory, WEIGHT_ONLY)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {}}',
    ],
)
def test_an_index_that_is_none(content: str, refused: Refuse, model: Model) -> None:
    directory = _sharded(model("llama"))
    (directory / "model.safetensors.index.json").write_text(content)
    refused(fxq.SourceError, ("model.safetensors.index.json",), directory, WEIGHT_ONLY)


def test_an_index_entry_whose_shard_has_no_such_tensor(refused: Refuse, model: Model) -> None:
    directory = _sharded(model("llama"))
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {
        content["weight_map"][name]
    }
    content["weight_map"][name] = other.pop()
    index.write_text(json.dumps(content))
    refused(fxq.SourceError, (name,), directory, WEIGHT_ONLY)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_truncated_shard(keep: int, refused: Refuse, model: Model) -> None:
    directory = model("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(fxq.SourceError, ("model.safetensors",), directory, WEIGHT_ONLY)


def test_a_missing_tensor_is_named(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    drop_tensors(directory, "model.layers.1.mlp.up_proj.weight")
    refused(fxq.SourceError, ("model.layers.1.mlp.up_proj.weight",), directory, WEIGHT_ONLY)


def test_a_missing_expert_is_an_error_and_names_the_parameter(refused: Refuse, model: Model) -> None:
    directory = model("qwen3_moe")
    drop_tensors(directory, "model.layers.1.mlp.experts.5.up_proj.weight")
    refused(fxq.SourceError, ("model.layers.1.mlp.experts",), directory, WEIGHT_ONLY)


def test_an_expert_missing_in_every_projection(refused: Refuse, model: Model) -> None:
    directory = model("qwen3_moe")
    drop_tensors(
        directory, *(f"model.layers.1.mlp.experts.5.{p}_proj.weight" for p in ("gate", "up", "down"))
    )
    refused(fxq.SourceError, ("model.layers.1.mlp.experts",), directory, WEIGHT_ONLY)


def test_a_wrong_shape_is_named_with_both_shapes(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    add_tensors(directory, {"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 64, dtype=torch.bfloat16)})
    refused(fxq.SourceError, ("model.layers.1.mlp.up_proj.weight", "80", "96"), directory, WEIGHT_ONLY)


def test_an_unknown_spec_lists_the_shipped_ones(refused: Refuse, zoo: Zoo) -> None:
    refused(fxq.SpecError, ("nvfp4_defualt", "nvfp4_default-fp8_kv"), zoo("llama"), "nvfp4_defualt")


def test_a_spec_file_that_is_not_there(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    refused(fxq.SpecError, ("mine.yaml",), zoo("llama"), tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("passes:\n  - fuse-expert\n", (":2", "fuse-expert", "fuse-experts")),
        ("passes:\n  - quantize-linears: {weight: nvfp4}\n", (":2", "weight", "weights")),
        ("passes:\n  - quantize-linears: {weights: nvfp5}\n", (":2", "nvfp5", "nvfp4")),
        ("passes:\n  - quantize-linears: {only: 7}\n", (":2", "only", "7")),
        ("description: x\npass:\n  - lower\n", (":2", "pass", "passes")),
        ("passes:\n  - lower: {format: modelopt}\n", ("lower", "amaxes_shared")),
        ("passes: []\n", ("passes",)),
        ("passes: {", ("YAML",)),
        ("", ("passes",)),
        ("passes:\n  - !!python/object/apply:os.mkdir [exploded]\n", ()),
    ],
)
def test_a_mistake_in_a_spec_is_named_with_its_line(
    text: str, words: tuple[str, ...], refused: Refuse, zoo: Zoo, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused(fxq.SpecError, ("mine.yaml", *words), zoo("llama"), tmp_path / "mine.yaml")


@pytest.mark.parametrize("spec", [DEFAULT, EXPERTS_ONLY])
def test_calibration_that_is_needed_but_not_given(spec: str, refused: Refuse, zoo: Zoo) -> None:
    refused(fxq.SpecError, (spec, "calibrate-max", "calib"), zoo("qwen3_moe"), spec)


def test_an_empty_calibration_file_is_named(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "calib.jsonl").write_text("")
    refused(fxq.SourceError, ("calib.jsonl",), zoo("llama"), DEFAULT, calib=tmp_path / "calib.jsonl")


def test_a_calibration_file_that_is_not_there(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    refused(fxq.SourceError, ("calib.jsonl",), zoo("llama"), DEFAULT, calib=tmp_path / "calib.jsonl")


def test_a_calibration_line_that_is_no_json_is_named_with_its_number(
    refused: Refuse, zoo: Zoo, tmp_path: Path
) -> None:
    file = tmp_path / "calib.jsonl"
    file.write_text('{"input_ids": [3, 4]}\n\ntext: hello\n')
    refused(fxq.SourceError, (f"{file}:3", "JSON"), zoo("llama"), DEFAULT, calib=file)


def test_a_token_id_beyond_the_vocabulary(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "calib.jsonl", [{"input_ids": [3, 4]}, {"input_ids": [5, VOCABULARY]}])
    refused(fxq.SourceError, (f"{file}:2", str(VOCABULARY)), zoo("llama"), DEFAULT, calib=file)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "qwen3_moe"])
def test_text_without_a_tokenizer(family: str, refused: Refuse, zoo: Zoo) -> None:
    """For some families transformers makes one without a vocabulary, to which all text is empty."""
    words = (f"{zoo(family)}: there is no tokenizer", "input_ids")
    refused(fxq.SourceError, words, zoo(family), DEFAULT, calib=["hello"])


@pytest.mark.parametrize(("options", "word"), [({"samples": 0}, "samples"), ({"seq_len": 0}, "seq_len")])
def test_counts_below_one(options: dict[str, int], word: str, refused: Refuse, zoo: Zoo) -> None:
    refused(fxq.SpecError, (word,), zoo("llama"), DEFAULT, calib=samples(1), **options)


@pytest.mark.parametrize(("options", "word"), [({"device": "gpu"}, "gpu"), ({"format": "gguf"}, "gguf")])
def test_a_device_or_format_that_is_none(
    options: dict[str, str], word: str, refused: Refuse, zoo: Zoo
) -> None:
    refused(fxq.SpecError, (word,), zoo("llama"), DEFAULT, calib=samples(1), **options)


@pytest.mark.slow
def test_a_linear_whose_input_is_no_multiple_of_16(refused: Refuse, tmp_path: Path) -> None:
    config = LlamaConfig(**{**FAMILIES["llama"]().to_dict(), "intermediate_size": 72})
    random_model(config).save_pretrained(tmp_path / "odd")
    words = ("model.layers.0.mlp.down_proj", "72", "16")
    refused(fxq.VerifyError, words, tmp_path / "odd", WEIGHT_ONLY)


def test_an_expert_whose_input_is_no_multiple_of_16(refused: Refuse, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**{**FAMILIES["qwen3_moe"]().to_dict(), "moe_intermediate_size": 40})
    random_model(config).save_pretrained(tmp_path / "odd")
    refused(fxq.VerifyError, ("mlp.experts.down_proj", "40", "16"), tmp_path / "odd", WEIGHT_ONLY)


def _poison(directory: Path, name: str, value: float) -> Path:
    tensor = load_file(directory / "model.safetensors")[name].clone()
    tensor[3, 5] = value
    add_tensors(directory, {name: tensor})
    return directory


BROKEN = [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")]


BROKEN_EXPERTS = [
    (float("nan"), "NaN", "up_proj"),
    pytest.param(float("inf"), "Inf", "down_proj", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("value", "word", "projection"), BROKEN_EXPERTS)
def test_a_broken_expert_is_named(
    value: float, word: str, projection: str, refused: Refuse, model: Model
) -> None:
    directory = _poison(model("qwen3_moe"), f"model.layers.1.mlp.experts.5.{projection}.weight", value)
    words = (f"model.layers.1.mlp.experts.5.{projection}.weight", word)
    refused(fxq.SourceError, words, directory, WEIGHT_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "word"), BROKEN[:2])
def test_a_broken_expert_is_named_while_calibrating(
    value: float, word: str, refused: Refuse, model: Model
) -> None:
    directory = _poison(model("qwen3_moe"), "model.layers.1.mlp.experts.5.up_proj.weight", value)
    words = ("model.layers.1.mlp.experts.5.up_proj.weight", word)
    refused(fxq.SourceError, words, directory, EXPERTS_ONLY, calib=samples(6))


@pytest.mark.parametrize(("value", "word"), [pytest.param(*BROKEN[0], marks=pytest.mark.slow), BROKEN[2]])
def test_a_broken_linear_is_named(value: float, word: str, refused: Refuse, model: Model) -> None:
    directory = _poison(model("llama"), "model.layers.1.mlp.up_proj.weight", value)
    refused(fxq.SourceError, ("model.layers.1.mlp.up_proj", word), directory, WEIGHT_ONLY)


def test_a_broken_linear_is_named_while_calibrating(refused: Refuse, model: Model) -> None:
    directory = _poison(model("llama"), "model.layers.1.mlp.up_proj.weight", float("nan"))
    refused(fxq.SourceError, ("model.layers.1.mlp.up_proj", "NaN"), directory, DEFAULT, calib=samples(2))


@pytest.mark.slow
def test_a_broken_embedding_is_found_by_calibration(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    add_tensors(directory, {"model.embed_tokens.weight": torch.full((VOCABULARY, 64), torch.nan).bfloat16()})
    refused(fxq.SourceError, ("NaN",), directory, DEFAULT, calib=samples(2))


def test_out_that_holds_something_keeps_it(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    refused(
        fxq.CheckpointError,
        (str(tmp_path / "full"), "empty"),
        zoo("llama"),
        WEIGHT_ONLY,
        out=tmp_path / "full",
    )
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep me"


def test_out_that_is_a_file(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    refused(fxq.CheckpointError, (str(tmp_path / "file"),), zoo("llama"), WEIGHT_ONLY, out=tmp_path / "file")


@pytest.mark.parametrize("inside", [".", "nvfp4", "a/b", "../llama/nvfp4"])
def test_out_inside_the_model(inside: str, refused: Refuse, model: Model) -> None:
    directory = model("llama")
    refused(fxq.CheckpointError, ("llama",), directory, WEIGHT_ONLY, out=directory / inside)


def test_out_inside_the_model_through_a_link(refused: Refuse, model: Model, tmp_path: Path) -> None:
    directory = model("llama")
    (tmp_path / "link").symlink_to(directory)
    refused(fxq.CheckpointError, ("inside",), directory, WEIGHT_ONLY, out=tmp_path / "link" / "nvfp4")


def test_out_below_a_file(refused: Refuse, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    refused(
        fxq.CheckpointError,
        (str(tmp_path / "file"),),
        zoo("llama"),
        WEIGHT_ONLY,
        out=tmp_path / "file" / "out",
    )


def test_remote_code_is_not_run_unasked(refused: Refuse, model: Model, tmp_path: Path) -> None:
    directory = model("llama")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    refused(fxq.SourceError, ("config.json",), directory, WEIGHT_ONLY)
    assert not (tmp_path / "exploded").exists()


def test_a_link_out_of_the_directory_is_not_followed(refused: Refuse, model: Model, tmp_path: Path) -> None:
    directory = model("llama")
    (tmp_path / "secret.txt").write_text("not yours")
    (directory / "notes.txt").symlink_to(tmp_path / "secret.txt")
    refused(fxq.SourceError, ("notes.txt", str(tmp_path / "secret.txt")), directory, WEIGHT_ONLY)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_the_model_may_not_be_lent_by_a_link(
    name: str, refused: Refuse, model: Model, tmp_path: Path
) -> None:
    directory = model("llama")
    shutil.move(directory / name, tmp_path / "elsewhere")
    (directory / name).symlink_to(tmp_path / "elsewhere")
    refused(fxq.SourceError, (name, str(tmp_path / "elsewhere")), directory, WEIGHT_ONLY)


@pytest.mark.parametrize("target", ["gone", "loop", "."])
def test_a_link_to_nothing_or_to_all(target: str, refused: Refuse, model: Model) -> None:
    directory = model("llama")
    (directory / "loop").symlink_to(target)
    refused(fxq.SourceError, (str(directory / "loop"), "link"), directory, WEIGHT_ONLY)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pipe_is_no_file_and_nobody_waits_for_it(name: str, refused: Refuse, model: Model) -> None:
    directory = model("llama")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    refused(fxq.SourceError, (str(directory),), directory, WEIGHT_ONLY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**30),
        ("head_dim", 2**40),
        ("hidden_size", 0),
    ],
)
def test_a_config_that_asks_for_more_than_there_is(
    field: str, value: int, refused: Refuse, model: Model
) -> None:
    directory = model("llama")
    config = json.loads((directory / "config.json").read_text()) | {field: value}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises((fxq.SourceError, fxq.TraceError)):
        fxq.compile(directory, WEIGHT_ONLY)


def test_a_shard_with_a_tensor_that_the_index_does_not_list(refused: Refuse, model: Model) -> None:
    directory = _sharded(model("llama"))
    file = directory / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), "model.more": torch.zeros(3)}, file, {"format": "pt"})
    refused(fxq.SourceError, (file.name, "model.more", "index"), directory, WEIGHT_ONLY)


def test_a_tensor_of_integers_is_no_weight(refused: Refuse, model: Model) -> None:
    directory = model("llama")
    add_tensors(directory, {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.int8)})
    refused(fxq.SourceError, ("model.layers.1.mlp.up_proj.weight", "int8"), directory, WEIGHT_ONLY)
