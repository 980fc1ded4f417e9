"""Text in square brackets and between colons is no markup: every command prints it as it is."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config

from fxq.cli import tables
from fxq.cli.main import main
from tests.families import VOCABULARY, Zoo, random_model, samples, save, write_lines, zoo

__all__ = ["zoo"]
# What a console that knows markup takes for a style, its end, an unknown tag, a picture.
NAMES = ("[in, out]", "[bold]", ":smile:", "[/]")
SPEC = "nvfp4_weight_only"
OWN = "passes: [quantize-linears: {inputs: none}, sync-groups, calibrate-bootstrap, lower]"


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose path holds all of NAMES; lines are not cut, so that they are found whole."""
    monkeypatch.setenv("COLUMNS", "1000")
    path = tmp_path / "[in, out][0-9][bold]:smile:[" / "]"
    path.mkdir(parents=True)
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that succeeds."""
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_compile_verify_and_eval_print_paths_as_they_are(
    odd: Path, zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(zoo("llama"), odd / "model"))
    assert f" {odd / 'out'} " in printed(capsys, "compile", model, "--spec", SPEC, "--out", odd / "out")
    assert str(odd / "out") in printed(capsys, "verify", odd / "out")
    text = write_lines(odd / "text.jsonl", [{"input_ids": ids} for ids in samples(2)])
    found = printed(capsys, "eval", odd / "out", "--base", model, "--text", text)
    assert f"{odd / 'out'}: " in found
    assert f"({model})" in found


def test_findings_of_verify_keep_their_brackets(
    odd: Path, zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, "compile", zoo("llama"), "--spec", SPEC, "--out", odd / "out")
    (odd / "out" / "[in, out][bold]:smile:.bin").write_bytes(b"")
    (odd / "out" / "model-[in, out][bold]:smile:.safetensors").write_bytes(b"")
    main(["verify", str(odd / "out")])
    assert "model-[in, out][bold]:smile:.safetensors" in capsys.readouterr().out


def test_warnings_of_compile_keep_their_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    model = save(random_model(config), tmp_path / "model")
    text = printed(capsys, "compile", model, "--spec", SPEC, "--out", tmp_path / "out")
    assert "hold it as [in, out]; NVFP4 is defined for [out, in], which" in " ".join(text.split())


def test_specs_prints_names_and_warnings_as_they_are(
    odd: Path, zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = odd / "[in, out][bold]:smile:.yaml"
    mine.write_text(OWN)
    assert "[in, out][bold]:smile:, before" in printed(capsys, "specs", mine, "--model", zoo("llama"))
    model = Path(shutil.copytree(zoo("llama"), odd / "[in, out][bold]:smile:"))
    assert "[in, out][bold]:smile:, " in printed(capsys, "specs", "--model", model)


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_messages_print_it_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = tables.console()
    table = tables.grid(f"title {name}", f"head {name}")
    table.add_row(f"cell {name}")
    console.print(table)
    console.print(tables.facts([(f"label {name}", f"value {name}")], title=f"of {name}"))
    console.print(tables.labelled(f"warning {name}", f"text {name}", "yellow"))
    found = capsys.readouterr().out
    for word in ("title", "head", "cell", "label", "value", "of", "warning", "text"):
        assert f"{word} {name}" in found


@pytest.mark.parametrize("name", NAMES)
def test_the_progress_bar_prints_it_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with tables.progress(f"label {name}", 2) as step:
        step(1)
    assert f"label {name}" in capsys.readouterr().err


def test_without_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 30.0, 40.0, 60.0])
    monkeypatch.setattr(tables, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with tables.progress("calibrate", 100) as step:
        for done in (10, 15, 10, 65):
            step(done)
    assert capsys.readouterr().err.splitlines() == [
        "calibrate: 25% after 0:00:30, about 0:01:30 left",
        "calibrate: 100% after 0:01:00",
    ]
    with tables.progress("nothing to do", 0) as step:
        step(1)
    assert not capsys.readouterr().err
