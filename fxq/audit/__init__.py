"""Checks a finished NVFP4 checkpoint, whoever wrote it, from its files alone.

Nothing here imports what writes checkpoints: a mistake of the writer's cannot hide in what checks it.
"""

from pathlib import Path

from fxq.audit import against, configs, excludes, experts, fusion, kv, linears, side_files
from fxq.audit.checkpoint import open_checkpoint
from fxq.audit.findings import RULES, Finding, Findings, Severity

__all__ = ["RULES", "Finding", "Findings", "Severity", "verify_checkpoint"]


def verify_checkpoint(directory: str | Path, base: str | Path | None = None) -> Findings:
    """Everything that is wrong, doubtful or worth knowing about a quantized checkpoint.

    directory: ModelOpt NVFP4 (also W4A16, and MIXED_PRECISION with FP8 of every kind and MXFP8) or
    compressed-tensors nvfp4-pack-quantized. base: the directory of the model that it was made from; then
    tensors that were left alone are compared byte for byte, and quantized ones by their error; those that the
    report of fxq lists as rewritten by a pass, by shape and dtype. Memory is a few rows of one tensor.
    Raises CheckpointError if `directory`, SourceError if `base` is no checkpoint of that kind.
    """
    checkpoint = open_checkpoint(Path(directory).expanduser())
    findings = Findings(checkpoint.summary(), list(checkpoint.store.findings))
    for check in (configs, linears, fusion, experts, excludes, kv, side_files):
        findings.extend(check.check(checkpoint))
    if base is not None:
        findings.extend(against.check(checkpoint, Path(base).expanduser(), findings.summary))
    return findings
