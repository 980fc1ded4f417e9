"""Files of a model directory, and which of them are read: none that an index or a link places outside it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxq.errors import SourceError

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Keys that count layers; one that names a layer (vision_feature_layer) may well be -1.
_DEPTH = re.compile(r"(\w+_)?num_(\w+_)?(layers|blocks)|n_layers?|(\w+_)?(encoder|decoder)_layers|depth")
_DEEPEST = 1000  # layers that any checkpoint may claim
_NESTED = 64
_OTHER_FILES = 1024  # the output's shards, libraries
_PICKLES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")


def allow_files(count: int) -> None:
    """Let the process have so many files open beside those it has, as far as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def check_links(directory: Path, *, follow: bool = False) -> None:
    """SourceError if anything in the directory is a link that leads out of it, or nowhere, or is no file.

    What lies there is read, or copied into the output, so a link must not lend it another file. The Hugging
    Face cache is the exception: there snapshots/<revision>/* are links into blobs/ of the same repository.
    Names that begin with a dot are neither read nor copied. follow: links to files elsewhere are allowed.
    """
    homes = [directory.resolve()]
    if homes[0].parent.name == "snapshots" and homes[0].parent.parent.name.startswith("models--"):
        homes.append(homes[0].parent.parent / "blobs")
    for path in _visible(directory):
        if not path.is_symlink():
            if not path.is_dir() and not path.is_file():
                raise SourceError(f"{path}: expected a file, found a pipe, socket or device")
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
            raise SourceError(f"{path}: a link that leads nowhere: {path.readlink()}") from error
        inside = target not in homes and any(home in target.parents for home in homes)
        if not inside and not target.is_file():
            raise SourceError(f"{path}: a link out of the model directory, to {target}, which is no file")
        if not inside and not follow:
            raise SourceError(
                f"{path}: a link out of the model directory, to {target}; put the file itself there, or "
                "allow such links with --follow-links (follow_links=True in python)"
            )


def _visible(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if not path.name.startswith("."):
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from sorted(path.rglob("*"))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands; SourceError unless it is a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise SourceError(f"{directory}: expected a Hugging Face model directory, found no config.json")
    return json_object(path)


def check_depth(directory: Path, config: Mapping[str, Any], tensors: int) -> None:
    """SourceError if a config.json counts fewer layers than none, or more than its checkpoint could hold,
    before anything is built layer by layer."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_depth(directory, value, tensors)
        elif not _DEPTH.fullmatch(key) or not isinstance(value, (int, float)):
            continue
        elif not 0 <= value <= max(tensors, _DEEPEST):
            file, found = directory / "config.json", str(value)[:40]
            raise SourceError(f"{file}: {key} is {found}; the checkpoint has {tensors} tensors")


def shards(directory: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """(names of the safetensors files of the model, the index's tensor -> file or None without one).

    As transformers has it: the files of the index; without one model.safetensors, or else all there are.
    SourceError if there is none, or the index is wrong about one.
    """
    if (directory / INDEX).is_file():
        listed = _weight_map(directory)
        return tuple(sorted(set(listed.values()))), listed
    if (directory / _SINGLE).is_file():
        return (_SINGLE,), None
    found = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    if not found:
        others = sorted(f.name for f in directory.glob("*") if f.suffix in _PICKLES)
        hint = f"; {', '.join(others[:3])} is not read: convert it to safetensors" if others else ""
        raise SourceError(f"{directory}: expected *.safetensors, found none{hint}")
    return tuple(found), None


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / INDEX
    listed = json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
        raise SourceError(f"{index}: expected a weight_map from tensor names to file names")
    for name in sorted(set(listed.values())):
        if not name or Path(name).name != name or not name.isprintable():
            raise SourceError(f"{index}: {name[:200]!r} leads out of the model directory")
        if not _is_file(directory / name):
            held = sum(1 for file in listed.values() if file == name)
            raise SourceError(
                f"{directory / name}: listed in {INDEX} for {held} tensors, but there is no such file"
            )
    return listed


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; SourceError if it holds none, or one nested without end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {str(error)[:100]}"
        raise SourceError(f"{path}: expected a JSON object: {reason}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(_NESTED):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise SourceError(f"{path}: nested more than {_NESTED} deep")
    return found


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [v for v in inner if isinstance(v, (dict, list))]
