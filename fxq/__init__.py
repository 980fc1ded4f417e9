"""fxq: a declarative graph-transform compiler over torch.fx that turns Hugging Face models into NVFP4
checkpoints.

compiled = fxq.compile("path/to/model", "nvfp4_experts_only_mse-fp8_cast_kv", calib=["some text", ...])
compiled.save("path/to/output")
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxq.errors import CheckpointError, FxqError, SourceError, SpecError, TraceError, VerifyError

if TYPE_CHECKING:
    from fxq.audit import Findings, verify_checkpoint
    from fxq.choose import Chosen, choose
    from fxq.compile import compile
    from fxq.compiled import Compiled
    from fxq.evaluate.evaluation import Evaluation, evaluate
    from fxq.sources.samples import Blend

__version__ = "0.1.0"
__all__ = [
    "Blend",
    "CheckpointError",
    "Chosen",
    "Compiled",
    "Evaluation",
    "Findings",
    "FxqError",
    "SourceError",
    "SpecError",
    "TraceError",
    "VerifyError",
    "choose",
    "compile",
    "evaluate",
    "verify_checkpoint",
]
_HOMES = {
    "Blend": "fxq.sources.samples",
    "choose": "fxq.choose",
    "Chosen": "fxq.choose",
    "compile": "fxq.compile",
    "Compiled": "fxq.compiled",
    "evaluate": "fxq.evaluate.evaluation",
    "Evaluation": "fxq.evaluate.evaluation",
    "verify_checkpoint": "fxq.audit",
    "Findings": "fxq.audit",
}


def __getattr__(name: str) -> Any:
    """torch and transformers load when they are first needed, not when fxq is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fxq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """`fxq.compile` is the function, although importing the module `fxq/compile.py` would set it to that."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
