"""The distribution: what is built elsewhere from the repository has all that it runs with."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxq

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fxq").rglob("__init__.py")}
    assert {*listed} == {*found, "fxq.passes", "fxq.specs"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_runs_elsewhere(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", source], input=tracked, check=True)
    pip = [sys.executable, "-m", "pip"]
    built: Path = source
    if kind == "sdist":
        build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
        command = [sys.executable, "-c", build]
        made = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
        built = tmp_path / made.stdout.split()[-1]
    options = ["--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "install", *options, "--target", tmp_path / "site", built], check=True)
    code = "import fxq, sys; from fxq.cli.main import main; print(fxq.__file__); sys.exit(main(['specs']))"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[0] == str(tmp_path / "site" / "fxq" / "__init__.py")
    assert "nvfp4_weight_only_mse" in found.stdout
    (metadata,) = (tmp_path / "site").glob("fxq-*.dist-info")
    assert metadata.name == f"fxq-{fxq.__version__}.dist-info"
    assert (tmp_path / "site" / "fxq" / "report" / "pages" / "report.js").is_file()
