"""A spec is a pipeline; every mistake is named by file, line and choices, before anything is traced."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from fxq.errors import SpecError
from fxq.passes import PASSES
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.pipeline.spec import Spec, load, parse, shipped


def options(step: object) -> dict[str, Any]:
    """What a pass was given."""
    return dataclasses.asdict(cast(Any, step))


FILE = "mine.yaml"
SHIPPED = (
    "nvfp4_all_lm_head_mse-fp8_cast_kv",
    "nvfp4_auto-fp8_cast_kv",
    "nvfp4_cast_mxfp4",
    "nvfp4_cast_mxfp4_input_scale_1",
    "nvfp4_default-fp8_cast_kv",
    "nvfp4_default-fp8_kv",
    "nvfp4_default_gptq-fp8_cast_kv",
    "nvfp4_default_hessian-fp8_cast_kv",
    "nvfp4_default_learned-fp8_cast_kv",
    "nvfp4_default_mse-fp8_cast_kv",
    "nvfp4_experts_fp8_rest_mse-fp8_kv",
    "nvfp4_experts_only-fp8_cast_kv",
    "nvfp4_experts_only_fp8_blocks_kept",
    "nvfp4_experts_only_gptq-fp8_cast_kv",
    "nvfp4_experts_only_hessian-fp8_cast_kv",
    "nvfp4_experts_only_learned-fp8_cast_kv",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_experts_weight_only_fp8_attention-fp8_cast_kv",
    "nvfp4_mlp_fp8_attention_mse-fp8_kv",
    "nvfp4_mlp_only_mse-fp8_cast_kv",
    "nvfp4_weight_only",
    "nvfp4_weight_only_gptq",
    "nvfp4_weight_only_hessian",
    "nvfp4_weight_only_learned",
    "nvfp4_weight_only_mse",
)


def read(text: str) -> Spec:
    return parse(text, PASSES, where=FILE)


def error(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert len(str(caught.value)) < 600, "an error never quotes a whole file"
    return str(caught.value)


def only(step: str) -> str:
    return f"description: one pass\npasses:\n  - {step}\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_spec_is_its_own_pipeline(name: str) -> None:
    spec = load(name, PASSES)
    assert spec.name == name
    assert spec.description
    listed = [
        next(iter(p)) if isinstance(p, dict) else p
        for p in yaml.safe_load(shipped()[name].read_text())["passes"]
    ]
    assert [step.name for step in spec.passes] == listed
    assert listed[-1] == "lower"
    for step, entry in zip(spec.passes, yaml.safe_load(shipped()[name].read_text())["passes"], strict=True):
        for option, value in (next(iter(entry.values())) if isinstance(entry, dict) else {}).items():
            assert getattr(step, option) == (tuple(value) if isinstance(value, list) else value)


def test_these_are_the_shipped_specs() -> None:
    assert tuple(shipped()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_spec_is_what_its_name_says(name: str) -> None:
    steps = {step.name: step for step in load(name, PASSES).passes}
    assert ("calibrate-mse" in steps) == ("mse" in name or "auto" in name)
    assert ("choose-formats" in steps) == ("resolve-choices" in steps) == ("auto" in name)
    assert ("calibrate-hessian" in steps) == ("hessian" in name)
    assert (
        ("gptq" in steps)
        == ("retarget" in steps)
        == ("fold-scales" in steps)
        == ("gptq" in name or "learned" in name)
    )
    assert ("learn" in steps) == ("learned" in name)
    assert ("quantize-linears" in steps) == ("experts_only" not in name or "fp8_blocks" in name)
    assert ("keep-fp8-blocks" in steps) == ("fp8_blocks_kept" in name)
    assert ("fix-input-scales" in steps) == ("input_scale" in name)
    assert ("cast-mxfp4" in steps) == ("cast_mxfp4" in name)
    assert ("quantize-kv" in steps) == name.endswith("_kv")
    if name.endswith("_kv"):
        assert options(steps["quantize-kv"])["scale"] == ("cast" if "cast" in name else "calibrate")
    inputs = {options(steps[s])["inputs"] for s in ("quantize-linears", "quantize-experts") if s in steps}
    if "weight_only" in name or name == "nvfp4_cast_mxfp4":
        assert "none" in inputs
    assert inputs - {"none", "nvfp4"} == (
        {"fp8"}
        if "_fp8_rest" in name or "_fp8_attention" in name
        else ({"fp8_blocks"} if "fp8_blocks" in name else set())
    )


def test_options_reach_the_pass() -> None:
    spec = read(only("quantize-linears: {inputs: none, only: ['*.mlp.*', 'a'], skip: '*.gate'}"))
    assert options(spec.passes[0]) == {
        "weights": "nvfp4",
        "inputs": "none",
        "only": ("*.mlp.*", "a"),
        "skip": ("*.gate",),
        "head": False,
        "stored": (),
        "skip_first": 0,
        "skip_last": 0,
        "partial": False,
    }


@pytest.mark.parametrize("entry", ["quantize-linears", "quantize-linears:", "quantize-linears: {}"])
def test_a_pass_without_options_has_its_defaults(entry: str) -> None:
    assert read(only(entry)).passes == (PASSES["quantize-linears"](),)


def test_a_null_format_means_none() -> None:
    assert options(read(only("quantize-linears: {inputs: null}")).passes[0])["inputs"] == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            only("quantize-linears: {skips: []}"),
            "mine.yaml:3: quantize-linears has no option 'skips'; it has: head, inputs, only, partial, "
            "skip, skip_first, skip_last, stored, weights",
        ),
        (
            only("quantise-linears"),
            "mine.yaml:3: no pass is called 'quantise-linears'; there are calibrate-bootstrap,",
        ),
        (only("quantise-linears: {weights: nvfp4}"), "mine.yaml:3: no pass is called 'quantise-linears'"),
        (
            only("quantize-linears: {weights: int4}"),
            "mine.yaml:3: quantize-linears: weights is one of nvfp4, fp8, fp8_blocks; found 'int4'",
        ),
        (
            only("quantize-linears: {inputs: 4}"),
            "mine.yaml:3: quantize-linears: inputs is one of nvfp4, fp8, fp8_blocks, none; found 4",
        ),
        (
            only("quantize-linears: {inputs: [nvfp4]}"),
            "mine.yaml:3: quantize-linears: inputs is one of nvfp4, fp8, fp8_blocks, none; found ['nvfp4']",
        ),
        (
            only("quantize-linears: {weights: fp8}"),
            "mine.yaml:3: quantize-linears: weights: fp8 and inputs: nvfp4 do not go together; "
            "engines know nvfp4 with nvfp4 or none, and fp8 with fp8",
        ),
        (
            only("quantize-linears: {skip: 3}"),
            "mine.yaml:3: quantize-linears: skip is a list of texts, such as globs; found 3",
        ),
        (
            only("quantize-linears: {skip: [3]}"),
            "mine.yaml:3: quantize-linears: skip is a list of texts, such as globs; found [3]",
        ),
        (
            only("quantize-linears: {skip: {a: b}}"),
            "mine.yaml:3: quantize-linears: skip is a list of texts, such as globs; found {'a': 'b'}",
        ),
        (
            only("quantize-linears:\n      weights: nvfp4\n      skip: 3"),
            "mine.yaml:5: quantize-linears: skip is a list of texts, such as globs",
        ),
        (
            only("fuse-experts\n  - quantize-experts: {required: 'no'}"),
            "mine.yaml:4: quantize-experts: required is bool; found 'no'",
        ),
        (
            only("fuse-experts\n  - quantize-experts: {required: 1}"),
            "mine.yaml:4: quantize-experts: required is bool; found 1",
        ),
        (
            only("fuse-experts: {name: mine}"),
            "mine.yaml:3: fuse-experts has no option 'name'; it has: partial",
        ),
        (only("sync-groups: {name: mine}"), "mine.yaml:3: sync-groups has no option 'name'; it has: none"),
        (only("quantize-kv: cast"), "mine.yaml:3: expected options in braces"),
        (only("quantize-kv: [cast]"), "mine.yaml:3: expected options in braces"),
        (only("{fuse-experts: {}, sync-groups: {}}"), "mine.yaml:3: expected one pass an entry"),
        (only("[fuse-experts]"), "mine.yaml:3: expected a name"),
        (only("? [fuse-experts]\n    : {}"), "mine.yaml:3: expected a name"),
        (only("quantize-linears: {? [skip] : []}"), "mine.yaml:3: expected a name"),
        (
            "passes: [fuse-experts]\nnotes: mine\n",
            "mine.yaml:2: a spec has no key 'notes'; it has: description, passes",
        ),
        (
            "description: nothing\n",
            "mine.yaml: expected `passes:`, a list of calibrate-bootstrap, calibrate-hessian,",
        ),
        ("", "mine.yaml: expected a mapping with description, passes"),
    ],
)
def test_a_mistake_is_named_by_line_and_choices(text: str, message: str) -> None:
    assert error(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("description: d\npasses: lower\n", 2),
        ("description: d\npasses: []\n", 2),
        ("description: d\npasses: {lower: {}}\n", 2),
        ("- fuse-experts\n- lower\n", 1),
        ("description: d\npasses:\n  - fuse-experts\n  - [\n", 5),
        ("description: d\npasses:\n\t- fuse-experts\n", 3),
        ("description: d\npasses: [fuse-experts]\n---\npasses: [lower]\n", 3),
        ("description: {a: b}\npasses: [fuse-experts]\n", 1),
        ("passes: [fuse-experts]\npasses: [sync-groups]\n", 2),
        (only("quantize-linears: {skip: ['a'], skip: ['b']}"), 3),
        (only("quantize-linears:\n      skip: ['a']\n      only: ['b']\n      skip: ['c']"), 6),
        (only("fuse-experts\n  - lower"), 4),
    ],
)
def test_every_mistake_has_a_line(text: str, line: int) -> None:
    assert error(text).startswith(f"mine.yaml:{line}: ")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.getcwd []",
        "!!python/name:os.system ''",
        "!!python/tuple [a]",
        "!!int abc",
        "!!float abc",
        "!!bool abc",
        "!!timestamp abc",
        "!!binary '='",
        "2020-99-99",
        "9" * 5000,
        "!mine a",
        "{[a]: b}",
        "{{a: b}: c}",
    ],
)
def test_a_value_that_yaml_cannot_make_is_an_error_at_its_line(value: str) -> None:
    assert error(only(f"quantize-linears: {{skip: {value}}}")).startswith("mine.yaml:3: ")


def test_tags_are_refused_wherever_they_stand() -> None:
    for text in (
        "description: !!python/name:os.system ''\npasses: [fuse-experts]\n",
        "passes: !!python/object/apply:os.getcwd []\n",
        "!!python/object:fxq.spec.Spec {passes: [fuse-experts]}\n",
        "passes: [!!python/name:fxq.spec.load fuse-experts]\n",
    ):
        assert error(text).startswith("mine.yaml")


def test_an_anchor_bomb_is_an_error_of_a_few_lines() -> None:
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 5)]
    nested = bomb[0].removeprefix("a0: ")
    for line in bomb[1:]:
        anchor, _, items = line.partition(": ")[2].partition(" ")
        nested = f"{anchor} [{nested}, {items[1:].partition(', ')[2]}"
    error(only(f"quantize-linears: {{skip: {nested}}}"))


def test_a_value_that_holds_itself_is_an_error() -> None:
    assert error(only("quantize-linears: {skip: &a [*a]}")).startswith("mine.yaml")
    assert error("passes: &a [*a]\n").startswith("mine.yaml:1: ")


@pytest.mark.parametrize("depth", [50, 120, 180, 230, 280, 330, 500, 20_000])
def test_deep_nesting_is_an_error_and_no_traceback(depth: int) -> None:
    assert error(only(f"quantize-linears: {{skip: {'[' * depth}{']' * depth}}}")).startswith("mine.yaml")
    with contextlib.suppress(SpecError):
        read(f"description: {'[' * depth}{']' * depth}\npasses: [fuse-experts]\n")


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "[quantize-experts, fuse-experts]",
            "quantize-experts, requires experts_fused; fuse-experts ensures it and must come before",
        ),
        ("[quantize-experts]", "quantize-experts, requires experts_fused; no pass here ensures it"),
        (
            "[quantize-linears, calibrate-bootstrap, lower]",
            "lower, requires amaxes_shared; no pass here ensures it",
        ),
        ("[quantize-linears, sync-groups, lower]", "lower, requires amaxes_filled; no pass here ensures it"),
        (
            "[quantize-linears, sync-groups, calibrate-bootstrap, quantize-linears, lower]",
            "lower, requires amaxes_shared; sync-groups ensures it and must come before",
        ),
        (
            "[quantize-linears, sync-groups, calibrate-bootstrap, quantize-kv, lower]",
            "lower, requires amaxes_filled; calibrate-bootstrap ensures it and must come before",
        ),
        (
            "[quantize-linears, sync-groups, calibrate-mse, calibrate-bootstrap]",
            "calibrate-mse, requires amaxes_filled",
        ),
    ],
)
def test_a_wrong_order_is_found_before_anything_is_traced(passes: str, message: str) -> None:
    assert message in error(f"passes: {passes}\n")


def test_an_unknown_name_lists_the_shipped_specs() -> None:
    with pytest.raises(
        SpecError,
        match=r"no spec is called 'nvfp4'; there are nvfp4_all_lm_head_mse.*; or give a .yaml file",
    ):
        load("nvfp4", PASSES)


def test_a_file_is_a_spec_and_is_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(only("fuse-experts"))
    assert load(path, PASSES).name == "mine"
    path.write_text(only("fuse-expert"))
    with pytest.raises(SpecError) as caught:
        load(str(path), PASSES)
    assert str(caught.value).startswith(f"{path}:3: no pass is called 'fuse-expert'")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9\n")
    for name in ("missing.yaml", "folder.yaml", "latin.yaml"):
        with pytest.raises(SpecError, match="cannot read this spec"):
            load(tmp_path / name, PASSES)


MIXED = "nvfp4_mlp_fp8_attention_mse-fp8_kv"


def test_settings_reach_every_pass_of_a_name() -> None:
    spec = load(MIXED, PASSES).with_settings(["quantize-linears.partial=true", "quantize-kv.scale=cast"])
    assert [step.partial for step in spec.passes if isinstance(step, QuantizeLinears)] == [True, True]
    assert [options(step)["scale"] for step in spec.passes if step.name == "quantize-kv"] == ["cast"]
    assert load(MIXED, PASSES).with_settings([]) == load(MIXED, PASSES)


def test_settings_that_go_together_are_set_together() -> None:
    both = ["quantize-linears.weights=fp8", "quantize-linears.inputs=fp8"]
    assert read(only("quantize-linears")).with_settings(both).passes == (QuantizeLinears("fp8", "fp8"),)


@pytest.mark.parametrize("text", ["[a.*, b]", "['a.*', \"b\"]"])
def test_the_value_of_a_setting_is_yaml(text: str) -> None:
    spec = read(only("quantize-linears")).with_settings([f"quantize-linears.skip={text}"])
    assert options(spec.passes[0])["skip"] == ("a.*", "b")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("quantize-linears", "expected PASS.OPTION=VALUE"),
        ("skip=a", "expected PASS.OPTION=VALUE"),
        ("gptq.damp=0.1", "mine has no pass 'gptq'; it has: quantize-linears"),
        ("quantize-linears.skips=a", "has no option 'skips'; it has: head, inputs, only,"),
        ("quantize-linears.weights=int4", "is one of nvfp4, fp8, fp8_blocks; found 'int4'"),
        ("quantize-linears.partial=3", "is bool; found 3"),
        ("quantize-linears.weights=fp8", "weights: fp8 and inputs: nvfp4 do not go together"),
        ("quantize-linears.skip=[a", "cannot read the value as YAML"),
        ("quantize-linears.skip=", "expected a value after `=`"),
        ("quantize-linears.skip=!!python/name:os.system x", "a spec holds text, numbers, lists and mappings"),
        ("quantize-linears.skip=" + "[" * 5000, "--set quantize-linears.skip=[[["),
    ],
)
def test_a_setting_that_fits_nothing_says_what_would(setting: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(only("quantize-linears")).with_settings([setting])
    assert words in str(caught.value)
    assert str(caught.value).startswith("--set ")
    assert len(str(caught.value)) < 400
