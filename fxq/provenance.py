"""Provenance: how an output was made, in plain values for its report, enough to make it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxq.model import Model, versions
from fxq.pipeline.spec import Spec
from fxq.sources import fingerprint
from fxq.sources.samples import Blend
from fxq.sources.text_files import names_file

_CACHED = "models--"  # how the hub's cache names the directories of models


def provenance(model: Model, spec: Spec, **options: Any) -> dict[str, Any]:
    """What the report says of a run. options: what decides the output besides, in plain values."""
    return {
        "model": model_source(model),
        "spec": spec.as_mapping(),
        "options": options,
        "versions": versions(),
    }


def model_source(model: Model) -> str:
    """The hub's name of a model that lies in the local cache, the path of another directory, or a class."""
    if model.directory is None:
        return f"{model.name} in memory"
    path = model.directory.resolve()
    for parent in path.parents:
        if parent.name.startswith(_CACHED):
            return f"{parent.name.removeprefix(_CACHED).replace('--', '/')}@{path.name}"
    return str(path)


def of_text(text: object, samples: Sequence[Sequence[int]] | None, **options: Any) -> dict[str, Any] | None:
    """The text of a run: where it came from, and what of it was used. None without any."""
    if samples is None:
        return None
    lengths = [len(ids) for ids in samples]
    return {
        "from": _named(text),
        "samples": len(samples),
        "tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "tokens_hash": fingerprint.of_samples(samples).rpartition(" ")[2],
        **options,
    }


def _named(text: object) -> Any:
    if isinstance(text, Blend):
        return [{"from": _named(source), "weight": weight} for source, weight in text.parts]
    if isinstance(text, Path) or (isinstance(text, str) and names_file(text)):
        return str(text)
    return f"{type(text).__name__} in memory"
