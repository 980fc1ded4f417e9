"""Files of text as samples: JSON lines, JSON, plain text, parquet, and directories that `datasets` wrote."""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxq.errors import SourceError, choices

LONGEST_LINE = 1 << 26  # bytes
_LARGEST_JSON = 1 << 30  # bytes
Samples = Iterator[tuple[str, Any]]  # where one lies, and itself


@dataclass(frozen=True)
class Plain:
    """Text that is not divided into samples."""

    text: str


@dataclass(frozen=True)
class Columns:
    """A mapping of columns, each of which holds something of all samples."""

    columns: Mapping[Any, Any]


def names_file(text: str) -> bool:
    """Whether a string is the name of a file rather than a text: there is one, or it looks like one."""
    if "\n" in text or len(text) > 4096:
        return False
    with contextlib.suppress(OSError, ValueError):  # too long for a name; a NUL in it
        if Path(text).expanduser().exists():
            return True
    return " " not in text and (Path(text).suffix in FILES or "/" in text)


def samples_in(path: Path, characters: int) -> Samples:
    """The samples of a file or directory, told apart by the ending of its name; lines of JSON if unknown.

    characters: of plain text no more than these are of use. Raises SourceError for what cannot be read.
    """
    try:
        if path.is_dir():
            yield from _dataset(path)
        elif path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                yield str(path), Plain(file.read(characters))
        else:
            yield from FILES.get(path.suffix, _json_lines)(path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot read text: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise SourceError(f"{str(path)!r}: cannot read text: {error}") from error


def _json_lines(path: Path) -> Samples:
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, where: str) -> Any:
    if len(line) > LONGEST_LINE:
        raise SourceError(f"{where}: expected a line of JSON, found more than {LONGEST_LINE:,} bytes")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f'{where}: expected JSON such as {{"text": "..."}}: {error}; other files of text end in '
            f"{choices(name for name in (*FILES, '.txt') if name != '.jsonl')}"
        ) from error


def _json(path: Path) -> Samples:
    """A list of samples, or a mapping of columns; lines of JSON, which many files of this name hold."""
    if path.stat().st_size > _LARGEST_JSON:
        raise SourceError(f"{path}: expected at most {_LARGEST_JSON:,} bytes; use lines of JSON, .jsonl")
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise SourceError(f"{path}: nested too deeply for samples") from error
    except json.JSONDecodeError:
        yield from _json_lines(path)
        return
    if isinstance(whole, list):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(whole))
    elif isinstance(whole, dict):
        yield str(path), Columns(whole)
    else:
        raise SourceError(f"{path}: expected a list of samples, found {type(whole).__name__}")


def _parquet(path: Path) -> Samples:
    pyarrow, parquet = _needed("pyarrow", path), _needed("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: not valid parquet: {str(error).splitlines()[0][:200]}") from error


def _dataset(path: Path) -> Samples:
    """What `Dataset.save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = choices(p for p in path.iterdir() if p.is_dir())
        raise SourceError(f"{path}: holds several datasets; give one of them: {splits}")
    if not (path / "state.json").is_file():
        held = sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".parquet", ".txt"))
        found = f"give one of its files: {', '.join(held[:5])}" if held else "found no file of text in it"
        raise SourceError(
            f"{path}: cannot read text of this directory: expected what `save_to_disk` of datasets wrote; "
            f"{found}"
        )
    yield from (
        (f"{path} row {i}", row) for i, row in enumerate(_needed("datasets", path).load_from_disk(str(path)))
    )


def _needed(module: str, path: Path) -> Any:
    """A library that only some files need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SourceError(f"{path}: reading it needs {package}: pip install {package}") from error


FILES: dict[str, Callable[[Path], Samples]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
