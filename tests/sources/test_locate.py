"""Models as people have them: each that is no directory of safetensors is named, with what to do."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import fxq
from fxq.errors import SourceError
from fxq.model import located, open_model
from fxq.sources.locate import model_directory
from tests.families import Zoo, load, zoo

__all__ = ["zoo"]


@pytest.fixture
def cached(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of owner/some-model in a local cache, which links to blobs as the hub's do."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--some-model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(zoo("llama"), repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_a_name_of_the_hub_is_found_in_the_local_cache(cached: Path, tmp_path: Path) -> None:
    assert model_directory("owner/some-model") == cached
    done = fxq.compile("owner/some-model", "nvfp4_weight_only", out=tmp_path / "out")
    assert done.report.tensors_quantized


def test_one_that_is_not_there_comes_with_the_command_that_gets_it(cached: Path) -> None:
    with pytest.raises(SourceError, match=r"not in the local cache yet: hf download owner/other$"):
        model_directory("owner/other")
    with pytest.raises(SourceError, match=r"no such directory.*safetensors$"):
        model_directory("/nowhere/at/all")


def _adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (_adapter, "", r"an adapter of owner/base, not a model; merge it first: .*merge_and_unload\(\)"),
        (lambda path: (path / "adapter_config.json").write_text("["), "", r"an adapter, not a model"),
        (lambda path: (path / "m.gguf").touch(), "", r"holds m\.gguf, a GGUF file.*gguf_file='m\.gguf'"),
        (lambda path: (path / "m.gguf").touch(), "m.gguf", r"m\.gguf: a GGUF file.*gguf_file='m\.gguf'"),
        (lambda path: (path / "m.safetensors").touch(), "m.safetensors", "give the directory"),
        (lambda path: (path / "m.txt").touch(), "m.txt", "a file; expected a directory"),
    ],
)
def test_what_is_something_else_is_named(make: Any, name: str, words: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(SourceError, match=words) as caught:
        open_model(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_compiled_model_is_the_model(zoo: Zoo) -> None:
    model = load(zoo("llama"))
    assert located(torch.compile(model)) is model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            SimpleNamespace(merge_and_unload=lambda: None),
            r"adapters beside its weights.*merge_and_unload\(\)",
        ),
        (torch.nn.Linear(2, 2), "expected a Hugging Face directory, .*found Linear"),
        (None, "found NoneType"),
        (7, "found int"),
    ],
)
def test_an_object_that_is_no_model_is_named(model: Any, words: str) -> None:
    for call in (lambda: fxq.compile(model, "nvfp4_weight_only"), lambda: fxq.evaluate(model, [[1, 2]])):
        with pytest.raises(SourceError, match=words):
            call()


def test_adapters_within_a_model_and_a_model_within_a_wrapper_are_named(zoo: Zoo) -> None:
    model = load(zoo("llama"))
    with pytest.raises(SourceError, match=r"found DataParallel; give its \.module"):
        located(torch.nn.DataParallel(model))
    model._hf_peft_config_loaded = True
    with pytest.raises(SourceError, match="adapters beside its weights"):
        located(model)
