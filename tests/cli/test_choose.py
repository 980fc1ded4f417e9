"""`fxq choose`: the frontier, a spec that compiles, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxq.cli.main import main
from fxq.passes import PASSES
from fxq.pipeline.spec import load
from tests.families import Zoo, samples, write_lines, zoo

__all__ = ["zoo"]

QUICK = ["--set", "choose-formats.score=squared"]


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "calib.jsonl", [{"input_ids": ids} for ids in samples(4)])


def test_it_prints_the_frontier_and_writes_a_spec_that_compiles(
    zoo: Zoo, tmp_path: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(zoo("llama")), tmp_path / "mine.yaml"
    assert main(["choose", model, "--bits", "6", "--calib", str(calib), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "chosen" in printed
    assert "were predicted" in printed
    spec = load(out, PASSES)
    assert {getattr(step, "weights", None) for step in spec.passes} >= {"fp8", "nvfp4"}
    into = ["--calib", str(calib), "--out", str(tmp_path / "made")]
    assert main(["compile", model, "--spec", str(out), *into]) == 0


def test_a_budget_of_the_command_takes_the_place_of_the_specs(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    given = ["--set", "choose-formats.bits=9", "--size", "1e-3 GB", *QUICK, "--json", "--out", str(out)]
    assert main(["choose", str(zoo("llama")), *given]) == 2
    given[3] = "120 KB"
    assert main(["choose", str(zoo("llama")), *given]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["bytes"] <= 120_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--bits", "3"], "bits: 3 is less than the smallest of the formats offered; expected 4.5 to 16"),
        (["--bits", "x"], "choose-formats.bits=x: choose-formats: bits is float or null; found 'x'"),
        (["--spec", "nvfp4_weight_only"], "nvfp4_weight_only: expected a spec with choose-formats; it has"),
        (["--out", "mine.txt"], "expected a name that ends in .yaml"),
        (["--samples", "0"], "samples is at least 1, a whole number; found 0"),
    ],
)
def test_what_cannot_be_chosen_writes_nothing(
    zoo: Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [] if "--spec" in given else QUICK
    assert main(["choose", str(zoo("llama")), *quick, *given]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    assert main(["choose", str(zoo("llama")), *QUICK, "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"
