"""Samples of calibration text: files or python values become lists of token ids, checked before anything is
traced."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxq.errors import SourceError, SpecError
from fxq.sources.text_files import Columns, Plain, names_file, samples_in

# Of plain text so many characters a token are enough: tokens of more are rare.
_CHARACTERS = 16
Encode = Callable[[Any], Sequence[int]]


@dataclass(frozen=True)
class Blend:
    """Text of several sources: of n samples one of weight w gives n times its share of all weights.

    parts: (a source, its weight), each source given as text is.
    """

    parts: Sequence[tuple[object, float]]


@dataclass(frozen=True)
class _Reading:
    """What `load_samples` is given beside the text."""

    encode: Encode
    chat: Encode | None
    vocabulary: int
    samples: int
    length: int
    pack: bool
    notes: list[str]
    name: str


def load_samples(
    calib: object,
    encode: Encode,
    *,
    vocabulary: int,
    samples: int,
    length: int,
    chat: Encode | None = None,
    pack: bool = False,
    notes: list[str] | None = None,
    name: str = "calib",
) -> list[list[int]]:
    """At most `samples` lists of at most `length` token ids.

    calib: a file (.jsonl, .json, .txt, .parquet, or a directory of `datasets`), or an iterable of texts, id
    lists or mappings with "text", "messages" or "input_ids", or a mapping of such columns, or one text, or a
    Blend. A text alone, and a .txt file, is cut into pieces; other samples are cut off. Ids may be a batch
    [B, S]; what an "attention_mask" beside them leaves out is padding, and dropped.
    encode: text -> token ids. chat: a list of messages -> token ids; None if there is no template for them.
    vocabulary: how many tokens there are. pack: whether samples are joined and cut into lists of `length` ids
    each. notes: what the user should know of the text is added. name: of the argument, for errors. Raises
    SourceError naming the line when one cannot be used, or when there are none.
    """
    notes = [] if notes is None else notes
    reading = _Reading(encode, chat, vocabulary, samples, length, pack, notes, name)
    return _blended(calib, reading) if isinstance(calib, Blend) else _loaded(calib, reading)


def _loaded(calib: object, reading: _Reading) -> list[list[int]]:
    found: list[list[int]] = []
    count = held = 0
    most = reading.samples * (reading.length if reading.pack else 1)  # ids, or samples
    for where, item in _items(calib, reading):
        count += 1
        for ids in _rows(item, reading, where):
            used = ids if reading.pack else ids[: reading.length]
            for token in used:
                if not 0 <= token < reading.vocabulary:
                    raise SourceError(
                        f"{where}: token id {_short(token)} is outside the model's vocabulary of "
                        f"{reading.vocabulary}"
                    )
            if used and held < most:
                found.append(used)
                held += len(used) if reading.pack else 1
        if held >= most:
            break
    if not found:
        expected = f"token ids, found none in {count} samples" if count else "samples of text, found none"
        raise SourceError(f"{_name(calib, reading)}: expected {expected}")
    return _packed(found, reading) if reading.pack else found


def _packed(found: Sequence[Sequence[int]], reading: _Reading) -> list[list[int]]:
    """Samples one behind the other, cut into rows of one length; what is left over goes if there is a row."""
    ids = [token for sample in found for token in sample][: reading.samples * reading.length]
    rows = list(_cut(ids, reading.length))
    return rows[:-1] if len(rows) > 1 and len(rows[-1]) < reading.length else rows


def _blended(blend: Blend, reading: _Reading) -> list[list[int]]:
    weights = [weight for _, weight in blend.parts]
    if not weights or not all(isinstance(w, (int, float)) and 0 < w < math.inf for w in weights):
        raise SpecError(
            f"Blend: expected (source, weight) pairs with positive weights, found {_short(weights)}"
        )
    ends = [round(reading.samples * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    found: list[list[int]] = []
    for (source, _), start, end in zip(blend.parts, ends, ends[1:], strict=False):
        share = end - start
        if share == 0:
            reading.notes.append(
                f"{_name(source, reading)}: its weight gives it none of {reading.samples} samples"
            )
            continue
        part = _loaded(source, dataclasses.replace(reading, samples=share))
        if len(part) < share:
            reading.notes.append(
                f"{_name(source, reading)}: {share} samples are its share, it has {len(part)}"
            )
        found += part
    return found


def _items(calib: object, reading: _Reading) -> Iterator[tuple[str, Any]]:
    if isinstance(calib, Path) or (isinstance(calib, str) and names_file(calib)):
        characters = _CHARACTERS * reading.samples * reading.length
        for where, item in samples_in(Path(calib).expanduser(), characters):
            yield from _columns(item.columns, where) if isinstance(item, Columns) else [(where, item)]
    elif isinstance(calib, str):
        yield reading.name, Plain(calib)
    elif isinstance(calib, Mapping):
        yield from _columns(calib, reading.name)
    elif isinstance(calib, Iterable):
        yield from ((f"{reading.name}[{i}]", item) for i, item in enumerate(calib))
    else:
        raise SourceError(
            f"{reading.name}: expected a file, a text or an iterable of samples, found {type(calib).__name__}"
        )


def _columns(columns: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The samples of a mapping of columns, such as a tokenizer gives."""
    if "input_ids" in columns:
        yield where, columns
        return
    for name in ("text", "messages"):
        column = columns.get(name)
        if isinstance(column, str) or (name == "messages" and _is_conversation(column)):
            yield where, columns
            return
        if isinstance(column, Iterable):
            yield from ((f'{where}["{name}"][{i}]', {name: value}) for i, value in enumerate(column))
            return
    names = [str(name) for name in columns]
    hint = f"; if they are datasets, give one of them: {where}[{names[0]!r}]" if names else ""
    raise SourceError(
        f'{where}: expected a column "text", "messages" or "input_ids" in a mapping, found '
        f"{_short(', '.join(names)) if names else 'no key'}{hint}"
    )


