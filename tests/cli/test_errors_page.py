"""docs/errors.md: what fxq says to bad input. The page is made here; `--update-golden` writes it again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fxq
from tests.families import VOCABULARY, Zoo, add_tensors, drop_tensors, load, zoo

__all__ = ["zoo"]

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
INTRODUCTION = """# What fxq says to bad input

Every row was provoked: `python -m pytest tests/cli/test_errors_page.py` makes them all and compares with this
page (`--update-golden` writes it). In each case nothing was written and the source was left as it was. The
command line prints the message, and a traceback only with `--debug`; its exit status is 2 for a SpecError and
1 for the others.

Links are followed only within the model's directory, or into the blobs of the Hugging Face cache that it is
part of; with `--follow-links` also to files elsewhere. `config.json`, `model.safetensors.index.json` and
shards are data: nothing of a model directory is executed without `--trust-remote-code`.

| input | error |
|---|---|
"""
UP, WEIGHT_ONLY, DATA = "model.layers.1.mlp.up_proj.weight", "nvfp4_weight_only", "nvfp4_default-fp8_kv"
INDEX = "model.safetensors.index.json"
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A bad input: `make` spoils the model's directory and returns other options of `fxq.compile`, among
    them `model` or `spec` if they are at fault."""

    what: str
    make: Callable[[Path], Options | None]


def _config(**changes: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return make


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).write_bytes(content)

    return make


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        file = path / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return make


def _first_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return make


