"""The JSON schema of specs says what `fxq.spec` says: one is made from the passes, the other checks them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import jsonschema
import pytest
import yaml

from fxq.cli import main as cli
from fxq.errors import SpecError
from fxq.passes import PASSES
from fxq.passes.sync_groups import SyncGroups
from fxq.pipeline.schema import described, schema
from fxq.pipeline.spec import parse, shipped

COMMITTED = Path(__file__).parents[2] / "docs" / "spec.schema.json"
GOOD = (
    "fuse-experts",
    "fuse-experts:",
    "fuse-experts: {}",
    "quantize-linears: {inputs: null}",
    "quantize-linears: {only: '*.mlp.*', skip: ['*.gate', 'a']}",
    "quantize-linears: {weights: fp8, inputs: fp8, partial: true}",
    "quantize-experts: {required: no}",
)
BAD = (
    "fuse-expert",
    "fuse-experts: {skip: []}",
    "fuse-experts: 3",
    "fuse-experts: []",
    "quantize-linears: {weights: int4}",
    "quantize-linears: {weights: null}",
    "quantize-linears: {only: 3}",
    "quantize-linears: {only: [3]}",
    "quantize-linears: {partial: 'yes'}",
    "{fuse-experts: {}, quantize-kv: {}}",
    "3",
    "{}",
)


def valid(text: str) -> bool:
    return bool(jsonschema.Draft7Validator(schema(PASSES)).is_valid(yaml.safe_load(text)))


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(schema(PASSES))


def test_the_committed_schema_is_what_the_passes_give(
    capsys: pytest.CaptureFixture[str], update_golden: bool
) -> None:
    assert cli.main(["specs", "--schema"]) == 0
    printed = capsys.readouterr().out
    if update_golden:
        COMMITTED.write_text(printed, encoding="utf-8")
    assert COMMITTED.read_text(encoding="utf-8") == printed
    assert json.loads(printed) == schema(PASSES)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_spec_is_valid(name: str) -> None:
    assert valid(shipped()[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("step", GOOD)
def test_what_a_spec_takes_is_valid(step: str) -> None:
    text = f"passes:\n  - {step}\n"
    if not step.startswith("quantize-experts"):  # which needs another pass before it
        parse(text, PASSES, "mine.yaml")
    assert valid(text)


@pytest.mark.parametrize("step", BAD)
def test_what_a_spec_refuses_is_invalid(step: str) -> None:
    text = f"passes:\n  - {step}\n"
    with pytest.raises(SpecError):
        parse(text, PASSES, "mine.yaml")
    assert not valid(text)


@pytest.mark.parametrize("text", ["[]", "passes: []", "passes: fuse-experts", "description: x", "x: 1"])
def test_what_is_no_pipeline_is_invalid(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text, PASSES, "mine.yaml")
    assert not valid(text)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_and_option_is_described(name: str) -> None:
    about, options = described(PASSES[name])
    assert about.endswith(".")
    assert list(options) == [field.name for field in dataclasses.fields(cast(Any, PASSES[name]))]
    assert all(text.endswith(".") for text in options.values())


@dataclass(frozen=True)
class Own(SyncGroups):
    """Some pass of a user's.

    margin: how much.
    """

    margin: float = 1.0
    most: int | None = None

    name: ClassVar[str] = "own"


def test_a_pass_of_ones_own_has_a_schema() -> None:
    options = schema({"own": Own})["properties"]["passes"]["items"]["anyOf"][1]["properties"]["own"]
    assert options["properties"] == {
        "margin": {"description": "how much.", "type": "number", "default": 1.0},
        "most": {"description": "", "type": ["integer", "null"], "default": None},
    }
    (step,) = parse("passes:\n  - own: {margin: 2}\n", {"own": Own}, "mine.yaml").passes
    assert step == Own(margin=2.0)


def test_a_schema_is_of_no_spec_in_particular(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["specs", "nvfp4_default-fp8_kv", "--schema"]) == 2
    assert "expected no NAME" in capsys.readouterr().err
