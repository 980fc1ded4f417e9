"""What passes rewrote: the report lists it, and `fxq verify --base` does not call it broken for that."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import fxq
from fxq.audit import Findings, verify_checkpoint
from fxq.report.files import DIRECTORY, Details, write
from fxq.report.summary import Report
from tests import tiny
from tests.audit import rewriting
from tests.browser import probe
from tests.families import Zoo, add_tensors, zoo

__all__ = ["zoo"]

PASSES = (rewriting.HalveNorms, rewriting.MoveHalves, rewriting.DoubleExpert)
SPEC = """
passes:
  - fuse-experts
  - quantize-experts: {{inputs: none, required: false}}
  - {step}
  - quantize-linears: {{inputs: none}}
  - sync-groups
  - calibrate-bootstrap
  - lower
"""
PLAIN = "nvfp4_weight_only"
NORM, Q = (f"model.layers.0.{n}.weight" for n in ("input_layernorm", "self_attn.q_proj"))
NORMS = [
    *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    "model.norm.weight",
]
SAID = "rewritten by a pass: not compared with the base"


def compiled(source: Path, step: str, out: Path, **options: Any) -> fxq.Compiled:
    """A model compiled with one of the passes of rewriting.py before the others, as users give it."""
    out.parent.mkdir(exist_ok=True)
    spec = out.parent / f"{step}.yaml"
    spec.write_text(SPEC.format(step=step))
    made = fxq.compile(source, spec, out=out, passes=PASSES, **options)
    (out / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def halved(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with other norms."""
    out = tmp_path_factory.mktemp("halved") / "out"
    compiled(zoo("llama"), "halve-norms", out)
    return out


