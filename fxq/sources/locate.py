"""Where a model is that was given by a path or by its name on the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fxq.errors import SourceError

# owner/name; names without an owner are those of the hub's first models.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ADAPTER = "adapter_config.json"


def model_directory(name: str | Path) -> Path:
    """The directory at a path, or the snapshot that the local cache holds of a hub's model; nothing is
    downloaded. SourceError says what is there instead, and what to do."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and (reason := _other_directory(path)) is not None:
            raise SourceError(f"{path}: {reason}")
        return path
    if path.is_file():
        raise SourceError(f"{path}: {_file(path)}")
    if (found := _cached(str(name))) is not None:
        return found
    hint = ""
    if _HUB_NAME.fullmatch(str(name)):
        hint = f"; if it is one of the hub's, it is not in the local cache yet: hf download {name}"
    raise SourceError(
        f"{path}: no such directory; expected a Hugging Face model with config.json and safetensors{hint}"
    )


def _cached(name: str) -> Path | None:
    """The snapshot of a hub's model that lies in the local cache."""
    if not _HUB_NAME.fullmatch(name):
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub allows
        return None
    return Path(found).parent if isinstance(found, str) else None


def _other_directory(path: Path) -> str | None:
    """What a directory without config.json is, if fxq knows it."""
    if (path / _ADAPTER).is_file():
        base = _adapter(path / _ADAPTER).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base.isprintable() else ""
        return (
            f"an adapter{of}, not a model; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
            ".save_pretrained(NEW)"
        )
    if files := sorted(path.glob("*.gguf")):
        return f"holds {files[0].name}, {_gguf(files[0])}"
    return None


def _adapter(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _gguf(path: Path) -> str:
    load = f"'{path.parent}', gguf_file='{path.name}'"
    return (
        "a GGUF file, weights that llama.cpp has quantized already; give the model that it was made from, or "
        "let transformers decode it (pip install gguf): "
        f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained({load}, dtype='bfloat16').save_pretrained('converted'); "
        f"T.from_pretrained({load}).save_pretrained('converted')\""
    )


def _file(path: Path) -> str:
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".safetensors":
        return "a file of weights; give the directory that it lies in, with config.json"
    return "a file; expected a directory with config.json and safetensors"
