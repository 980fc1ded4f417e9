"""Text as people have it: files of every kind, conversations, blends, packed rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fxq
from fxq.cli.arguments import text_of
from fxq.errors import FxqError, SourceError
from fxq.model import open_model, samples_of
from fxq.sources.samples import Blend, load_samples
from tests.families import VOCABULARY, Zoo, write_lines, zoo

__all__ = ["zoo"]


def _load(calib: object, *, samples: int = 100, length: int = 100, **options: Any) -> list[list[int]]:
    def letters(text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]

    return load_samples(calib, letters, vocabulary=VOCABULARY, samples=samples, length=length, **options)


ABC, D = [0, 1, 2], [3]
JSON = {
    "a list": '[{"text": "abc"}, {"input_ids": [3]}]',
    "texts": '["abc",\n "d"]',
    "columns": '{"text": ["abc", "d"]}',
    "columns of ids": '{"input_ids": [[0, 1, 2], [3]]}',
    "lines, which many files of this name hold": '{"text": "abc"}\n{"text": "d"}\n',
}


@pytest.mark.parametrize("kind", JSON)
def test_json(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(JSON[kind])
    assert _load(tmp_path / "text.json") == [ABC, D]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7", r"text\.json: expected a list of samples, found int"),
        ("[" * 100_000, r"text\.json: nested too deeply"),
        ('[{"text": "abc"}, {"text": 7}]', r"text\.json\[1\]: expected text, found 7"),
        ('{"train": ["abc"]}', r"text\.json: expected a column .* found train"),
        ('{"text": ', r"text\.json:1: expected JSON .* other files of text end in \.json, \.parquet, \.txt"),
        ("\udcff", r"text\.json"),
    ],
)
def test_json_that_is_no_samples(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SourceError, match=words):
        _load(tmp_path / "text.json")


def test_plain_text_is_cut_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("ab c\n\ndef")
    assert _load(tmp_path / "book.txt", length=4) == [[0, 1, 2, 3], [4, 5]]
    assert _load(tmp_path / "book.txt", length=2, samples=2) == [[0, 1], [2, 3]]
    assert _load("ab c\n\ndef", length=4) == [[0, 1, 2, 3], [4, 5]]
    (tmp_path / "book.txt").write_bytes(b"ab\xff")
    with pytest.raises(SourceError, match=r"book\.txt: expected UTF-8 text"):
        _load(tmp_path / "book.txt")


def test_a_str_is_text_unless_it_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "abc", [{"text": "d"}])
    assert _load("abc") == [D]
    assert _load("abcd") == [[0, 1, 2, 3]]
    assert _load("see a.json") == [[18, 4, 4, 0, 9, 18, 14, 13]]
    for name in ("nothing.jsonl", "texts/nothing"):
        with pytest.raises(SourceError, match="cannot read"):
            _load(name)


def test_an_array_of_ids() -> None:
    assert _load([np.array(ABC), {"input_ids": np.array([[0, 1], [2, 3]])}]) == [ABC, [0, 1], [2, 3]]


def test_parquet_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"id": [1, 2], "text": ["abc", "d"]})
    held.to_parquet(tmp_path / "text.parquet")
    held.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": held, "test": held}).save_to_disk(tmp_path / "several")
    for calib in (held, tmp_path / "text.parquet", tmp_path / "one", tmp_path / "several" / "train"):
        assert _load(calib) == [ABC, D]
    with pytest.raises(SourceError, match=r"several: holds several datasets.*several/test, .*several/train"):
        _load(tmp_path / "several")
    datasets.Dataset.from_dict({"title": ["abc"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(SourceError, match=r'other\.parquet row 0: expected a key "text".*found title'):
        _load(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(SourceError, match=r"text\.parquet: not valid parquet"):
        _load(tmp_path / "text.parquet")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", refuse)
    (tmp_path / "text.parquet").touch()
    with pytest.raises(SourceError, match="needs pyarrow: pip install pyarrow"):
        _load(tmp_path / "text.parquet")


def test_a_directory_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*save_to_disk.*no file of text"):
        _load(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(SourceError, match=r"give one of its files: a\.jsonl"):
        _load(tmp_path)


TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    "calib", [[{"messages": TALK, "id": 3}], {"messages": [TALK]}, {"messages": TALK}], ids=str
)
def test_conversations_go_through_the_template(calib: object) -> None:
    def chat(messages: Any) -> list[int]:
        return [len(message["content"]) for message in messages]

    assert _load(calib, chat=chat) == [[2, 1]]


@pytest.mark.parametrize("messages", ["hello", [], [{"content": "a"}], [["user", "a"]], None], ids=str)
def test_what_is_no_conversation_is_named(messages: object) -> None:
    with pytest.raises(SourceError, match=r"calib\[0\]: expected (messages such as|token ids)|found none"):
        _load([{"messages": messages}], chat=lambda messages: [])


@pytest.fixture
def instruct(zoo: Zoo, tmp_path: Path) -> Callable[[str | None], Path]:
    """A template -> a model with a tokenizer of that."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(template: str | None) -> Path:
        path = Path(shutil.copytree(zoo("llama"), tmp_path / "instruct"))
        words = {word: i for i, word in enumerate(("<unk>", "user", "hello", "world"))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        fast.chat_template = template
        fast.save_pretrained(path)
        return path

    return made


def test_a_model_with_a_template_reads_conversations_and_doubts_plain_text(
    instruct: Callable[[str | None], Path],
) -> None:
    model = open_model(instruct("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"))
    notes: list[str] = []
    talk = {"messages": [{"role": "user", "content": "hello world"}]}
    assert samples_of(model, [talk], 9, 9, notes=notes) == [[1, 2, 3]]
    assert not notes
    assert samples_of(model, ["hello"], 9, 9, notes=notes) == [[2]]
    (note,) = notes
    assert "the model has a chat template and the text is plain" in note


def test_a_model_without_a_template_reads_no_conversation(instruct: Callable[[str | None], Path]) -> None:
    model = open_model(instruct(None))
    with pytest.raises(SourceError, match="the tokenizer has no chat template"):
        samples_of(model, [{"messages": TALK}], 9, 9)
    notes: list[str] = []
    assert samples_of(model, ["hello"], 9, 9, notes=notes) == [[2]]
    assert not notes


def test_packed_samples_have_one_length() -> None:
    texts = ["abc", "de", "fghi", "j"]
    assert _load(texts, length=4, pack=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert _load(texts, length=4, samples=1, pack=True) == [[0, 1, 2, 3]]
    assert _load(texts, length=40, pack=True) == [list(range(10))]
    assert _load("abcdef", length=4, pack=True) == [[0, 1, 2, 3]]


def test_a_blend_takes_of_each_source_its_share(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 9)
    notes: list[str] = []
    blend = Blend([(file, 3), (["b"] * 9, 1)])
    assert _load(blend, samples=8, notes=notes) == [[0]] * 6 + [[1]] * 2
    assert _load(blend, samples=5) == [[0]] * 4 + [[1]]
    assert not notes
    assert len(_load(Blend([(file, 1), (["b"], 1)]), samples=8, notes=notes)) == 5
    assert notes == ["calib: 4 samples are its share, it has 1"]
    for weights in ((1, 0), (1, -1), (1, float("nan")), (1, "2"), ()):
        with pytest.raises(FxqError, match="positive weights"):
            _load(Blend([("ab", weight) for weight in weights]))  # type: ignore[misc]


def test_files_of_the_command_line_may_have_weights(tmp_path: Path) -> None:
    assert text_of(None) is None
    assert text_of(["a.jsonl"]) == Path("a.jsonl")
    assert text_of(["a.jsonl=3", "b.txt"]) == Blend([(Path("a.jsonl"), 3.0), (Path("b.txt"), 1.0)])
    (odd := tmp_path / "a=3").touch()
    assert text_of([str(odd)]) == odd
    assert text_of(["lr=x.jsonl"]) == Path("lr=x.jsonl")


def test_a_compilation_says_what_it_doubts_of_its_text(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps([{"input_ids": list(range(3, 40))}] * 4))
    done = fxq.compile(
        zoo("llama"),
        "nvfp4_default-fp8_cast_kv",
        calib=tmp_path / "text.json",
        samples=9,
        seq_len=16,
        pack=True,
    )
    assert done.report.calibration_tokens == 9 * 16
    (doubt,) = (w for w in done.report.warnings if w.startswith("calibration: "))
    assert "144 tokens show little" in doubt
