"""Random architectures through benchmarks/fuzz.py: a fixed list of seeds, one of each kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.generated import Architecture

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
# A list in an opaque call, dense products, a stack whose last two dimensions are swapped, a list of linears.
SEEDS = (9, 10, 13, 27)


@pytest.mark.slow
def test_generated_architectures_are_not_wrong() -> None:
    command = [sys.executable, str(SCRIPT), *map(str, SEEDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok   ") == len(SEEDS) - 1, done.stdout  # the opaque list is refused by name


def test_a_seed_is_always_the_same_architecture() -> None:
    assert Architecture(9) == Architecture(9)
    assert Architecture(9).experts == "list split"