def _is_conversation(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)


def _encoded(encode: Encode, text: Any, where: str) -> list[int]:
    """What a tokenizer makes of a text or conversation; its failures name the sample."""
    try:
        if isinstance(text, str):
            text.encode("utf-8")  # half of a surrogate pair is no text
        return list(encode(text))
    except SourceError:  # there is no tokenizer, or no template
        raise
    except Exception as error:  # whatever a tokenizer, or a template, raises
        reason = (str(error).splitlines() or [""])[0][:200]
        what = "text" if isinstance(text, str) else "conversation"
        raise SourceError(
            f"{where}: the tokenizer cannot encode this {what}: {type(error).__name__}: {reason}"
        ) from error


def _rows(item: Any, reading: _Reading, where: str) -> list[list[int]]:
    """The token ids of one sample, or of a batch of them."""
    if isinstance(item, str):
        return [_encoded(reading.encode, item, where)]
    if isinstance(item, Plain):
        ids = _encoded(reading.encode, item.text, where)
        return [ids] if reading.pack else list(_cut(ids, reading.length))
    kept: Any = None
    if isinstance(item, Mapping):
        if isinstance(item.get("text"), str):
            return [_encoded(reading.encode, item["text"], where)]
        if "messages" in item:
            return [_conversation(item["messages"], reading, where)]
        if "text" in item and "input_ids" not in item:
            raise SourceError(f"{where}: expected text, found {_short(item['text'])}")
        if "input_ids" not in item:
            raise SourceError(
                f'{where}: expected a key "text", "messages" or "input_ids", found '
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


def _cut(ids: Sequence[int], length: int) -> Iterator[list[int]]:
    return (list(ids[i : i + length]) for i in range(0, len(ids), length))


def _conversation(messages: Any, reading: _Reading, where: str) -> list[int]:
    if not _is_conversation(messages) or not all("role" in message for message in messages):
        raise SourceError(
            f'{where}: expected messages such as {{"role": "user", "content": "..."}}, found '
            f"{_short(messages)}"
        )
    if reading.chat is None:
        raise SourceError(f'{where}: the tokenizer has no chat template; give "text" or "input_ids"')
    return _encoded(reading.chat, messages, where)


def _lists(item: Any, where: str, expected: str) -> list[list[int]]:
    """One list of integers, or a batch of them, as lists."""
    values = item.tolist() if hasattr(item, "tolist") else item  # a tensor, or an array
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


def _name(calib: object, reading: _Reading) -> str:
    return str(calib) if isinstance(calib, (str, Path)) else reading.name
