"""What is said before any weight is read is what compiling then does; what cannot be quantized is never left
in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

import fxq
from fxq.cli.main import main
from fxq.errors import SpecError, VerifyError
from fxq.graph.layers import outer_layers
from fxq.graph.program import Program
from fxq.graph.text import parse
from fxq.model import Model, open_model
from fxq.passes import PASSES
from fxq.pipeline import spec
from fxq.preview import Preview, preview, previews
from fxq.report.summary import fold, fold_among, unquantized
from fxq.run.statistics import Calibration
from fxq.sources import Directory
from tests import reader, tiny
from tests.families import VOCABULARY, Zoo, random_model, samples, save, zoo

__all__ = ["zoo"]
DEFAULT, EXPERTS_ONLY, WEIGHT_ONLY = (
    "nvfp4_default-fp8_kv",
    "nvfp4_experts_only-fp8_cast_kv",
    "nvfp4_weight_only",
)
Opened = Callable[[str], Model]


@pytest.fixture(scope="module")
def opened(zoo: Zoo) -> Opened:
    """Family -> its traced model, traced once."""
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            made[name] = open_model(zoo(name))
        return made[name]

    return model


def shown(model: Model, name: str) -> Preview:
    return preview(model, spec.load(name, PASSES))


def reasons(found: Preview) -> dict[str, str]:
    return {name: why for name, _, why in found.excluded}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", WEIGHT_ONLY),
        ("llama_tied", WEIGHT_ONLY),
        pytest.param("qwen3_moe", DEFAULT, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", EXPERTS_ONLY, marks=pytest.mark.slow),
        pytest.param("mixtral", EXPERTS_ONLY, marks=pytest.mark.slow),
        pytest.param("phi3", DEFAULT, marks=pytest.mark.slow),
    ],
)
def test_counts_and_bytes_are_those_that_are_written(
    family: str, name: str, opened: Opened, zoo: Zoo, tmp_path: Path
) -> None:
    found = shown(opened(family), name)
    compiled = fxq.compile(zoo(family), name, calib=samples(2), out=tmp_path / "out")
    written = reader.read_checkpoint(str(tmp_path / "out"))
    assert found.experts + found.linears == len(written.quantized_linears())
    assert found.output_bytes == compiled.report.output_bytes == _bytes(tmp_path / "out")
    assert found.source_bytes == compiled.report.source_bytes == _bytes(zoo(family))
    assert sum(count for _, count in found.groups) == compiled.report.groups
    assert list(found.warnings) == [
        w for w in compiled.report.warnings if "saw no data" not in w and not w.startswith("calibration: ")
    ]


def _bytes(directory: Path) -> int:
    """The bytes of all tensors: each file without its header."""
    total = 0
    for path in directory.glob("*.safetensors"):
        total += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    return total


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError(f"called with {args[1:]}")


def test_nothing_is_read_and_the_model_stays_fit_for_more(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("read", "read_expert", "read_hub"):
        monkeypatch.setattr(Directory, name, refuse)
    model = opened("qwen3_moe")
    before = [(node.name, node.target) for node in model.program.graph.nodes]
    assert shown(model, DEFAULT) == shown(model, DEFAULT)
    assert [(node.name, node.target) for node in model.program.graph.nodes] == before
    assert model.program.calibrated is None
    assert model.program.notes == []


def test_what_stays_has_its_structural_reason_and_names_are_folded(opened: Opened) -> None:
    found = shown(opened("qwen3_moe"), DEFAULT)
    whys = reasons(found)
    assert whys["lm_head"].startswith("the output head")
    assert whys["model.embed_tokens"] == "an embedding"
    assert whys["model.layers.*.mlp.gate"] == "a router: %topk chooses by its result"
    assert whys["model.norm"] == "a vector: norm, bias or scale"
    assert ("model.layers.*.mlp.gate", 2, whys["model.layers.*.mlp.gate"]) in found.excluded
    assert dict(found.groups) == {
        "model.layers.*.self_attn.{q_proj,k_proj,v_proj}": 2,
        "model.layers.*.mlp.experts.*.{gate_proj,up_proj}": 16,
    }
    assert found.kv_cache == "fp8, 2 attentions, scales calibrated"


@pytest.mark.slow
def test_tensors_that_the_class_lacks_are_carried_through(opened: Opened) -> None:
    whys = reasons(shown(opened("deepseek_v3"), EXPERTS_ONLY))
    assert whys["model.layers.*.eh_proj"].startswith("not part of the model's class")


def test_a_spec_without_a_pass_for_them_says_so(opened: Opened, tmp_path: Path) -> None:
    model = opened("qwen3_moe")
    whys = reasons(shown(model, EXPERTS_ONLY))
    assert whys["model.layers.*.self_attn.o_proj"] == "no pass of the spec quantizes linears"
    assert whys["model.layers.*.mlp.gate"].startswith("a router")
    (tmp_path / "linears.yaml").write_text(
        "passes: [quantize-linears, sync-groups, calibrate-bootstrap, lower]"
    )
    found = preview(model, spec.load(tmp_path / "linears.yaml", PASSES))
    assert found.experts == 0
    assert any("no pass of the spec quantizes experts" in why for _, _, why in found.excluded)
    (warning,) = found.warnings
    assert "4 weights left unquantized (model.layers.*.mlp.experts.*.gate_proj, " in warning
    assert "no pass of the spec quantizes experts" in warning


def test_globs_that_did_not_select_are_the_reason(opened: Opened) -> None:
    whys = reasons(shown(opened("llama_tied"), "nvfp4_mlp_only_mse-fp8_cast_kv"))
    assert "skip=['*attn*'" in whys["model.layers.*.self_attn.*"]
    assert whys["model.embed_tokens"].startswith("an embedding, and the output head")


def test_numbers_of_globs_stay_and_the_layers_that_they_name_are_shown(opened: Opened) -> None:
    text = "passes: [{quantize-linears: {skip: ['*.layers.1.*']}}, sync-groups, calibrate-bootstrap, lower]"
    whys = reasons(preview(opened("llama_tied"), spec.parse(text, PASSES, "mine.yaml")))
    assert "skip=['*.layers.1.*']" in whys["model.layers.1.mlp.*"]
    assert "skip=['*.layers.1.*']" in whys["model.layers.1.self_attn.*"]
    assert whys["model.layers.*.input_layernorm"].startswith("a vector")


def test_what_globs_fit_is_listed(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "passes: [{quantize-linears: {only: ['*.mlp.*'], skip: ['*.layers.1.mlp.down*', '*q_prj']}}, lower]"
    )
    mine.write_text(mine.read_text().replace("lower]", "sync-groups, calibrate-bootstrap, lower]"))
    assert main(["specs", str(mine), "--model", str(zoo("llama")), "--hits"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert ["quantize-linears: only: *.mlp.*", "6", "model.layers.*.mlp.down_proj ×2"] in rows
    assert ["quantize-linears: skip: *.layers.1.mlp.down*", "1", "model.layers.1.mlp.down_proj"] in rows
    assert ["quantize-linears: skip: *q_prj", "0", "none"] in rows
    assert main(["specs", str(mine), "--hits"]) == 2
    assert "--model" in capsys.readouterr().err


def test_outer_layers_stay(opened: Opened, tmp_path: Path, zoo: Zoo) -> None:
    text = """\
