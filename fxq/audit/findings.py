"""What an audit found: rules with their severities, findings, and their folding into few lines."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_NUMBER = re.compile(r"(?<![^.])\d+(?=[._]|$)")


class Severity(StrEnum):
    """error: an engine fails or computes something else. warning: some engine may, or it was hardly meant.
    info: worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO
# rule -> (severity, why it is one)
RULES: dict[str, tuple[Severity, str]] = {
    "header-invalid": (_E, "a shard cannot be read, or its tensors overlap, leave holes or are cut off"),
    "index-missing": (_E, "several shards need an index"),
    "index-wrong": (_E, "a tensor is not where the index says, and loaders that follow it fail"),
    "index-unlisted": (
        _E,
        "a tensor is in a shard but not in the index: loaders disagree on whether it exists",
    ),
    "index-size": (_W, "the index states another total_size than the tensors have"),
    "shard-orphan": (_W, "no tensor of the index is in this file"),
    "tensor-twice": (_E, "two shards hold a tensor of this name; which one counts depends on the loader"),
    "json-invalid": (_E, "a config file cannot be parsed"),
    "config-one-file": (_W, "vLLM and SGLang prefer config.json, TensorRT-LLM reads hf_quant_config.json"),
    "config-key": (_E, "an engine requires this key of the quantization config, or another value of it"),
    "config-disagree": (_E, "the two config files say different things; engines read one or the other"),
    "config-groups": (_E, "config_groups do not describe NVFP4 in blocks of 16"),
    "config-stray": (_E, "a quantization config of the source was left in config.json"),
    "config-layers": (_E, "quantized_layers does not say what the tensors are"),
    "none-quantized": (_E, "the configs promise NVFP4 and no tensor is"),
    "part-missing": (_E, "without this scale engines load garbage or fail"),
    "input-scale-missing": (_E, "vLLM leaves a missing input scale uninitialised, SGLang takes 1.0"),
    "part-extra": (_E, "a tensor that the declared algorithm has no place for"),
    "tensor-dtype": (_E, "engines view the bytes as another dtype"),
    "tensor-shape": (_E, "engines refuse this shape, or read other elements"),
    "tensor-unknown": (_E, "a tensor of integers or FP8 that belongs to no quantized linear"),
    "fp8-leftover": (_W, "FP8 weights in the source's own blocks, which the configs do not list"),
    "scale-value": (_E, "a scale that is zero, negative or not finite decodes to zeros or NaN"),
    "scale-reciprocal": (
        _W,
        "a global scale that looks like the inverse of one: multiplier and divisor mixed up?",
    ),
    "scale-range": (
        _W,
        "block scales far below what FP8 can hold, of which small ones lose precision: a global scale of "
        "amax / 6 instead of amax / 2688?",
    ),
    "input-outlier": (_I, "an input far larger than others, as massive activations of trained models are"),
    "latent-quantized": (_W, "engines absorb this linear; vLLM takes its values through the quantized input"),
    "weights-zero": (_W, "every weight of this linear decodes to zero"),
    "codes-saturated": (_W, "so many weights at the largest code mean scales that are too small"),
    "scales-saturated": (_I, "every block scale is 448: the global scale may be too small for its blocks"),
    "group-partial": (_E, "engines merge these linears: all are quantized alike, or none"),
    "group-weight-scale": (_E, "engines merge these linears under one global scale; the others decode wrong"),
    "group-input-scale": (
        _E,
        "engines merge these linears: vLLM and SGLang take the largest, TensorRT-LLM stops",
    ),
    "experts-incomplete": (_E, "a layer must have all experts, each with the same projections"),
    "experts-mixed": (_E, "an engine has one kernel for a layer's experts: all are quantized alike, or none"),
    "experts-count": (_W, "config.json states another number of experts"),
    "experts-input-scale": (_W, "engines use the largest input scale of a layer for all its experts"),
    "exclude-missing": (_E, "a linear that is not quantized and not listed: engines expect packed weights"),
    "exclude-quantized": (
        _E,
        "an entry of the exclude list hits a quantized linear, which an engine then reads raw",
    ),
    "exclude-unportable": (
        _W,
        "engines match the exclude list differently; this is excluded in only some of them",
    ),
    "exclude-embedding": (
        _I,
        "an embedding or convolution is not listed; engines do not quantize those by default",
    ),
    "exclude-unknown": (_W, "an entry of the exclude list names nothing in the checkpoint"),
    "exclude-twice": (_I, "an entry of the exclude list is repeated"),
    "kv-undeclared": (_E, "without a declared scheme vLLM ignores KV scales"),
    "kv-incomplete": (
        _E,
        "TensorRT-LLM needs both scales of an attention; the ones left out become 1.0 elsewhere",
    ),
    "kv-unknown": (_W, "engines find no attention of this name and use 1.0"),
    "kv-cast": (_I, "FP8 KV cache without scales: engines use 1.0"),
    "kv-scheme": (_W, "an engine may not know this KV cache"),
    "dtype-mixed": (_I, "an untouched matrix has another dtype than config.json states"),
    "tokenizer-missing": (_W, "engines need a tokenizer beside the weights"),
    "generation-missing": (_I, "no generation_config.json: engines use their own defaults"),
    "weights-stray": (_W, "weights in another format lie beside the shards; a loader may pick those"),
    "base-changed": (_E, "a tensor that was left alone is not the base's, byte for byte"),
    "base-lost": (_E, "a tensor of the base is neither in the checkpoint nor quantized"),
    "base-added": (_W, "a tensor that the base does not have"),
    "base-shape": (_E, "the quantized linear has another shape than the base's"),
    "base-config": (_W, "config.json differs from the base's in more than quantization"),
    "base-file": (_W, "a file that the base has is missing"),
    "base-uncompared": (_W, "the base holds this weight in a form that verify cannot decode"),
    "base-rewritten": (
        _I,
        "as the report says, these were changed on purpose; --text compares what the two models compute",
    ),
    "report-invalid": (
        _W,
        "what the report says of rewritten tensors cannot be used, so that none counts as such",
    ),
    "error-broken": (_E, "decoded weights are nowhere near the base's: wrong scale, order or nibbles"),
    "error-large": (_W, "the error is larger than NVFP4 needs; good weights are at 18 dB and more"),
}


