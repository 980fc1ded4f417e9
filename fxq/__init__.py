"""fxq: a declarative graph-transform compiler over torch.fx that turns Hugging Face models into NVFP4
checkpoints.

compiled = fxq.compile("path/to/model", "nvfp4_experts_only_mse-fp8_cast_kv", calib=["some text", ...])
compiled.save("path/to/output")
"""

from typing import TYPE_CHECKING, Any

from fxq.errors import CheckpointError, FxqError, SourceError, SpecError, TraceError, VerifyError

if TYPE_CHECKING:
    from fxq.audit import Findings, verify_checkpoint
    from fxq.compiler import Compiled, compile
    from fxq.evaluation import Evaluation, evaluate

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Compiled",
    "Evaluation",
    "Findings",
    "FxqError",
    "SourceError",
    "SpecError",
    "TraceError",
    "VerifyError",
    "compile",
    "evaluate",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """torch and transformers load when they are first needed, not when fxq is imported."""
    if name in ("compile", "Compiled"):
        from fxq import compiler

        return getattr(compiler, name)
    if name in ("evaluate", "Evaluation"):
        from fxq import evaluation

        return getattr(evaluation, name)
    if name in ("verify_checkpoint", "Findings"):
        from fxq import audit

        return getattr(audit, name)
    raise AttributeError(f"module 'fxq' has no attribute {name!r}")
