"""What is loaded into vLLM: every model by every spec and output format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fxq
from tests.engines.compare import Comparison, compare
from tests.engines.engine import Vllm
from tests.engines.models import DENSE, MODELS
from tests.families import random_model, samples, save

EXPERTS_ONLY = "nvfp4_experts_only_mse-fp8_cast_kv"
DEFAULT, DEFAULT_CAST = "nvfp4_default-fp8_kv", "nvfp4_default_mse-fp8_cast_kv"
WEIGHT_ONLY = "nvfp4_weight_only_mse"
EXPERTS_FP8_REST = "nvfp4_experts_fp8_rest_mse-fp8_kv"
MLP_FP8_ATTENTION = "nvfp4_mlp_fp8_attention_mse-fp8_kv"
AUTO = "nvfp4_auto-fp8_cast_kv"
SPECS = (EXPERTS_ONLY, DEFAULT, DEFAULT_CAST, WEIGHT_ONLY, EXPERTS_FP8_REST, MLP_FP8_ATTENTION, AUTO)
NEED_EXPERTS = (EXPERTS_ONLY, EXPERTS_FP8_REST)


@dataclass(frozen=True)
class Case:
    """One checkpoint."""

    format: str
    model: str
    spec: str

    def __str__(self) -> str:
        return f"{self.format}-{self.model}-{self.spec}"


CASES = tuple(
    Case(format, model, spec)
    for format, specs in (("modelopt", SPECS), ("compressed-tensors", (DEFAULT, WEIGHT_ONLY)))
    for model in MODELS
    for spec in specs
    if spec not in NEED_EXPERTS or model not in DENSE
)


def build(case: Case, root: Path) -> Path:
    """The checkpoint of a case, compiled below `root` if it is not there."""
    source, out = root / "models" / case.model, root / "checkpoints" / str(case)
    if not source.exists():
        save(random_model(MODELS[case.model]()), source)
    if not out.exists():
        data = None if case.spec == WEIGHT_ONLY else samples(6)
        fxq.compile(source, case.spec, calib=data, out=out, format=case.format)
    return out


def loaded(case: Case, root: Path, engine: Vllm) -> Comparison:
    """What vLLM makes of the checkpoint of a case; EngineError if it refuses it."""
    checkpoint = build(case, root)
    held = engine.load(checkpoint, root / "loaded.safetensors")
    return compare(checkpoint, held)