def fold(names: Iterable[str]) -> str:
    """Names with the numbers of layers and experts as `*`, each with how many there are of it."""
    counts = Counter(_NUMBER.sub("*", name) for name in names)
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())


@dataclass(frozen=True)
class Finding:
    """One rule, broken at one place: a tensor, module or file."""

    rule: str
    where: str
    message: str

    @property
    def severity(self) -> Severity:
        return RULES[self.rule][0]


@dataclass(frozen=True)
class Group:
    """Findings of one rule at places that differ in numbers only (layers, experts)."""

    severity: Severity
    rule: str
    pattern: str
    count: int
    example: Finding


@dataclass
class Findings:
    """All findings about one checkpoint; `summary` says what it is: format, counts, sizes, error."""

    summary: dict[str, Any]
    items: list[Finding] = field(default_factory=list)

    def extend(self, found: Iterable[Finding]) -> None:
        """Add what a check yields."""
        self.items.extend(found)

    def __iter__(self) -> Any:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def of(self, severity: Severity) -> list[Finding]:
        """Those of one severity."""
        return [item for item in self.items if item.severity is severity]

    @property
    def errors(self) -> list[Finding]:
        """Those with which an engine fails or computes something else."""
        return self.of(Severity.ERROR)

    @property
    def warnings(self) -> list[Finding]:
        """Those with which some engine may."""
        return self.of(Severity.WARNING)

    @property
    def verdict(self) -> str:
        """One line: good, doubtful or broken, and how many of each."""
        errors, warnings = len(self.errors), len(self.warnings)
        counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        if errors:
            return f"broken: {counts}"
        return f"usable, with doubts: {counts}" if warnings else "good: every rule holds"

    def groups(self) -> list[Group]:
        """Alike findings counted, worst first."""
        found: dict[tuple[str, str], list[Finding]] = {}
        for item in self.items:
            found.setdefault((item.rule, _NUMBER.sub("*", item.where)), []).append(item)
        order = list(Severity)
        return sorted(
            (Group(i[0].severity, rule, where, len(i), i[0]) for (rule, where), i in found.items()),
            key=lambda group: order.index(group.severity),
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: verdict, summary, groups and every finding."""
        return {
            "verdict": self.verdict,
            "counts": {str(s): len(self.of(s)) for s in Severity},
            "summary": self.summary,
            "groups": [
                {
                    "severity": g.severity,
                    "rule": g.rule,
                    "why": RULES[g.rule][1],
                    "where": g.pattern,
                    "count": g.count,
                    "example": f"{g.example.where}: {g.example.message}",
                }
                for g in self.groups()
            ],
            "findings": [
                {"severity": i.severity, "rule": i.rule, "where": i.where, "message": i.message}
                for i in self.items
            ],
        }
