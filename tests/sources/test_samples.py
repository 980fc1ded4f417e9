"""Calibration samples: what lines may look like, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from fxq.errors import SourceError
from fxq.sources.samples import load_samples
from tests.families import VOCABULARY, write_lines


def _letters(text: str) -> Sequence[int]:
    return [ord(letter) - ord("a") for letter in text]


def _load(calib: object, *, samples: int = 100, length: int = 100) -> list[list[int]]:
    return load_samples(calib, _letters, vocabulary=VOCABULARY, samples=samples, length=length)


def test_text_and_token_ids_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "calib.jsonl", [{"text": "abc"}, {"input_ids": [7, 8]}, {"text": "d", "id": 9}]
    )
    assert _load(file) == _load(str(file)) == [[0, 1, 2], [7, 8], [3]]


@pytest.mark.parametrize("item", ["abc", {"text": "abc"}, [0, 1, 2], (0, 1, 2), {"input_ids": (0, 1, 2)}])
def test_python_values_of_every_form(item: Any) -> None:
    assert _load([item]) == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_tensors_of_ids(shape: tuple[int, ...]) -> None:
    assert _load([torch.arange(3).reshape(shape)]) == [[0, 1, 2]]


def test_iterators_are_taken_and_not_read_further_than_needed() -> None:
    def endless() -> Any:
        while True:
            yield "ab"

    assert _load(endless(), samples=3) == [[0, 1]] * 3


def test_samples_are_the_first_ones_cut_to_length() -> None:
    assert _load(["abcdef", "b", "c"], samples=2, length=4) == [[0, 1, 2, 3], [1]]


def test_empty_lines_and_empty_samples_are_skipped_and_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "calib.jsonl"
    file.write_text('\n{"text": ""}\n  \n{"text": "a"}\n{"input_ids": []}\n{"text": "b"}')
    assert _load(file, samples=2) == [[0], [1]]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "calib.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert _load(tmp_path / "calib.jsonl") == [[0], [1]]


BAD_LINES = [
    "text: hello",
    '{"text": ',
    '{"prompt": "hello"}',
    "7",
    "null",
    '{"text": 7}',
    '{"input_ids": "abc"}',
    "{}",
]
BAD_LINES += [
    '{"input_ids": [1, 2.5]}',
    '{"input_ids": [[[1, 2]]]}',
    '{"input_ids": [true]}',
    '{"input_ids": {"a": 1}}',
]
BAD_LINES += ["[" * 100_000, '{"input_ids": [NaN]}']


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24])
def test_a_line_that_cannot_be_used_is_named_with_its_number(line: str, tmp_path: Path) -> None:
    file = tmp_path / "calib.jsonl"
    file.write_text('{"input_ids": [3, 4]}\n\n' + line + "\n")
    with pytest.raises(SourceError) as caught:
        _load(file)
    assert f"{file}:3" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("item", [7, None, 2.5, {"text": None}, [1, None], len], ids=str)
def test_a_python_value_that_cannot_be_used_is_named_with_its_index(item: Any) -> None:
    with pytest.raises(SourceError, match=r"calib\[1\]"):
        _load(["ab", item])


@pytest.mark.parametrize("token", [VOCABULARY, 10**6, -1, 2**70])
def test_a_token_beyond_the_vocabulary_is_named(token: int, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "calib.jsonl", [{"input_ids": [3]}, {"input_ids": [VOCABULARY - 1, token]}])
    with pytest.raises(SourceError, match=rf":2: .*{token}.*{VOCABULARY}"):
        _load(file)


def test_tokens_beyond_the_length_that_is_used_do_not_matter() -> None:
    assert _load([[1, 2, VOCABULARY]], length=2) == [[1, 2]]


@pytest.mark.parametrize("content", ["", "\n \n", '{"text": ""}\n', '{"input_ids": []}\n'])
def test_a_file_without_a_token_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "calib.jsonl").write_text(content)
    with pytest.raises(SourceError, match=r"calib\.jsonl: .*none"):
        _load(tmp_path / "calib.jsonl")


@pytest.mark.parametrize("calib", [[], iter(()), [""]], ids=["list", "iterator", "empty text"])
def test_python_values_without_a_token(calib: object) -> None:
    with pytest.raises(SourceError, match="none"):
        _load(calib)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "calib.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=r"calib\.jsonl"):
        _load(tmp_path / "calib.jsonl")


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        _load(tmp_path / name)


def test_padding_is_dropped_and_batches_are_split_into_rows() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert _load([batch, {"input_ids": [[1, 2], [3]]}]) == [[5, 6, 7], [8, 9], [1, 2], [3]]


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(SourceError, match="attention_mask of the shape of input_ids"):
        _load([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])
    with pytest.raises(SourceError, match="attention_mask of ones and zeros"):
        _load([{"input_ids": [1, 2], "attention_mask": ["a", 1]}])


def test_samples_without_a_token_are_counted() -> None:
    with pytest.raises(SourceError, match=r"^calib: expected token ids, found none in 2 samples"):
        _load(["", {"input_ids": []}])


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["abc", "d"]},
        {"input_ids": [[0, 1, 2], [3]]},
        {"input_ids": torch.tensor([[0, 1, 2], [3, 9, 9]]), "attention_mask": [[1, 1, 1], [1, 0, 0]]},
        BatchEncoding({"input_ids": [[0, 1, 2], [3]], "attention_mask": [[1, 1, 1], [1]]}),
        {"text": (text for text in ("abc", "d")), "id": [1, 2]},
    ],
    ids=["texts", "ids", "padded ids", "what a tokenizer gives", "an iterator"],
)
def test_a_mapping_of_columns_is_a_batch(columns: object) -> None:
    assert _load(columns) == [[0, 1, 2], [3]]


def test_a_mapping_of_datasets_is_refused_with_a_way_out() -> None:
    splits = {"train": ["abc"], "test": ["d"]}
    with pytest.raises(
        SourceError, match=r'^calib: expected a column "text".*train, test.*calib\[\'train\'\]$'
    ):
        _load(splits)
    with pytest.raises(SourceError, match=r"found no key$"):
        _load({})


def test_a_column_is_named_with_the_index_of_what_is_wrong() -> None:
    with pytest.raises(SourceError, match=r'^calib\["text"\]\[1\]: expected text, found None'):
        _load({"text": ["abc", None]})
