"""fxq in Python as people use it: what is given wrongly is named, what is printed can be read."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxq
from fxq.cli.main import main
from fxq.model import device_of
from fxq.view.folded import fold
from tests.families import Zoo, zoo

__all__ = ["zoo"]
WEIGHT_ONLY = "nvfp4_weight_only"
SPEC = {"passes": [{"quantize-linears": {"inputs": "none"}}, "sync-groups", "calibrate-bootstrap", "lower"]}


@pytest.fixture(scope="module")
def compiled(zoo: Zoo) -> fxq.Compiled:
    return fxq.compile(zoo("llama"), SPEC)


def test_a_mapping_is_a_spec(compiled: fxq.Compiled, zoo: Zoo) -> None:
    assert compiled.report.linear_nodes == 14
    glob = ["*.layers.0.*"]  # one object in two places is no alias
    twice = {
        "passes": [{"quantize-linears": {"inputs": "none", "only": glob, "skip": glob}}, *SPEC["passes"][1:]]
    }
    with pytest.raises(fxq.FxqError, match="quantize-linears rewrote nothing"):
        fxq.compile(zoo("llama"), twice)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"spec": 7}, "spec: expected the name of a shipped spec, .* found 7"),
        ({"spec": None}, "spec: expected .* found None"),
        ({"spec": {"passes": ["nope"]}}, "spec:2: no pass is called 'nope'"),
        ({"spec": {"passes": [{"lower": {"formt": 1}}]}}, "lower has no option 'formt'; it has: format"),
        ({"spec": {"passes": [len]}}, "spec: expected names, numbers, lists"),
        ({"calib": 7}, "calib: expected a file, a text or an iterable of samples, found int"),
        ({"evaluate": [7]}, r"evaluate\[0\]: expected text or a list of token ids, found 7"),
        ({"samples": "3"}, "samples is at least 1, a whole number; found '3'"),
        ({"samples": True}, "samples is at least 1"),
        ({"seq_len": 2.5}, "seq_len is at least 1"),
        ({"eval_seq_len": 1}, "eval_seq_len is at least 2"),
        ({"shard_bytes": "5GB"}, "shard_bytes is at least 1"),
        ({"out": 7}, "out: expected a path, found 7"),
        ({"resume": "no"}, "resume: expected True or False, found 'no'"),
        ({"device": "gpu"}, "no device is called 'gpu'; there are auto, cpu, cuda"),
        ({"device": None}, "no device is called None"),
        ({"format": 7}, "lower: format is one of"),
        ({"passes": "mine.py"}, "passes: expected a list of classes and Python files, found 'mine.py'"),
        ({"passes": [7]}, "passes: expected a class or a Python file, found 7"),
        ({"progress": True}, "progress: expected a function or None, found True"),
    ],
)
def test_an_argument_of_another_kind_is_named(wrong: dict[str, Any], words: str, zoo: Zoo) -> None:
    with pytest.raises(fxq.FxqError, match=words) as caught:
        fxq.compile(**{"model": zoo("llama"), "spec": WEIGHT_ONLY, **wrong})
    assert len(str(caught.value).splitlines()) <= 3


def test_dir_lists_what_is_public() -> None:
    assert set(dir(fxq)) == {*fxq.__all__, "__version__"}


def test_what_is_compiled_is_shown_in_short_and_as_a_table(compiled: fxq.Compiled, tmp_path: Path) -> None:
    assert repr(compiled) == "<Compiled llama with spec, not written: save(DIR) does>"
    assert repr(compiled.report).startswith("<Report of spec: 14 quantize nodes")
    assert "<th>quantize nodes</th>" in compiled._repr_html_()
    compiled.report.warnings.append("a < b")
    assert "<td>a &lt; b</td>" in compiled._repr_html_()
    compiled.report.warnings.clear()


def test_the_graph_prints_folded_and_is_the_graph(compiled: fxq.Compiled) -> None:
    graph = compiled.graph
    assert str(graph) == fold(graph)
    assert " x {" in str(graph)
    assert list(graph.nodes) == list((compiled.program.calibrated or compiled.program.graph).nodes)
    assert len(copy.deepcopy(graph).nodes) == len(graph.nodes)


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto").type == "cuda"


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fxq {fxq.__version__}\n"


def test_what_happens_is_logged_where_it_is_wanted(zoo: Zoo, tmp_path: Path, capfd: Any) -> None:
    log = tmp_path / "log"
    command = [
        "compile",
        zoo("llama"),
        "--spec",
        WEIGHT_ONLY,
        "--out",
        tmp_path / "out",
        "--log-file",
        log,
        "-v",
    ]
    assert main([str(a) for a in command]) == 0
    assert "INFO compile llama with nvfp4_weight_only on " in log.read_text()
    assert "INFO write: " in log.read_text()
    assert "\nwrite: " in capfd.readouterr().err
    assert main([str(a) for a in command]) == 1
    assert "ERROR " in log.read_text().splitlines()[-1]
    assert "expected a new or empty directory" in log.read_text().splitlines()[-1]
    assert main(["specs", "--log-file", str(tmp_path)]) == 2
    assert "--log-file" in capfd.readouterr().err


@pytest.mark.slow
def test_a_library_prints_no_progress_where_nobody_looks(zoo: Zoo) -> None:
    code = f"import fxq; fxq.compile({str(zoo('llama'))!r}, {WEIGHT_ONLY!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout
    assert not found.stderr