passes:
  - fuse-experts
  - quantize-experts: {skip_last: 1}
  - quantize-linears: {skip_first: 1}
  - sync-groups
  - calibrate-max
  - calibrate-bootstrap
  - lower
"""
    mine = spec.parse(text, PASSES, "mine.yaml")
    found = preview(opened("qwen3_moe"), mine)
    whys = reasons(found)
    assert whys["model.layers.0.self_attn.o_proj"] == "in the first 1 of 2 layers"
    assert whys["model.layers.1.mlp.experts.*"] == "in the last 1 of 2 layers"
    assert whys["model.layers.*.mlp.gate"].startswith("a router")
    assert (found.experts, found.linears) == (24, 4)
    assert not found.warnings
    fxq.compile(zoo("qwen3_moe"), mine, calib=samples(4), out=tmp_path / "out")
    assert reader.check(str(tmp_path / "out"), str(zoo("qwen3_moe"))) == []
    with pytest.raises(SpecError, match="skip_last is 0 or more; found -1"):
        spec.parse(text.replace("skip_last: 1", "skip_last: -1"), PASSES, "mine.yaml")


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 0, {"l.0.a": "in the first 1 of 3 layers", "l.0.b.7": "in the first 1 of 3 layers"}),
        (0, 1, {"l.10.a": "in the last 1 of 3 layers"}),
        (0, 0, {}),
        (9, 0, dict.fromkeys(("l.0.a", "l.0.b.7", "l.2.a", "l.10.a"), "in the first 9 of 3 layers")),
    ],
)
def test_outer_layers_are_those_of_the_names(first: int, last: int, expected: dict[str, str]) -> None:
    assert outer_layers(["l.10.a", "l.0.a", "l.2.a", "l.0.b.7", "head"], first, last) == expected


@pytest.mark.parametrize(
    ("names", "everything", "expected"),
    [
        (["l.0.a", "l.1.a"], ["l.0.a", "l.1.a"], [("l.*.a", 2)]),
        (["l.0.a", "l.29.a"], [f"l.{i}.a" for i in range(30)], [("l.{0,29}.a", 2)]),
        (["l.3.a", "l.0.b"], ["l.3.a", "l.4.a", "l.0.b"], [("l.3.a", 1), ("l.*.b", 1)]),
        (["l.0.e.1", "l.1.e.1"], [f"l.{i}.e.{j}" for i in (0, 1) for j in (0, 1)], [("l.*.e.1", 2)]),
        (["l.0.e.0", "l.1.e.1"], [f"l.{i}.e.{j}" for i in (0, 1) for j in (0, 1)], [("l.*.e.*", 2)]),
        (["norm"], ["norm", "l.0.a"], [("norm", 1)]),
    ],
)
def test_names_are_folded_among_others(
    names: list[str], everything: list[str], expected: list[tuple[str, int]]
) -> None:
    assert fold_among(names, everything) == expected


NO_DATA = (
    "nvfp4_cast_mxfp4",
    "nvfp4_cast_mxfp4_input_scale_1",
    "nvfp4_weight_only",
    "nvfp4_weight_only_mse",
)


def test_every_spec_has_a_row_and_one_that_does_not_apply_its_reason(opened: Opened) -> None:
    specs = [spec.load(name, PASSES) for name in spec.shipped()]
    rows = {row.spec: row for row in previews(opened("llama_tied"), specs)}
    assert list(rows) == list(spec.shipped())
    for name, row in rows.items():
        assert ("expected stacks of expert weights" in str(row.refused)) == (name.startswith("nvfp4_experts"))
        assert ("in plain numbers, not in MXFP4" in str(row.refused)) == ("cast_mxfp4" in name)
        assert row.needs_data == (name not in NO_DATA)
        assert bool(row.output_bytes) == (row.refused is None)


@pytest.mark.parametrize("writes", [True, False])
def test_a_format_that_cannot_be_written_is_found_before_calibration(
    writes: bool, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "segments", refuse)
    with pytest.raises(fxq.CheckpointError, match="FP8 weights as ModelOpt does"):
        fxq.compile(
            zoo("qwen3_moe"),
            "nvfp4_experts_fp8_rest_mse-fp8_kv",
            calib=samples(2),
            out=tmp_path / "out" if writes else None,
            format="compressed-tensors",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_vision_tower_is_one_line(tmp_path: Path) -> None:
    (family,) = [f for f in tiny.families() if f.architecture == "Qwen3_5MoeForConditionalGeneration"]
    tiny.tiny_model(family).save_pretrained(tmp_path / "model")
    found = shown(open_model(tmp_path / "model"), EXPERTS_ONLY)
    assert found.experts == 72
    (line,) = [(name, why) for name, _, why in found.excluded if "visual" in name]
    assert line == ("model.visual.*", "the text path never reads it")
    assert reasons(found)["model.language_model.layers.*.mlp.shared_expert_gate"].startswith("a gate")
    assert reasons(found)["model.language_model.layers.*.linear_attn.conv1d"] == "a convolution"


def test_stacks_that_are_no_experts_are_not_left_in_silence() -> None:
    """Features of their own for each matrix: block-diagonal, as far as the graph shows."""
    graph = parse("""\
