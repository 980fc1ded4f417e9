"""Passes of third parties: from files, from classes and from installed packages."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fxq.errors import SpecError
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.passes import PASSES, table
from fxq.pipeline.base import Pass
from fxq.pipeline.schema import schema
from fxq.pipeline.spec import parse

FILE = """\
from dataclasses import dataclass
from typing import ClassVar, Literal

from fxq.pipeline.base import Pass


@dataclass(frozen=True)
class Note(Pass):
    \"\"\"Say something.

    tone: how it is said.
    \"\"\"

    tone: Literal["soft", "loud"] = "soft"

    name: ClassVar[str] = "note"
"""


@dataclass(frozen=True)
class Own(Pass):
    """Looks at nothing."""

    name: ClassVar[str] = "own"

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        return iter(())


def file(tmp_path: Path, text: str = FILE, name: str = "my_note.py") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_brings_its_passes(tmp_path: Path) -> None:
    found = table([file(tmp_path)])
    assert found.keys() == PASSES.keys() | {"note"}
    (step,) = parse("passes: [{note: {tone: loud}}]", found, "mine.yaml").passes
    assert (type(step), step.tone) == (found["note"], "loud")  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match="note: tone is one of soft, loud; found 'shrill'"):
        parse("passes: [{note: {tone: shrill}}]", found, "mine.yaml")
    with pytest.raises(SpecError, match=r"there are .*lower, note, quantize-experts"):
        parse("passes: [nota]", found, "mine.yaml")
    assert "note" in str(schema(found))


def test_a_file_is_run_once_a_process(tmp_path: Path) -> None:
    path = file(tmp_path, name="once_a_process.py")
    assert table([path])["note"] is table([path])["note"]


def test_a_file_may_have_the_name_of_a_known_module(tmp_path: Path) -> None:
    assert "note" in table([file(tmp_path, name="json.py")])


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = file(tmp_path / "a")
    second = file(tmp_path / "b", FILE.replace('"note"', '"other"'))
    assert table([first, second]).keys() == PASSES.keys() | {"note", "other"}


def test_a_base_class_without_a_name_is_no_pass_of_its_own(tmp_path: Path) -> None:
    base = FILE.replace("    tone:", "    tone:").replace("class Note(Pass)", "class Note(Base)")
    text = base.replace("@dataclass", "class Base(Pass):\n    pass\n\n\n@dataclass", 1)
    assert table([file(tmp_path, text)]).keys() == PASSES.keys() | {"note"}


def test_a_class_brings_itself() -> None:
    assert table([Own])["own"] is Own


class _Point:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, value: str, loaded: Any) -> None:
        self.value, self.loaded = value, loaded
        self.dist = type("Dist", (), {"name": "some-package"})

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (ImportError("nothing called gone"), "some-package: gone:Pass: left out.* nothing called gone"),
        (dict, "some-package: gone:Pass: left out.* a class that subclasses .*, found <class 'dict'>"),
    ],
)
def test_an_installed_package_whose_pass_is_broken_stops_nothing_and_is_named(
    loaded: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Point("gone:Pass", loaded)])
    with pytest.warns(UserWarning, match=message):
        assert table() == PASSES


def test_an_installed_package_brings_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Point("package:Own", Own)])
    assert table()["own"] is Own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "expected a class that subclasses fxq.pipeline.base.Pass, found none"),
        ("raise ValueError('not today')\n", "cannot load passes: ValueError: not today"),
        (FILE.replace('"note"', '"lower"'), "a pass called 'lower' is known already, from fxq"),
        (FILE.replace(' = "soft"', ""), "note: its option 'tone' has no default"),
        (
            FILE.replace('Literal["soft", "loud"] = "soft"', "complex = 1j"),
            "note: expected options of bool",
        ),
        (FILE.replace("@dataclass(frozen=True)\n", ""), "Note is no dataclass"),
        (FILE.replace("    name: ", "    title: "), "Note has no name"),
    ],
)
def test_a_file_without_a_pass_that_can_be_used_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        table([file(tmp_path, text)])


@pytest.mark.parametrize(
    ("name", "message"), [("gone.py", "No such file"), ("passes.txt", "expected a Python file")]
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        table([tmp_path / name])
