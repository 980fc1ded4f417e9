"""What the report beside the weights says that passes rewrote: names alone, as untrusted as the weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from fxq.audit.checkpoint import Linear
from fxq.audit.findings import Finding
from fxq.audit.store import Json

REPORT = "fxq-report/report.json"
# That of 61 layers with 384 experts, all of them rewritten, is a quarter of this.
MAX_REPORT = 32 << 20


@dataclass(frozen=True)
class Rewrites:
    """names: tensors that hold what a pass computed; of a quantized linear `m`, whatever its tensors are
    called, `m.weight`. untied: modules that share a tensor in the base and have their own in the checkpoint.
    """

    names: frozenset[str] = frozenset()
    untied: frozenset[str] = frozenset()

    def name_of(self, linear: Linear) -> str | None:
        """The name by which a quantized linear is listed; None if it is not."""
        return next((name for name in (linear.name, f"{linear.name}.weight") if name in self.names), None)

    def is_untied(self, name: str) -> bool:
        """Whether this is the tensor that an untied module got."""
        return name in self.names and name.removesuffix(".weight") in self.untied


def read_rewrites(directory: Path, findings: list[Finding]) -> Rewrites:
    """What a checkpoint's report lists; nothing if it has none, or none that can be used (a finding)."""
    path = directory / REPORT
    if not path.is_file():
        return Rewrites()
    report = _read(path)
    if isinstance(report, str):
        findings.append(Finding("report-invalid", REPORT, report))
        return Rewrites()
    return Rewrites(*(_names(report.get(field, []), field, findings) for field in ("rewritten", "untied")))


def _read(path: Path) -> Json | str:
    """The object in a file, or why there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_REPORT + 1)
        if len(content) > MAX_REPORT:
            return f"expected at most {MAX_REPORT:,} bytes, found more"
        report = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"expected JSON, found {error}"
    return report if isinstance(report, dict) else f"expected an object, found a {type(report).__name__}"


def _names(value: object, field: str, findings: list[Finding]) -> frozenset[str]:
    """The names in one field of the report; if anything else is in it, none."""
    found = type(value).__name__
    if isinstance(value, list):
        odd = [type(item).__name__ for item in value if not isinstance(item, str)]
        if not odd:
            return frozenset(value)
        found = f"one with {odd[0]} in it"
    findings.append(
        Finding("report-invalid", f"{REPORT}: {field}", f"expected a list of names, found {found}")
    )
    return frozenset()
