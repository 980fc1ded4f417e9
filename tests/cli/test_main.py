"""The command line as a user meets it: what is printed, where, and with which exit status."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx
import pytest

import fxq
from fxq.cli.main import main
from fxq.evaluate import evaluation
from fxq.graph.text import dump, parse
from fxq.model import Model
from fxq.sources import Directory
from tests import reader
from tests.families import Zoo, samples, write_lines, zoo

__all__ = ["zoo"]
SPEC = "nvfp4_default_mse-fp8_cast_kv"


@pytest.fixture(scope="module")
def model(zoo: Zoo) -> Path:
    return zoo("qwen3_moe")


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calib") / "calib.jsonl"
    return write_lines(path, [{"input_ids": ids} for ids in samples(4)])


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that succeeds."""
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_compile_prints_a_summary_and_writes_a_good_checkpoint(
    model: Path, calib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = printed(capsys, "compile", model, "--spec", SPEC, "--calib", calib, "--out", out, "--eval", calib)
    for word in (
        "quantize nodes",
        "experts",
        "bootstrapped",
        "groups",
        "bits per weight",
        "dB",
        "perplexity",
    ):
        assert word in text
    assert reader.check(str(out), str(model)) == []


def test_compile_measures_what_it_wrote_as_eval_does(
    model: Path, calib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--eval", calib, "--eval-samples", 2, "--eval-seq-len", 5, "--json")
    report = json.loads(
        printed(capsys, "compile", model, "--spec", SPEC, "--calib", calib, "--out", out, *options)
    )
    found = fxq.evaluate(out, calib, base=model, samples=2, seq_len=5)
    assert found.tokens == 2 * 4
    assert found.against is not None
    expected = {
        "perplexity_before": found.against.perplexity,
        "perplexity_after": found.perplexity,
        "kl_divergence": found.against.kl["mean"],
        "top1_agreement": found.against.top1_agreement,
    }
    assert {name: report[name] for name in expected} == expected
    written = json.loads((out / "fxq-report" / "report.json").read_text())
    assert written["summary"] == pytest.approx(written["summary"] | expected, abs=1e-6)
    assert "evaluate" in written["measured"]["seconds"]
    assert written["made"]["evaluation"]["samples"] == 2
    card = (out / "README.md").read_text()
    assert f"| perplexity | {found.perplexity:.4f} |" in card
    assert "| evaluation text | 2 samples, 10 tokens |" in card
    assert "perplexity_after" in (out / "fxq-report" / "report.html").read_text()
    assert sorted(path.name for path in (out / "fxq-report").iterdir()) == ["report.html", "report.json"]


def test_text_to_measure_on_is_checked_before_anything_is_traced(
    model: Path,
    calib: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Model, "program", property(_never))
    short = write_lines(tmp_path / "short.jsonl", [{"input_ids": [3]}])
    for text, words in ((tmp_path / "none.jsonl", "none.jsonl: cannot read"), (short, "two tokens or more")):
        command = (
            "compile",
            model,
            "--spec",
            SPEC,
            "--calib",
            calib,
            "--out",
            tmp_path / "out",
            "--eval",
            text,
        )
        assert main([str(a) for a in command]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_measurement_leaves_the_output_and_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", _interrupted)
    out, text = tmp_path / "out", write_lines(tmp_path / "text.jsonl", [{"input_ids": [3, 4]}])
    command = ("compile", model, "--spec", "nvfp4_weight_only", "--out", out, "--eval", text)
    assert main([str(a) for a in command]) == 130
    assert f"interrupted; {out} is complete: measure it with fxq eval {out}" in capsys.readouterr().err
    assert reader.check(str(out), str(model)) == []


def _never(*args: object, **kwargs: object) -> None:
    raise AssertionError("called")


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "spec",
    [SPEC, "nvfp4_weight_only", pytest.param("nvfp4_default_gptq-fp8_cast_kv", marks=pytest.mark.slow)],
)
def test_progress_counts_all_work_and_no_more(spec: str, model: Path, tmp_path: Path) -> None:
    shown: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
        shown[label] = [total]
        yield shown[label].append

    text = samples(8, 40)
    fxq.compile(model, spec, calib=text, out=tmp_path / "out", evaluate=text, progress=progress)
    data = "weight_only" not in spec
    assert list(shown) == ["calibrate and write" if data else "pack and write", "evaluate"]
    for label, (total, *steps) in shown.items():
        assert sum(steps) == pytest.approx(total, rel=0.1), label
        assert max(steps) < total / 4, label


def test_a_dry_run_checks_all_and_writes_nothing(
    model: Path,
    calib: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Directory, "read", _never)
    out = tmp_path / "out"
    command = ("compile", model, "--spec", SPEC, "--calib", calib, "--out", out, "--eval", calib, "--dry-run")
    text = printed(capsys, *command)
    for words in ("56: 48 of experts", "a router: %topk", "4 samples, ", "tokens show little"):
        assert words in text
    assert not list(tmp_path.iterdir())
    for wrong, status in ((("--format", "x"), 2), (("--eval", "none.jsonl"), 1), (("--out", model), 1)):
        assert main([str(a) for a in (*command, *wrong)]) == status
    assert main([str(a) for a in ("compile", model, "--spec", SPEC, "--out", out, "--dry-run")]) == 2
    assert "needs calibration data" in capsys.readouterr().err


def test_compile_prints_json_when_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = printed(capsys, "compile", model, "--spec", "nvfp4_weight_only", "--out", out, "--json")
    report = json.loads(text)
    assert report["out"] == str(out)
    assert report["sqnr_db"] > 15
    assert report["tensors_quantized"] == len(reader.read_checkpoint(str(out)).quantized_linears())


def test_dump_graph_folds_and_its_full_text_parses_back(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = ("dump-graph", model, "--spec", SPEC, "--after", "sync-groups")
    folded, full = printed(capsys, *stage), printed(capsys, *stage, "--full")
    assert dump(parse(full)) == full
    assert len(folded.splitlines()) * 4 < len(full.splitlines())
    assert " x {" in folded


def test_dump_graph_shows_what_changed_and_why(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = ("dump-graph", model, "--spec", SPEC)
    changed = printed(capsys, *stage, "--after", "fuse-experts", "--diff", "trace")
    assert any(line.startswith("+") and "fxq.expert_linear" in line for line in changed.splitlines())
    assert any(line.startswith("-") and "aten.bmm" in line for line in changed.splitlines())
    reasons = printed(capsys, *stage, "--explain", "quantize-linears")
    assert "a router" in reasons
    assert "the output head" in reasons


def test_dump_graph_narrows_to_a_cone_or_a_glob(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = printed(capsys, "dump-graph", model, "--only", "aten.topk")
    names = [line.split()[0] for line in only.splitlines()]
    assert names
    cone = json.loads(printed(capsys, "dump-graph", model, "--cone", names[0], "--format", "json"))
    network: Any = networkx.node_link_graph(cone, edges="edges")
    assert networkx.is_directed_acyclic_graph(network)
    assert {node for node, degree in network.out_degree() if degree == 0} == {names[0][1:]}
    dot = printed(capsys, "dump-graph", model, "--cone", names[0], "--format", "dot")
    assert dot.startswith("digraph")
    assert f'"{names[0][1:]}"' in dot


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--after", "lower"], 2, ["--after", "trace"]),
        (["--cone", "nothing_like_it"], 2, ["nothing_like_it"]),
        (["--spec", "no-such-spec"], 2, ["no-such-spec", "nvfp4_weight_only"]),
        (["--spec", SPEC, "--diff", "lower", "--after", "fuse-experts"], 2, ["--diff", "lower"]),
    ],
)
def test_dump_graph_mistakes_name_the_choices(
    arguments: list[str], status: int, words: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump-graph", str(model), *arguments]) == status
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert len(message.splitlines()) <= 3


def test_specs_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    listed = printed(capsys, "specs")
    assert SPEC in listed
    assert "calibrate-mse" in printed(capsys, "specs", SPEC)
    assert main(["specs", "nope"]) == 2


def test_specs_shows_what_one_would_do_to_a_model(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "specs", SPEC, "--model", model)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.replace("│", " ").split())
    for words in (
        "56: 48 of experts, 8 other linears",
        "model.layers.*.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.*.mlp.gate ×2",
        "a router: %topk",
        "bits per weight",
        "needed",
    ):
        assert words in flat
    found = json.loads(printed(capsys, "specs", SPEC, "--model", model, "--json"))
    assert found["experts"] == 48
    assert {
        "name": "model.layers.*.mlp.gate",
        "count": 2,
        "reason": "a router: %topk chooses by its result",
    } in (found["excluded"])


def test_specs_has_a_row_for_each_spec_that_applies_to_a_model(
    zoo: Zoo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "specs", "--model", zoo("llama_tied"))
    assert max(map(len, text.splitlines())) <= 80
    assert SPEC in text
    assert "does not apply: quantize-experts rewrote nothing" in " ".join(text.split())
    assert main(["specs", "nvfp4_experts_only-fp8_cast_kv", "--model", str(zoo("llama_tied"))]) == 1
    assert "expected stacks of expert weights" in capsys.readouterr().err


def test_specs_takes_a_file_with_a_model_only(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "passes: [{quantize-linears: {only: ['*.mlp.*']}}, sync-groups, calibrate-bootstrap, lower]"
    )
    assert main(["specs", str(mine)]) == 2
    assert "--model" in capsys.readouterr().err
    found = json.loads(printed(capsys, "specs", mine, "--model", zoo("llama_tied"), "--json"))
    assert found["spec"] == "mine"
    assert found["linears"] == 6


@pytest.mark.parametrize("command", [[], ["compile"], ["dump-graph"], ["verify"], ["eval"], ["specs"]])
def test_help_is_fast_to_reach_and_has_examples(command: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fxq", *command, "--help"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0
    assert "usage: " in found.stdout
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert not {"torch", "rich", "yaml"} & imported
    if command:
        assert "examples:" in found.stdout


def test_a_failed_compile_says_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compile", str(model), "--spec", SPEC, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fxq: ")
    assert "--calib" in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_report_prints_the_summary(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "out")
    lines = str(compiled.report).splitlines()
    assert lines[0] == "fxq compiled with nvfp4_weight_only"
    assert f"output           {tmp_path / 'out'}" in lines


def test_passes_of_a_file_are_known_to_the_schema_and_to_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from fxq.pipeline.base import Pass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Pass):\n"
        '    """Does nothing."""\n\n'
        '    name: ClassVar[str] = "my-own"\n'
    )
    assert main(["specs", "--schema", "--passes", str(file)]) == 0
    assert '"my-own"' in capsys.readouterr().out
    spec = tmp_path / "wrong.yaml"
    spec.write_text("passes: [my-oun]\n")
    assert main(["specs", str(spec), "--model", str(tmp_path), "--passes", str(file)]) == 2
    assert "no pass is called 'my-oun'; there are" in (error := capsys.readouterr().err)
    assert "my-own" in error