%x : bf16[4,96] = placeholder()
%parts : bf16[4,3,32] = aten.view(%x, [4, 3, 32])
%each : bf16[3,4,32] = aten.transpose.int(%parts, 0, 1)
%w : bf16[3,32,16] = @attn.o_proj
%y : bf16[3,4,16] = aten.bmm(%each, %w)
return [%y]
""")
    (warning,) = unquantized(graph, Program(graph))
    assert warning == "1 weight left unquantized (attn.o_proj): stacked, but no tokens are routed to it"


def test_numbers_of_layers_are_folded_and_sizes_are_not() -> None:
    assert fold(["a.0.b.12", "a.1.b.3", "h.w4", "%topk_3 of 24; needs 16"]) == [
        ("a.*.b.*", 2),
        ("h.w4", 1),
        ("%topk of 24; needs 16", 1),
    ]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose down projections read 24 values, no multiple of 16."""
    head: dict[str, Any] = {"head_dim": 16}
    config = Qwen3MoeConfig(
        **head,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
    )
    return save(random_model(config), tmp_path_factory.mktemp("narrow") / "model")


def test_experts_that_cannot_be_quantized_are_an_error_naming_them(narrow: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"model\.layers\.1\.mlp\.experts\.down_proj.*24.*--allow-partial"):
        fxq.compile(narrow, WEIGHT_ONLY, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_allowed_partial_coverage_is_listed_and_warned_of(narrow: Path, tmp_path: Path) -> None:
    compiled = fxq.compile(narrow, WEIGHT_ONLY, out=tmp_path / "out", allow_partial=True)
    assert reader.check(str(tmp_path / "out"), str(narrow)) == []
    warnings = " ".join(compiled.report.warnings)
    experts = "model.layers.*.mlp.experts.*"
    assert f"1 weight left unquantized ({experts}.down_proj): each expert's input dimension is 24" in warnings
    both = f"{experts}.gate_proj, {experts}.up_proj"
    assert f"1 weight left unquantized ({both}): its layer holds" in warnings
    written = reader.read_checkpoint(str(tmp_path / "out"))
    quantized = set(written.quantized_linears())
    assert {name.split(".")[2] for name in quantized if ".mlp." in name} == {"0"}
    assert {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)} <= quantized
    chosen = spec.load(WEIGHT_ONLY, PASSES).with_flags(partial=True)
    found = preview(open_model(narrow), chosen)
    assert found.output_bytes == compiled.report.output_bytes
    assert found.linears == len(quantized)
    assert reasons(found)["model.layers.*.mlp.experts.*.down_proj"].startswith("each expert's input")


def test_where_nothing_of_experts_can_be_quantized_a_spec_for_experts_is_refused(narrow: Path) -> None:
    chosen = spec.load(EXPERTS_ONLY, PASSES).with_flags(partial=True)
    with pytest.raises(VerifyError, match=r"rewrote nothing.*input dimension is 24"):
        preview(open_model(narrow), chosen)


def test_options_reach_the_passes_that_have_them() -> None:
    chosen = spec.load(DEFAULT, PASSES).with_flags(format="modelopt", partial=True)
    partial = {step.name for step in chosen.passes if getattr(step, "partial", False)}
    assert partial == {"fuse-experts", "quantize-experts", "quantize-linears"}
    with pytest.raises(
        SpecError, match=r"lower: format is one of modelopt, compressed-tensors; found 'gguf'"
    ):
        chosen.with_flags(format="gguf")
