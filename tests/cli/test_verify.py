"""`fxq verify` on the command line: what passes rewrote, and what both models make of a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fxq
from fxq.cli.main import main
from tests.families import Zoo, add_tensors, drop_tensors, samples, write_lines, zoo

__all__ = ["zoo"]

PASSES = Path(__file__).parents[1] / "audit" / "rewriting.py"
SPEC = "passes: [{step}, {{quantize-linears: {{inputs: none}}}}, sync-groups, calibrate-bootstrap, lower]"
TEXT = samples(5, seed=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", [{"input_ids": ids} for ids in TEXT])


@pytest.fixture(scope="module")
def outputs(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pass of rewriting.py -> what `fxq compile --passes` makes of a Llama with it."""
    root, made = tmp_path_factory.mktemp("outputs"), dict[str, Path]()
    for step in ("halve-norms", "move-halves"):
        spec = root / f"{step}.yaml"
        spec.write_text(SPEC.format(step=step))
        made[step] = root / step
        options = ["--passes", str(PASSES), "--spec", str(spec), "--out", str(made[step])]
        assert main(["compile", str(zoo("llama")), *options]) == 0
        (made[step] / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not cut, so that words are found whole."""
    monkeypatch.setenv("COLUMNS", "1000")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `fxq verify`."""
    capsys.readouterr()
    status = main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_compile_says_what_was_rewritten(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(SPEC.format(step="halve-norms"))
    options = ["--passes", str(PASSES), "--spec", str(tmp_path / "mine.yaml")]
    assert main(["compile", str(zoo("llama")), *options, "--out", str(tmp_path / "a")]) == 0
    assert "rewritten" in capsys.readouterr().out
    assert main(["compile", str(zoo("llama")), *options, "--out", str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rewritten"]) == 5
    assert "model.norm.weight" in found["rewritten"]
    assert found["untied"] == []


def test_what_a_pass_rewrote_is_one_line_and_good(
    outputs: dict[str, Path], zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, outputs["halve-norms"], "--base", zoo("llama"))
    assert status == 0
    assert "good: every rule holds" in out
    assert out.count("rewritten by a pass: not compared with the base") == 1
    assert "5 tensors rewritten by a pass" in out


def test_the_same_with_its_list_emptied_is_broken(
    outputs: dict[str, Path], zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(outputs["halve-norms"], tmp_path / "copy"))
    report = copy / "fxq-report" / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "rewritten": []}))
    status, out, _ = run(capsys, copy, "--base", zoo("llama"))
    assert status == 1
    assert "broken: 5 errors" in out
    assert "base-changed" in out


def test_a_listed_tensor_of_another_shape_is_broken(
    outputs: dict[str, Path], zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(outputs["halve-norms"], tmp_path / "copy"))
    norm = load_file(copy / "model.safetensors")["model.norm.weight"]
    add_tensors(copy, {"model.norm.weight": norm[:32].clone()})
    status, out, _ = run(capsys, copy, "--base", zoo("llama"))
    assert status == 1
    assert "broken: 1 error" in out
    assert "model.norm.weight: expected BF16 [64], found BF16 [32]" in out


def test_text_compares_the_functions_below_the_findings(
    outputs: dict[str, Path], zoo: Zoo, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, outputs["move-halves"], "--base", zoo("llama"), "--text", text)
    assert status == 0
    _, _, below = out.partition("good: every rule holds")
    expected = fxq.evaluate(outputs["move-halves"], TEXT, base=zoo("llama"))
    assert expected.against is not None
    for words in (
        f"{expected.tokens} predicted tokens of 5 samples",
        f"{expected.perplexity:.4f}",
        f"{expected.against.perplexity:.4f}",
        f"{expected.against.kl['mean']:.5f} nats per token",
        f"{expected.against.top1_agreement:.2%}",
    ):
        assert words in below


def test_text_in_json_lies_under_against(
    outputs: dict[str, Path], zoo: Zoo, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = {}
    for step, out in outputs.items():
        given = [out, "--base", zoo("llama"), "--text", text, "--samples", 3, "--seq-len", 9, "--json"]
        status, printed, _ = run(capsys, *given)
        found = json.loads(printed)
        assert (status, found["verdict"]) == (0, "good: every rule holds")
        against[step] = found["against"]
        expected = fxq.evaluate(out, TEXT, base=zoo("llama"), samples=3, seq_len=9)
        assert expected.against is not None
        assert against[step].pop("seconds") > 0
        assert against[step] == {
            "base": str(zoo("llama")),
            "samples": 3,
            "tokens": 3 * 8,
            "perplexity": expected.perplexity,
            "base_perplexity": expected.against.perplexity,
            "kl": expected.against.kl,
            "top1_agreement": expected.against.top1_agreement,
            "notes": [],
        }
    # One pass changes what the model computes, the other does not.
    assert against["halve-norms"]["kl"]["mean"] > 2 * against["move-halves"]["kl"]["mean"]


def test_without_text_there_is_nothing_under_against(
    outputs: dict[str, Path], zoo: Zoo, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed, _ = run(capsys, outputs["halve-norms"], "--base", zoo("llama"), "--json")
    assert set(json.loads(printed)) == {"verdict", "counts", "summary", "groups", "findings"}


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_text_without_a_base_is_a_usage_error(
    json_too: tuple[str, ...], outputs: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = run(capsys, outputs["halve-norms"], "--text", text, *json_too)
    assert (status, out) == (2, "")
    assert error.startswith("fxq: verify --text: expected --base MODEL")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--samples", "0"], 2, "samples is at least 1"),
        (["--device", "tpu"], 2, "tpu"),
        (["--text", "nowhere.jsonl"], 1, "nowhere.jsonl: cannot read text"),
    ],
)
def test_what_was_found_is_printed_even_if_the_models_cannot_be_run(
    options: list[str],
    status: int,
    words: str,
    outputs: dict[str, Path],
    zoo: Zoo,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [outputs["move-halves"], "--base", zoo("llama"), "--text", text, *options]
    found, out, error = run(capsys, *given)
    assert (found, words in error) == (status, True)
    assert "good: every rule holds" in out
    found, out, error = run(capsys, *given, "--json")
    assert (found, words in error) == (status, True)
    assert json.loads(out)["against"] is None


def test_a_broken_checkpoint_is_broken_whatever_its_text_says(
    outputs: dict[str, Path], zoo: Zoo, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(outputs["move-halves"], tmp_path / "copy"))
    (copy / "fxq-report" / "report.json").unlink()
    status, out, _ = run(capsys, copy, "--base", zoo("llama"), "--text", text)
    assert status == 1
    assert "top-1 agreement" in out
    drop_tensors(copy, "model.layers.0.mlp.up_proj.weight_scale_2")
    status, out, error = run(capsys, copy, "--base", zoo("llama"), "--text", text)
    assert status == 1
    assert "part-missing" in out
    assert "weight_scale_2 to decode it with" in error