@pytest.fixture(scope="module")
def tied(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a Llama whose head was tied, with other norms and other weights behind them."""
    return compiled(zoo("llama_tied"), "move-halves", tmp_path_factory.mktemp("moved") / "out").report


@pytest.fixture(scope="module")
def moved(tied: Report) -> Path:
    """The same Llama."""
    return Path(str(tied.out))


@pytest.fixture
def copy(halved: Path, tmp_path: Path) -> Path:
    """The one with other norms, to be changed."""
    return Path(shutil.copytree(halved, tmp_path / "copy"))


def report_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / DIRECTORY / "report.json").read_text()))


def change_report(path: Path, **fields: Any) -> None:
    (path / DIRECTORY / "report.json").write_text(json.dumps({**report_of(path), **fields}))


def wrong(findings: Findings) -> list[tuple[str, str]]:
    """The errors and warnings: rule and place."""
    return [(item.rule, item.where) for item in (*findings.errors, *findings.warnings)]


def said(findings: Findings) -> list[str]:
    """What is said of rewritten tensors."""
    return [item.message for item in findings if item.rule == "base-rewritten"]


# The report.


def test_the_report_lists_what_is_not_the_source_s(halved: Path, moved: Path) -> None:
    assert (report_of(halved)["rewritten"], report_of(halved)["untied"]) == (NORMS, [])
    doubled = [
        f"model.layers.{i}.{n}_proj.weight"
        for i in (0, 1)
        for n in ("mlp.gate", "mlp.up", "self_attn.k", "self_attn.q", "self_attn.v")
    ]
    found = report_of(moved)
    assert sorted(found["rewritten"]) == sorted([*NORMS, *doubled, "lm_head.weight"])
    assert found["untied"] == ["lm_head"]
    assert not {"rewritten", "untied"} & found["summary"].keys()


def test_the_report_lists_nothing_where_no_pass_rewrote(zoo: Zoo, tmp_path: Path) -> None:
    made = fxq.compile(zoo("llama"), PLAIN, out=tmp_path / "out")
    assert (report_of(tmp_path / "out")["rewritten"], report_of(tmp_path / "out")["untied"]) == ([], [])
    assert made.report.as_dict()["rewritten"] == []
    assert not {"rewritten", "untied"} & {label for label, _ in made.report.rows()}


def test_one_expert_is_listed_under_its_name(zoo: Zoo, tmp_path: Path) -> None:
    compiled(zoo("qwen3_moe"), "double-expert", tmp_path / "out")
    experts = [f"model.layers.{i}.mlp.experts.3" for i in (0, 1)]
    names = [f"{expert}.{n}_proj.weight" for expert in experts for n in ("down", "gate", "up")]
    assert report_of(tmp_path / "out")["rewritten"] == names
    findings = verify_checkpoint(tmp_path / "out", zoo("qwen3_moe"))
    assert not wrong(findings), findings.groups()
    assert said(findings)[0].startswith("6 tensors ")
    change_report(tmp_path / "out", rewritten=names[1:])
    assert wrong(verify_checkpoint(tmp_path / "out", zoo("qwen3_moe"))) == [("error-broken", names[0])]


@pytest.mark.slow
def test_experts_of_one_tensor_are_listed_as_it(tmp_path: Path) -> None:
    tiny.tiny_model(next(f for f in tiny.families() if f.name == "gpt_oss")).save_pretrained(
        tmp_path / "base"
    )
    compiled(tmp_path / "base", "double-expert", tmp_path / "out", allow_partial=True)
    stacks = [f"model.layers.{i}.mlp.experts.{n}_proj" for i in range(3) for n in ("down", "gate_up")]
    assert report_of(tmp_path / "out")["rewritten"] == stacks
    assert not wrong(verify_checkpoint(tmp_path / "out", tmp_path / "base"))


def test_the_summary_has_rows_for_them(tied: Report) -> None:
    rows = dict(tied.rows())
    assert rows["rewritten"].startswith("16 tensors (lm_head.weight, model.layers.*.input_layernorm.weight, ")
    assert rows["untied"].startswith("lm_head")
    assert tied.as_dict()["untied"] == ["lm_head"]


def test_what_is_not_quantized_is_said_to_be_rewritten(moved: Path) -> None:
    reasons = {item["name"]: item["reason"] for item in report_of(moved)["excluded"]}
    assert reasons["model.norm"] == "a vector: norm, bias or scale; rewritten by a pass"
    assert reasons["model.embed_tokens"].startswith("an embedding")
    assert "rewritten" not in reasons["model.embed_tokens"]
    assert reasons["lm_head"].startswith("untied: ")


def test_the_page_has_their_number_and_their_folded_names(moved: Path, tmp_path: Path) -> None:
    page = moved / DIRECTORY / "report.html"
    assert '"model.layers.*.input_layernorm.weight"' in page.read_text()
    found = probe(
        page,
        "return [...document.querySelectorAll('section')].map((s) => s.textContent);",
        tmp_path,
    )
    (section,) = (text for text in found if text.startswith("16 tensors rewritten by passes"))
    assert "model.layers.*.self_attn.q_proj.weight2" in section
    assert "lm_head" in section


def test_the_page_stays_small_if_all_experts_of_a_large_model_are_rewritten(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.down_proj.weight" for i in range(61) for e in range(384)]
    write(Report("spec", rewritten=names), Details("large"), tmp_path)
    assert report_of(tmp_path)["rewritten"] == names
    assert (tmp_path / DIRECTORY / "report.html").stat().st_size < 100_000


# Against the base.


def test_what_a_pass_rewrote_is_said_and_is_no_error(halved: Path, zoo: Zoo) -> None:
    findings = verify_checkpoint(halved, zoo("llama"))
    assert findings.verdict == "good: every rule holds"
    (text,) = said(findings)
    assert text.startswith(f"5 tensors {SAID}: model.layers.*.input_layernorm.weight ×2, ")
    assert text.endswith(", model.norm.weight")
    assert findings.summary["rewritten"] == 5
    assert findings.summary["compared"] == 14


def test_without_the_list_it_is_an_error(copy: Path, zoo: Zoo) -> None:
    change_report(copy, rewritten=[])
    findings = verify_checkpoint(copy, zoo("llama"))
    assert sorted(wrong(findings)) == sorted(("base-changed", name) for name in NORMS)
    assert said(findings) == []
    assert "rewritten" not in findings.summary


def test_what_differs_and_is_not_listed_is_an_error(copy: Path, zoo: Zoo) -> None:
    change_report(copy, rewritten=[name for name in NORMS if name != NORM])
    findings = verify_checkpoint(copy, zoo("llama"))
    assert wrong(findings) == [("base-changed", NORM)]
    assert said(findings)[0].startswith("4 tensors ")


def test_a_single_one_is_named(copy: Path, zoo: Zoo) -> None:
    change_report(copy, rewritten=[NORM])
    assert said(verify_checkpoint(copy, zoo("llama"))) == [
        f"1 tensor {SAID}: model.layers.*.input_layernorm.weight"
    ]


@pytest.mark.parametrize("cast", [False, True])
def test_what_is_listed_keeps_its_shape_and_dtype(cast: bool, copy: Path, zoo: Zoo) -> None:
    norm = load_file(copy / "model.safetensors")[NORM]
    add_tensors(copy, {NORM: norm.float() if cast else norm[:-16].clone()})
    findings = verify_checkpoint(copy, zoo("llama"))
    assert wrong(findings) == [("base-changed", NORM)]
    kind = "F32 [64]" if cast else "BF16 [48]"
    assert f"expected BF16 [64], found {kind}" in [item.message for item in findings]


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_quantized_weights_that_were_rewritten_are_not_broken(form: str, zoo: Zoo, tmp_path: Path) -> None:
    compiled(zoo("llama"), "move-halves", tmp_path / "out", format=form)
    findings = verify_checkpoint(tmp_path / "out", zoo("llama"))
    assert not wrong(findings), findings.groups()
    assert findings.summary["rewritten"] == 5 + 10 + 1
    assert findings.summary["compared"] == 4
    assert findings.summary["worst_sqnr_db"] > 18
    change_report(tmp_path / "out", rewritten=[])
    broken = [
        where for rule, where in wrong(verify_checkpoint(tmp_path / "out", zoo("llama"))) if "error" in rule
    ]
    assert len(broken) == 10


def test_quantized_weights_that_were_rewritten_keep_their_shape(
    moved: Path, zoo: Zoo, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(zoo("llama_tied"), tmp_path / "base"))
    add_tensors(base, {Q: load_file(base / "model.safetensors")[Q][:-16].clone()})
    findings = verify_checkpoint(moved, base)
    assert wrong(findings) == [("base-shape", Q)]
    assert findings.summary["rewritten"] == 15


def test_an_untied_head_is_no_stray(moved: Path, zoo: Zoo, tmp_path: Path) -> None:
    findings = verify_checkpoint(moved, zoo("llama_tied"))
    assert not wrong(findings), findings.groups()
    assert "16 tensors" in said(findings)[0]
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert wrong(verify_checkpoint(copy, zoo("llama_tied"))) == [
        ("base-config", "config.json: tie_word_embeddings")
    ]


def test_a_tensor_of_no_module_that_was_untied_is_a_stray(moved: Path, zoo: Zoo, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    change_report(copy, untied=[])
    assert wrong(verify_checkpoint(copy, zoo("llama_tied"))) == [
        ("base-added", "lm_head.weight"),
        ("base-config", "config.json: tie_word_embeddings"),
    ]
    change_report(copy, untied=["lm_head"])
    head = load_file(copy / "model.safetensors")["lm_head.weight"]
    add_tensors(copy, {"lm_head.weight": head[:, :-1].clone()})  # no tensor of the base is like it
    assert ("base-added", "lm_head.weight") in wrong(verify_checkpoint(copy, zoo("llama_tied")))


# The report as data that nobody vouches for.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON, found"),
        (b"\xff\xfe", "expected JSON, found"),
        (b"[" * 100_000, "expected JSON, found"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "expected JSON, found"),
        (b"[]", "expected an object, found a list"),
        (b'{"rewritten": "model.norm.weight"}', "expected a list of names, found str"),
        (b'{"rewritten": {"model.norm.weight": 1}}', "expected a list of names, found dict"),
        (b'{"rewritten": ["model.norm.weight", 5]}', "expected a list of names, found one with int in it"),
        (b'{"rewritten": null}', "expected a list of names, found NoneType"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_report_that_is_none_vouches_for_nothing(
    content: bytes, message: str, copy: Path, zoo: Zoo
) -> None:
    (copy / DIRECTORY / "report.json").write_bytes(content)
    findings = verify_checkpoint(copy, zoo("llama"))
    (found,) = [item for item in findings if item.rule == "report-invalid"]
    assert message in found.message
    assert found.where.startswith("fxq-report/report.json")
    assert {where for rule, where in wrong(findings) if rule == "base-changed"} == set(NORMS)


def test_a_report_larger_than_any_is_not_read(copy: Path, zoo: Zoo) -> None:
    with (copy / DIRECTORY / "report.json").open("ab") as file:
        file.truncate(1 << 40)  # a hole, which takes no room
    findings = verify_checkpoint(copy, zoo("llama"))
    (found,) = [item for item in findings if item.rule == "report-invalid"]
    assert "expected at most 33,554,432 bytes, found more" in found.message
    assert {where for rule, where in wrong(findings) if rule == "base-changed"} == set(NORMS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("kind", ["none", "directory", "pipe", "a link to nothing", "of another version"])
def test_without_a_report_all_is_as_before(kind: str, copy: Path, zoo: Zoo) -> None:
    file = copy / DIRECTORY / "report.json"
    other = {name: value for name, value in report_of(copy).items() if name not in ("rewritten", "untied")}
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "a link to nothing":
        file.symlink_to(copy / "nothing")
    elif kind == "of another version":
        file.write_text(json.dumps(other))
    assert sorted(wrong(verify_checkpoint(copy, zoo("llama")))) == sorted(("base-changed", n) for n in NORMS)
    assert not wrong(verify_checkpoint(copy))


def test_names_that_are_nowhere_change_nothing(copy: Path, zoo: Zoo) -> None:
    change_report(copy, rewritten=[*NORMS, "../../etc/passwd", "", "model.nothing.weight"], untied=["", "x"])
    findings = verify_checkpoint(copy, zoo("llama"))
    assert not wrong(findings)
    assert findings.summary["rewritten"] == 5
