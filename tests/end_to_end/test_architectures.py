"""One family of each kind through benchmarks/architectures.py: traced, equal to eager, compiled, read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
# One of each kind: how experts are stored and reached, attention, scans, hub layouts, multimodal wrappers.
KINDS = (
    "gpt_oss",
    "llama4_text",
    "dbrx",
    "jetmoe",
    "granitemoe",
    "deepseek_v3",
    "qwen3_next",
    "nemotron_h",
    "lfm2_moe",
    "mamba",
    "gpt2",
    "falcon",
    "gemma2",
    "qwen3_5_moe/*",
    "mistral3/*",
)


@pytest.mark.slow
def test_one_family_of_each_kind_is_covered(tmp_path: Path) -> None:
    found = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--only", *KINDS, "--json", str(found)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    rows = json.loads(found.read_text())
    assert len(rows) == len(KINDS)
    assert {row["family"]: row["reason"] for row in rows if row["state"] != "ok"} == {}


@pytest.mark.slow
def test_what_cannot_be_traced_is_refused_by_module_and_line(tmp_path: Path) -> None:
    found = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--only", "aria_text", "--json", str(found)]
    subprocess.run(command, capture_output=True, timeout=300)
    (row,) = json.loads(found.read_text())
    assert row["state"] == "refused"
    assert "mlp.experts.fc1 (AriaGroupedExpertsGemm), modeling_aria.py:" in row["reason"]