def _indexed(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        files = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
        change(files)
        (path / INDEX).write_text(json.dumps({"weight_map": files}))

    return make


def _linked(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        shutil.move(path / name, path.parent / "elsewhere")
        (path / name).symlink_to(path.parent / "elsewhere")

    return make


def _added(**tensors: Tensor) -> Callable[[Path], None]:
    return lambda path: add_tensors(path, {UP if name == "up" else name: t for name, t in tensors.items()})


def _fp8(path: Path, block: Any = (128, 128), **tensors: Tensor) -> None:
    _config(quantization_config={"quant_method": "fp8", "weight_block_size": block})(path)
    add_tensors(path, {name.replace("up", UP): t for name, t in tensors.items()})


def _pickled(path: Path) -> None:
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _spec(text: str) -> Callable[[Path], Options]:
    def make(path: Path) -> Options:
        (path.parent / "mine.yaml").write_text(text)
        return {"spec": path.parent / "mine.yaml"}

    return make


def _calib(content: bytes) -> Callable[[Path], Options]:
    def make(path: Path) -> Options:
        (path.parent / "calib.jsonl").write_bytes(content)
        return {"spec": DATA, "calib": path.parent / "calib.jsonl"}

    return make


def _live(change: Callable[[Any], Any]) -> Callable[[Path], Options]:
    def make(path: Path) -> Options:
        model = load(path)
        change(model)
        return {"model": model}

    return make


def _poisoned(path: Path) -> None:
    tensor = load_file(path / "model.safetensors")[UP].clone()
    tensor[3, 5] = torch.nan
    add_tensors(path, {UP: tensor})


def _packed(model: Any) -> None:
    packed = torch.nn.Parameter(torch.zeros(96, 64, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed


FP8 = torch.zeros(96, 64).to(torch.float8_e4m3fn)
SCALE = torch.ones(1, 1)
CASES = [
    Case("a spec that nobody ships", lambda path: {"spec": "nvfp5"}),
    Case("a pass with a slip in its name", _spec("passes:\n  - fuse-expert\n")),
    Case("a python tag in a spec", _spec("passes:\n  - !!python/object/apply:os.system [ls]\n")),
    Case("a YAML alias (billion laughs)", _spec("passes: [&a [x], *a]\n")),
    Case("YAML nested without end", _spec("[" * 9999)),
    Case("data that a spec needs", lambda path: {"spec": DATA}),
    Case("calibration that is a directory", lambda path: {"spec": DATA, "calib": path}),
    Case("calibration that is binary", _calib(b"\x80\x02}q\x00.")),
    Case("calibration without a line", _calib(b"\n")),
    Case("a calibration line that is no JSON", _calib(b"hello\n")),
    Case("a calibration line without a sample", _calib(b'{"prompt": "hello"}\n')),
    Case("a token that is a float", _calib(b'{"input_ids": [3, 4.0]}\n')),
    Case("a token outside the vocabulary", _calib(json.dumps({"input_ids": [VOCABULARY]}).encode())),
    Case("text without a tokenizer", _calib(b'{"text": "hello"}\n')),
    Case("no such directory", lambda path: {"model": path / "nothing"}),
    Case("no config.json", lambda path: (path / "config.json").unlink()),
    Case("a config.json that is a list", _write("config.json", b"[]")),
    Case("a config.json that is no UTF-8", _write("config.json", b"\xff\xfe{}")),
    Case("a config.json nested without end", _write("config.json", b'{"a":' * 99 + b"1" + b"}" * 99)),
    Case("more layers than tensors", _config(num_hidden_layers=10**9)),
    Case("a buffer larger than memory", _config(head_dim=2**40)),
    Case("weights quantized by another method", _config(quantization_config={"quant_method": "gptq"})),
    Case("pickled weights", _pickled),
    Case("a shard cut short", _first_bytes(lambda data: data[:-100])),
    Case("a header longer than the file", _first_bytes(lambda data: b"\xff" * 8 + data[8:])),
    Case("a header that is no JSON", _first_bytes(lambda data: data[:8] + b"[" * (len(data) - 8))),
    Case("a dtype that nobody knows", _header(lambda h: h[UP].update(dtype="F3"))),
    Case("a shape that is no shape", _header(lambda h: h[UP].update(shape=[-96, -64]))),
    Case("a size that is not that of dtype and shape", _header(lambda h: h[UP].update(shape=[96, 65]))),
    Case("tensors that overlap", _header(lambda h: h.update(more=h[UP]))),
    Case("a hole between tensors", _header(lambda h: h.pop(UP) and None)),
    Case("an index entry outside the directory", _indexed(lambda m: m.update({UP: "../model.safetensors"}))),
    Case("an index entry without a file", _indexed(lambda m: m.update({UP: "more.safetensors"}))),
    Case("an index entry without a tensor", _indexed(lambda m: m.update(more="model.safetensors"))),
    Case("a tensor that the index does not list", _indexed(lambda m: m.pop(UP))),
    Case("a shard that is a link out of the directory", _linked("model.safetensors")),
    Case("a missing tensor", lambda path: drop_tensors(path, UP)),
    Case("a shape that the config contradicts", _added(up=torch.zeros(80, 64).bfloat16())),
    Case("a dtype that is no weight's", _added(up=torch.zeros(96, 64, dtype=torch.int8))),
    Case("FP8 that no config explains", _added(up=FP8)),
    Case("FP8 without its scales", lambda path: _fp8(path, [128, 128], up=FP8)),
    Case(
        "FP8 scales of another shape",
        lambda path: _fp8(path, [64, 64], up=FP8, up_scale_inv=torch.ones(1, 1)),
    ),
    Case("a block size that is none", lambda path: _fp8(path, [0, 128])),
    Case("NaN in a weight", _poisoned),
    Case("a live model on meta", _live(lambda model: model.to("meta"))),
    Case("a live model that is quantized", _live(_packed)),
]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the page has the paths of POSIX")
def test_the_page_says_what_fxq_says(zoo: Zoo, tmp_path: Path, update_golden: bool) -> None:
    rows = []
    for number, case in enumerate(CASES):
        path = Path(shutil.copytree(zoo("llama"), tmp_path / str(number) / "MODEL"))
        options: Options = {"model": path, "spec": WEIGHT_ONLY, **(case.make(path) or {})}
        before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
        with pytest.raises(fxq.FxqError) as caught:
            fxq.compile(**options, out=path.parent / "out")
        assert not (path.parent / "out").exists()
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
        message = str(caught.value).replace(f"{path.parent}/", "")
        assert len(message.splitlines()) <= 3
        cell = message.replace("|", "\\|").replace("\n", "<br>")
        rows.append(f"| {case.what} | {type(caught.value).__name__}: {cell} |\n")
    page = INTRODUCTION + "".join(rows)
    if update_golden:
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page
