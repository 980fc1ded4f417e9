"""A model directory: which links are followed, and what is read through them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from fxq.errors import SourceError
from fxq.sources import Directory
from fxq.sources.files import check_links
from tests.families import Zoo, zoo

__all__ = ["zoo"]


@pytest.fixture
def linked(zoo: Zoo, tmp_path: Path) -> Path:
    """A checkpoint whose shard lies elsewhere."""
    model = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    (tmp_path / "shards").mkdir()
    shutil.move(model / "model.safetensors", tmp_path / "shards" / "model.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "shards" / "model.safetensors")
    return model


def test_a_link_out_of_the_directory_is_refused_with_the_way_to_allow_it(linked: Path) -> None:
    with pytest.raises(SourceError, match=r"shards/model\.safetensors; .*--follow-links \(follow_links=True"):
        Directory(linked)


def test_shards_kept_elsewhere_are_read_if_links_are_followed(linked: Path, zoo: Zoo) -> None:
    through, plain = Directory(linked, follow_links=True), Directory(zoo("llama"))
    assert through.infos == plain.infos
    for key in plain.infos:
        assert torch.equal(through.read_hub(key), plain.read_hub(key)), key


@pytest.mark.parametrize("target", ["gone", "loop", ".", "..", "../shards"])
def test_only_links_to_files_are_followed(target: str, linked: Path) -> None:
    (linked / "loop").symlink_to(target)
    with pytest.raises(SourceError, match=r"model/loop: a link"):
        check_links(linked, follow=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_link_to_a_pipe_is_not_followed(linked: Path) -> None:
    os.mkfifo(linked.parent / "pipe")
    (linked / "notes.txt").symlink_to(linked.parent / "pipe")
    with pytest.raises(SourceError, match=r"notes\.txt: a link"):
        check_links(linked, follow=True)


def test_a_snapshot_of_the_hub_s_cache_is_read_as_it_is(zoo: Zoo, tmp_path: Path) -> None:
    """There every file is a link into blobs of the same repository."""
    repository = tmp_path / "models--somebody--some-model"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(zoo("llama").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert Directory(snapshot).infos == Directory(zoo("llama")).infos
    (tmp_path / "secret.txt").write_text("not yours")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(SourceError, match=r"notes\.txt: a link out of the model directory"):
        Directory(snapshot)
