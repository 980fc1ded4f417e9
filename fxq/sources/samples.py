"""Samples of calibration text: JSON lines or python values become lists of token ids, checked before
anything is traced."""

import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fxq.errors import SourceError

LONGEST_LINE = 1 << 26  # bytes
Encode = Callable[[str], Sequence[int]]


def load_samples(
    calib: object, encode: Encode, *, vocabulary: int, samples: int, length: int
) -> list[list[int]]:
    """At most `samples` lists of at most `length` token ids.

    calib: a .jsonl path whose lines are {"text": ...} or {"input_ids": [...]}, or an iterable of such
    mappings, of strings or of id lists, or a mapping of columns "text" or "input_ids". Ids may be a batch
    [B, S]; what an "attention_mask" beside them leaves out is padding, and dropped. Raises SourceError naming
    the line when one cannot be used, or when there are none.
    """
    found: list[list[int]] = []
    count = 0
    for where, item in _items(calib):
        count += 1
        for ids in _rows(item, _named(encode, where), where):
            for token in ids[:length]:
                if not 0 <= token < vocabulary:
                    raise SourceError(
                        f"{where}: token id {_short(token)} is outside the model's vocabulary of {vocabulary}"
                    )
            if ids and len(found) < samples:
                found.append(ids[:length])
        if len(found) == samples:
            break
    if not found:
        expected = f"token ids, found none in {count} samples" if count else "samples of text, found none"
        raise SourceError(f"{_name(calib)}: expected {expected}")
    return found


def _items(calib: object) -> Iterable[tuple[str, Any]]:
    if not isinstance(calib, (str, Path, Iterable)):
        raise SourceError(
            f"calib: expected a .jsonl path or an iterable of samples, found {type(calib).__name__}"
        )
    if isinstance(calib, Mapping):
        yield from _columns(calib)
        return
    if not isinstance(calib, (str, Path)):
        yield from ((f"calib[{i}]", item) for i, item in enumerate(calib))
        return
    path = Path(calib).expanduser()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1):
                if line.strip():
                    yield f"{path}:{number}", _json(line, f"{path}:{number}")
    except OSError as error:
        raise SourceError(f"{path}: cannot read lines of text: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise SourceError(f"{str(path)!r}: cannot read lines of text: {error}") from error


def _columns(calib: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """The samples of a mapping of columns, such as a tokenizer gives."""
    if "input_ids" in calib:
        yield "calib", calib
        return
    texts = calib.get("text")
    if isinstance(texts, str):
        yield "calib", calib
    elif isinstance(texts, Iterable):
        yield from ((f'calib["text"][{i}]', {"text": text}) for i, text in enumerate(texts))
    else:
        names = [str(name) for name in calib]
        hint = f"; if they are datasets, give one of them: calib[{names[0]!r}]" if names else ""
        raise SourceError(
            f'calib: expected a column "text" or "input_ids" in a mapping, found '
            f"{_short(', '.join(names)) if names else 'no key'}{hint}"
        )


def _json(line: bytes, where: str) -> Any:
    if len(line) > LONGEST_LINE:
        raise SourceError(f"{where}: expected a line of JSON, found more than {LONGEST_LINE:,} bytes")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: expected UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f'{where}: expected JSON such as {{"text": "..."}}: {error}') from error


def _named(encode: Encode, where: str) -> Encode:
    """A tokenizer whose failures name the sample."""

    def named(text: str) -> Sequence[int]:
        try:
            text.encode("utf-8")  # half of a surrogate pair is no text
            return encode(text)
        except SourceError:
            raise
        except Exception as error:  # whatever a tokenizer raises
            reason = (str(error).splitlines() or [""])[0][:200]
            raise SourceError(
                f"{where}: the tokenizer cannot encode this text: {type(error).__name__}: {reason}"
            ) from error

    return named


def _rows(item: Any, encode: Encode, where: str) -> list[list[int]]:
    if isinstance(item, str):
        return [list(encode(item))]
    kept: Any = None
    if isinstance(item, Mapping):
        if isinstance(item.get("text"), str):
            return [list(encode(item["text"]))]
        if "text" in item and "input_ids" not in item:
            raise SourceError(f"{where}: expected text, found {_short(item['text'])}")
        if "input_ids" not in item:
            raise SourceError(
                f'{where}: expected a key "text" or "input_ids", found '
                f"{_short(', '.join(map(str, item))) if item else 'no key'}"
            )
        item, kept = item["input_ids"], item.get("attention_mask")
    rows = _lists(item, where, "text or a list of token ids")
    if kept is None:
        return rows
    masks = _lists(kept, where, "an attention_mask of ones and zeros")
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise SourceError(f"{where}: expected an attention_mask of the shape of input_ids, found another")
    return [
        [t for t, keep in zip(row, mask, strict=True) if keep] for row, mask in zip(rows, masks, strict=True)
    ]


def _lists(item: Any, where: str, expected: str) -> list[list[int]]:
    """One list of integers, or a batch of them, as lists."""
    values = item.tolist() if isinstance(item, Tensor) else item
    nested = isinstance(values, (list, tuple)) and bool(values) and isinstance(values[0], (list, tuple))
    rows = values if nested else [values]
    for row in rows:
        if not isinstance(row, (list, tuple)) or any(type(t) is not int for t in row):
            raise SourceError(f"{where}: expected {expected}, found {_short(item)}")
    return [list(row) for row in rows]


def _short(value: object) -> str:
    """A value in one line of a message."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text[:60] if text.isprintable() else repr(text[:60])


def _name(calib: object) -> str:
    return str(calib) if isinstance(calib, (str, Path)) else "calib"
