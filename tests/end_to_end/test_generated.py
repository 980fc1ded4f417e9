"""Random architectures through benchmarks/fuzz.py: a fixed list of seeds, one of each kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.generated import Architecture

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
# Stacks in three orders, lists of linears and of tensors, a list in an opaque call, dense products.
SEEDS = (9, 10, 13, 25, 27)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_generated_architecture_is_not_wrong(seed: int) -> None:
    command = [sys.executable, str(SCRIPT), "--seeds", str(seed), str(seed + 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout


def test_a_seed_is_always_the_same_architecture() -> None:
    assert Architecture(9) == Architecture(9)
    assert Architecture(9).experts == "list split"
