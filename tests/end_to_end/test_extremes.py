"""Values at the ends of what a dtype holds, files beside the model, and outputs that cannot be printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxq
from fxq import audit
from fxq.checkpoint.shards import Shards
from fxq.cli.main import main
from fxq.sources import Directory, files
from tests.families import Zoo, load, samples, zoo

__all__ = ["zoo"]

UP = "model.layers.1.mlp.up_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"


def _edited(path: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a one-file checkpoint with other values."""
    made = Path(shutil.copytree(path, to))
    tensors = load_file(made / "model.safetensors")
    change(tensors)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def _warnings(compiled: fxq.Compiled, word: str) -> list[str]:
    return [w for w in compiled.report.warnings if word in w]


@pytest.mark.parametrize(
    ("family", "name", "spec"),
    [
        ("llama", UP, "nvfp4_weight_only_mse"),
        ("llama", UP, "nvfp4_weight_only"),
        ("qwen3_moe", EXPERT, "nvfp4_weight_only_mse"),
    ],
)
@pytest.mark.parametrize("factor", [1e-37, 1e-30])
def test_a_weight_that_becomes_zeros_is_named(
    factor: float, family: str, name: str, spec: str, zoo: Zoo, tmp_path: Path
) -> None:
    """Its scale is that of the projection beside it; alone it would be as good as any."""
    model = _edited(zoo(family), tmp_path / "model", lambda t: t[f"{name}.weight"].mul_(factor))
    compiled = fxq.compile(model, spec, out=tmp_path / "out")
    assert any(name in warning for warning in _warnings(compiled, "become zero"))
    if family == "llama":
        assert compiled.report.worst_tensor == f"{UP}.weight"
        assert compiled.report.worst_sqnr_db == pytest.approx(0)
    assert not _warnings(fxq.compile(zoo(family), spec, out=tmp_path / "whole"), "become zero")


def test_a_weight_of_zeros_is_no_loss(zoo: Zoo, tmp_path: Path) -> None:
    model = _edited(zoo("llama"), tmp_path / "model", lambda t: t[f"{UP}.weight"].zero_())
    compiled = fxq.compile(model, "nvfp4_weight_only_mse", out=tmp_path / "out")
    assert not _warnings(compiled, "zero")
    assert not _warnings(compiled, "dB")


@pytest.mark.parametrize("spec", ["nvfp4_weight_only_mse", "nvfp4_weight_only"])
def test_the_largest_finite_weights_are_packed_and_reported(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    largest = torch.finfo(torch.bfloat16).max
    model = _edited(zoo("llama"), tmp_path / "model", lambda t: t[f"{UP}.weight"].fill_(largest))
    compiled = fxq.compile(model, spec, out=tmp_path / "out")
    assert _warnings(compiled, "become zero")  # the gate beside it
    text = (tmp_path / "out" / "fxq-report" / "report.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the report")

    json.loads(text, parse_constant=refuse)


def test_what_is_carried_through_with_nan_is_named(zoo: Zoo, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    model = _edited(zoo("llama"), tmp_path / "model", lambda t: t[name][:1].fill_(float("nan")))
    compiled = fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out")
    assert [warning.partition(":")[0] for warning in _warnings(compiled, "NaN")] == [name]


def test_what_was_found_is_said_once_and_after_a_resumption_too(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight"].mul_(1e-30)
        tensors["lm_head.weight"][0, 0] = float("inf")

    model = _edited(zoo("llama"), tmp_path / "model", change)
    whole = fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "whole")
    warnings = list(whole.report.warnings)
    assert len(_warnings(whole, "become zero")) == len(_warnings(whole, "Inf")) == 1
    whole.save(tmp_path / "again")
    assert whole.report.warnings == warnings

    def fail(shards: Shards) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "finish", fail)
        with pytest.raises(fxq.FxqError):
            fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out")

    def never(*args: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:  # all is written: nothing is packed or carried through again
        for name in ("read", "read_expert", "read_hub"):
            patch.setattr(Directory, name, never)
        resumed = fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out", resume=True)
    assert resumed.report.warnings == warnings


@pytest.mark.parametrize("indexed", [False, True])
def test_what_loaders_do_not_take_for_the_model_is_not_missed(
    indexed: bool, zoo: Zoo, tmp_path: Path
) -> None:
    """As beside Mistral's models: consolidated.safetensors, or a leftover adapter."""
    model = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    if indexed:
        names = load_file(model / "model.safetensors")
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.ones(2)}, model / "consolidated.safetensors")
    fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out")
    found = audit.verify_checkpoint(tmp_path / "out", base=model)
    assert "base-lost" not in {finding.rule for finding in found}


def test_a_path_with_nul_is_refused(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(zoo("llama")), "--spec", "nvfp4_weight_only", "--out", "a\0b"]) == 1
    assert "NUL" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_summary_that_cannot_be_printed_leaves_the_output(
    options: list[str], zoo: Zoo, tmp_path: Path
) -> None:
    command = ["compile", str(zoo("llama")), "--spec", "nvfp4_weight_only", "--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fxq", *command, *options],
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("fxq: "))
    assert "is complete" in error
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_of_more_files_than_may_be_open_at_first() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
        files.allow_files(5)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft >= min(1000, hard)
        assert hard == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_live_model_with_resized_embeddings_is_what_it_is_now(zoo: Zoo, tmp_path: Path) -> None:
    model = load(zoo("llama"))
    grown = model.config.vocab_size + 16
    model.resize_token_embeddings(grown, mean_resizing=False)
    fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.embed_tokens.weight"].shape[0] == grown
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == grown


def test_a_live_model_that_calls_otherwise_is_told_so(zoo: Zoo) -> None:
    def notes(change: Callable[[Any], object]) -> list[str]:
        model = load(zoo("llama"))
        change(model)
        return _warnings(fxq.compile(model, "nvfp4_default-fp8_kv", calib=samples(2)), "of its own")

    assert notes(lambda model: None) == []
    assert len(notes(lambda m: m.model.layers[0].mlp.register_forward_hook(lambda a, b, c: c * 2))) == 1
    assert len(notes(lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: x * 0))) == 1


@pytest.mark.parametrize(
    "spec",
    ["nvfp4_weight_only", "nvfp4_weight_only_mse", "nvfp4_default-fp8_kv", "nvfp4_default_mse-fp8_cast_kv"],
)
def test_nan_is_named_by_the_tensor_of_the_checkpoint(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    """Gate and up of all experts are one parameter in memory; the user knows the files."""
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    model = _edited(zoo("qwen3_moe"), tmp_path / "model", lambda t: t[name][3, 5].fill_(float("nan")))
    with pytest.raises(fxq.SourceError, match=rf"^{re.escape(name)}: .*NaN"):
        fxq.compile(model, spec, calib=samples(6), out=tmp_path / "out")
