"""The pages for users are true: commands parse and print what is shown, links lead on, examples run."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml
from safetensors.torch import load_file, save_file

from fxq.cli import main as cli
from fxq.errors import SpecError
from fxq.passes import PASSES
from fxq.pipeline.base import Pass
from fxq.pipeline.schema import schema
from fxq.pipeline.spec import parse, shipped
from tests.docs import PAGES, ROOT, anchors, blocks, commands, links, reference, shown

BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SPECS = ROOT / "docs" / "specs.md"
OWN = ROOT / "docs" / "passes.md"
FILES = {block.file: block.text for block in blocks(OWN, "python", "yaml") if block.file is not None}
START, END = "<!-- generated: passes -->\n", "<!-- end -->\n"
EXPERTS = "nvfp4_experts_only_mse-fp8_cast_kv"
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@BY_PAGE
def test_every_command_parses(page: Path) -> None:
    for arguments in commands(page):
        try:
            cli.parser().parse_args(arguments)
        except SystemExit as error:
            pytest.fail(f"{page.name}: fxq {' '.join(arguments)}: exit status {error.code}")


def test_there_are_commands_to_parse() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 10


@BY_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_listed() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    assert {page for page in PAGES if page.parent == index.parent} - {index} <= listed
    assert "docs/README.md" in links(ROOT / "README.md")


def test_every_shipped_spec_is_weighed() -> None:
    rows = [
        line for line in (ROOT / "docs" / "choosing.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert {name for name in shipped() if any(f"`{name}`" in row for row in rows)} == set(shipped())


def test_the_reference_is_that_of_the_passes(update_golden: bool) -> None:
    text = SPECS.read_text(encoding="utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    made = f"{head}{START}\n{reference(PASSES)}{END}{tail}"
    if update_golden:
        SPECS.write_text(made, encoding="utf-8")
    assert SPECS.read_text(encoding="utf-8") == made


def test_every_spec_shown_is_one() -> None:
    own = _own_table()
    texts = [block.text for page in PAGES for block in blocks(page, "yaml")]
    assert len(texts) >= 3
    for text in texts:
        assert parse(text, own, "shown.yaml").passes
        jsonschema.validate(yaml.safe_load(text), schema(own))


def _own_table() -> dict[str, type[Pass]]:
    """The passes, and those that the page about passes makes."""
    found = dict(PASSES)
    for name in ("keep_small", "fold_norms"):
        module = sys.modules[name] = ModuleType(name)
        exec(compile(FILES[f"{name}.py"], f"{name}.py", "exec"), module.__dict__)
        own = (each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name)
        found |= {each.name: each for each in own if issubclass(each, Pass)}
    return found


def test_the_worked_pass_has_its_place() -> None:
    order = ["quantize-linears", "sync-groups", "keep-small", "calibrate-bootstrap", "lower"]
    text = "passes:\n" + "".join(f"  - {name}\n" for name in order)
    with pytest.raises(SpecError, match="lower, requires amaxes_shared; sync-groups ensures it"):
        parse(text, _own_table(), "mine.yaml")


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A directory as a reader has it: the demo, `fxq` and `python` on the path, the files that pages make."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "bin").mkdir()
    for name, words in {"fxq": "-m fxq", "python": ""}.items():
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "my.yaml").write_text(blocks(SPECS, "yaml")[0].text, encoding="utf-8")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def _run(command: str, where: Path) -> str:
    path = {
        "PATH": f"{where / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{where}",
        "COLUMNS": "80",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=where,
        env={**os.environ, **path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.stdout


@pytest.mark.slow
def test_the_worked_passes_pass_their_own_tests(newcomer: Path) -> None:
    tests = [name for name in FILES if name.startswith("test_")]
    assert len(tests) == 3
    printed = _run(f"python -m pytest -q -p no:cacheprovider {' '.join(tests)}", newcomer)
    assert re.search(r"^\d+ passed in", printed, flags=re.MULTILINE), printed


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda page: page.name)
def test_what_is_shown_is_what_is_printed(page: Path, newcomer: Path) -> None:
    if page.name == "troubleshooting.md":
        _break(newcomer)
    for each in (each for block in blocks(page, "console") for each in shown(block)):
        printed = _run(each.command, newcomer)
        good = doctest.OutputChecker().check_output(each.output, printed, LOOSELY)
        assert good, f"{each.command}\n--- shown\n{each.output}\n--- printed\n{printed}"


def _break(where: Path) -> None:
    """Make `broken`, the checkpoint that the page about symptoms checks."""
    _run(f"fxq compile demo/model --spec {EXPERTS} --calib demo/calib.jsonl --out broken", where)
    tensors = load_file(where / "broken" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.input_scale"]
    tensors["model.layers.2.mlp.experts.0.up_proj.weight_scale_2"] *= 2
    save_file(tensors, where / "broken" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "sources.md"])
def test_python_shown_runs(page: str, newcomer: Path) -> None:
    for number, block in enumerate(blocks(ROOT / "docs" / page, "python")):
        (newcomer / "shown.py").write_text(block.text, encoding="utf-8")
        printed = _run("python shown.py && echo ran", newcomer)
        assert printed.endswith("ran\n"), f"{page}, block {number}: {printed}"
