"""What a compilation did, in figures: for people as a table, for programs as a mapping."""

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.hub import NUMBER, natural_order
from fxq.graph.program import Program
from fxq.graph.structure.experts import is_expert, multiplies_experts
from fxq.graph.structure.matmuls import quantizes_input, weight_matmuls
from fxq.graph.structure.views import parameter_name, statistics, weight_path
from fxq.pipeline.choosing import summary
from fxq.pipeline.facts import is_weight_quantize

# Correct NVFP4 weights are at 18 to 22 dB, FP8 above 25.
LEAST_SQNR_DB = 18
# An input's amax so many times the median is a massive activation's.
MASSIVE = 100
# KL in nats per token below which it is called so. Of the models in benchmarks/RESULTS.md one whose weights
# alone are quantized is at 0.043, its perplexity 2 % up; the same in W4A4 at 0.11, 7 % up.
_DIVERGENCES = ((0.02, "small"), (0.1, "moderate"))
_QUOTED = re.compile(r"('[^']*')")
_NODE_NUMBER = re.compile(r"(%\w*?)(_\d+)+\b")


@dataclass(repr=False)
class Report:
    """Counts and measurements of one compilation; None where something was not measured.

    sqnr_db: 10 log10(sum w**2 / sum (w - w')**2) over all quantized weights; worst_*: the weight with the
    lowest. *_input*: of the amaxes that input scales follow from, and whose the largest is. groups: sets of
    emitted linears (q/k/v, gate/up, ...) that share their global scales. formats: how many groups of weights
    got which, where that was chosen by measurement, and what it loses. source_bytes_read: bytes of the
    source's tensors read for calibrating, packing and writing. bits_per_weight: bytes of the quantized
    linears, scales included, times 8, by their weights. rewritten: tensors of the checkpoint that hold what a
    pass computed and not the source's values; quantized ones by the name they had before. cast_blocks,
    inexact_blocks: blocks of 16 that were cast from MXFP4, and those of them that do not decode to what they
    were. kl_divergence: KL(source || output) in nats per predicted token; top1_agreement: the share of tokens
    where both rank the same one first. untied: modules that share a tensor in the source and have their own
    here. made: the provenance (`fxq.provenance`).
    """

    spec: str
    quantize_nodes: int = 0
    expert_nodes: int = 0
    linear_nodes: int = 0
    input_nodes: int = 0
    kv_nodes: int = 0
    experts: int = 0
    dead_experts: int | None = None
    bootstrapped: int = 0
    unseen_inputs: int = 0
    groups: int = 0
    calibration_tokens: int = 0
    formats: str | None = None
    tensors_quantized: int | None = None
    tensors_excluded: int | None = None
    bits_per_weight: float | None = None
    cast_blocks: int = 0
    inexact_blocks: int = 0
    sqnr_db: float | None = None
    expert_sqnr_db: float | None = None
    worst_tensor: str | None = None
    worst_sqnr_db: float | None = None
    median_input_amax: float | None = None
    largest_input_amax: float | None = None
    largest_input: str | None = None
    source_bytes: int | None = None
    source_bytes_read: int | None = None
    output_bytes: int | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    out: str | None = None
    device: str | None = None
    made: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    rewritten: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @property
    def title(self) -> str:
        """What this is a summary of."""
        return f"fxq compiled with {self.spec}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """The summary as labels and values: what was quantized and shared, what it cost, how long it took."""
        yield (
            "quantize nodes",
            f"{self.quantize_nodes}: {self.expert_nodes} expert weights, {self.linear_nodes} "
            f"linear weights, {self.input_nodes} inputs, {self.kv_nodes} keys and values",
        )
        if self.experts:
            yield "experts", f"{self.experts}, {self.dead_experts} of them reached by no token"
        yield "bootstrapped", f"{self.bootstrapped} input amaxes that no token reached, filled from others"
        yield "groups", f"{self.groups} of linears that share their scales"
        yield "calibration", f"{self.calibration_tokens} tokens" if self.calibration_tokens else "none needed"
        if self.formats is not None:
            yield "formats", self.formats
        if self.tensors_quantized is not None:
            left = f"{self.tensors_excluded} left as they are and listed as such"
            yield "tensors", f"{self.tensors_quantized} quantized, {left}"
        if self.rewritten:
            yield "rewritten", _names(self.rewritten)
        if self.untied:
            yield "untied", f"{', '.join(self.untied)}: its tensor is shared in the source, its own here"
        if self.bits_per_weight is not None:
            yield "bits per weight", f"{self.bits_per_weight:.3f}"
        if self.cast_blocks:
            lost = f"{self.inexact_blocks} of them rounded: too small beside the largest of their group"
            yield "cast", f"{self.cast_blocks} blocks of 16, {lost if self.inexact_blocks else 'all exact'}"
        if self.sqnr_db == math.inf:
            yield "weight SQNR", "exact: every weight decodes to what it was"
        elif self.sqnr_db is not None:
            worst = ""
            if self.worst_sqnr_db is not None:
                worst = f" (worst {self.worst_sqnr_db:.2f} dB, {self.worst_tensor})"
            yield "weight SQNR", f"{self.sqnr_db:.2f} dB{worst}"
        if self.largest_input_amax is not None and self.median_input_amax is not None:
            yield (
                "input amaxes",
                f"{self.median_input_amax:.4g} at the median, the largest {self.largest_input_amax:.4g} "
                f"({self.largest_input})",
            )
        if self.perplexity_before is not None and self.perplexity_after is not None:
            yield (
                "perplexity",
                f"{self.perplexity_before:.3f} before, {self.perplexity_after:.3f} after (weights, "
                "inputs and KV as served)",
            )
        if self.kl_divergence is not None and self.top1_agreement is not None:
            yield (
                "predictions",
                f"KL {self.kl_divergence:.5f} nats per token from the source's; top-1 agreement "
                f"{self.top1_agreement:.2%}",
            )
        if self.verdict is not None:
            yield "verdict", self.verdict
        if self.source_bytes and self.output_bytes:
            yield "size", f"{self.source_bytes / 1e6:.1f} MB before, {self.output_bytes / 1e6:.1f} MB after"
        time = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        yield "time", f"{time}{f', on {self.device}' if self.device else ''}"
        memory = f"{(self.peak_host_bytes or 0) / 2**30:.2f} GiB host"
        if self.peak_device_bytes is not None:
            memory += f", {self.peak_device_bytes / 2**30:.2f} GiB GPU"
        yield "peak memory", memory
        if self.out is not None:
            yield "output", self.out

    @property
    def verdict(self) -> str | None:
        """What the divergence from the source means, and what may lessen it; None if it was not measured."""
        if self.kl_divergence is None:
            return None
        size = next((word for most, word in _DIVERGENCES if self.kl_divergence < most), "large")
        if size == "small":
            return "small: predictions are nearly the source's"
        passes = self.made.get("spec", {}).get("passes", ())
        steps = [next(iter(step)) if isinstance(step, dict) else step for step in passes]
        ways = []
        if "gptq" not in steps:
            ways.append("a gptq spec, which fits weights to the text")
        if self.input_nodes:
            ways.append("one that quantizes less: weights alone, experts alone, or FP8 for attention")
        elif "gptq" in steps:
            ways.append("`skip` for the layers with the largest errors")
        return f"{size}: try {'; or '.join(ways)}"

    def __str__(self) -> str:
        """The summary as plain text, with the warnings."""
        rows = [f"{label:<16} {value}" for label, value in self.rows()]
        return "\n".join([self.title, *rows, *(f"warning: {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        """What the many fields are those of; `print` shows them."""
        return f"<Report of {self.spec}: {self.quantize_nodes} quantize nodes, {len(self.warnings)} warnings>"

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        rows = [*self.rows(), *(("warning", warning) for warning in self.warnings)]
        cells = (f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        return f"<table><caption>{html.escape(self.title)}</caption>{''.join(cells)}</table>"

    def count(self, program: Program) -> None:
        """Fill in what a calibrated program and its values say."""
        graph, values = program.calibrated or program.graph, program.known_values()
        for node in filter(is_rounding, graph.nodes):
            self.quantize_nodes += 1
            if quantizes_input(node):
                self.input_nodes += 1
            elif not is_weight_quantize(node):
                self.kv_nodes += 1
            elif is_expert(node_at(node, 0)):
                self.expert_nodes += 1
            else:
                self.linear_nodes += 1
        self.groups = _shared_scales(program.graph)
        self.rewritten = sorted(_rewritten(program.graph), key=natural_order)
        self.untied = list(program.untied)
        self.warnings += [*program.notes, *unquantized(graph, program)]
        amaxes = [n.name for n in statistics(graph) if n.target is dialect.AMAX]
        self.bootstrapped = sum(1 for name in amaxes if float(values[name]) < 0)
        answers = [node for node in graph.nodes if node.target is dialect.FIRST]
        self.unseen_inputs = sum(
            all(float(values[n.name]) < 0 for choice in nodes_at(node, 0)[:-1] for n in _amaxes(choice))
            for node in answers
        )
        self.formats = summary(program)
        layers = _experts_by_layer(program.tokens)
        self.experts = sum(len(counts) for counts in layers.values())
        self.dead_experts = sum(int((counts == 0).sum()) for counts in layers.values()) if layers else None
        if self.unseen_inputs:
            self.warnings.append(
                f"{self.unseen_inputs} input amaxes saw no data and hold a constant: give calibration "
                "text for accuracy"
            )

    def add_warnings(self, warnings: Iterable[str]) -> None:
        """Those that are not said yet."""
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def measure(self, errors: Mapping[tuple[str, int | None], tuple[float, float]]) -> None:
        """Fill in the signal-to-noise figures from per-weight (squared error, energy)."""
        self.sqnr_db = sqnr_db(errors.values())
        self.expert_sqnr_db = sqnr_db(v for (_, expert), v in errors.items() if expert is not None)
        worst = min(errors, key=lambda name: _ratio(errors[name]), default=None)
        if worst is not None:
            self.worst_tensor = worst[0] + (f" expert {worst[1]}" if worst[1] is not None else "")
            self.worst_sqnr_db = sqnr_db([errors[worst]])

    def measure_inputs(self, amaxes: Mapping[str, float]) -> None:
        """Fill in what is said of inputs from the amax of each linear's."""
        if amaxes:
            self.median_input_amax = median(amaxes.values())
            self.largest_input = max(amaxes, key=lambda name: amaxes[name])
            self.largest_input_amax = amaxes[self.largest_input]

    def massive(self) -> Iterator[str]:
        """That an input has a massive activation, if one has."""
        largest, typical = self.largest_input_amax, self.median_input_amax
        if largest is not None and typical is not None and largest > MASSIVE * typical:
            yield (
                f"{self.largest_input}: its input reaches {largest:.4g}, {largest / typical:.0f} times the "
                "median: a massive activation, in whose block of 16 all below 1/24 of it is rounded to zero"
            )

    def losses(self, zeros: Sequence[str], not_finite: Sequence[str], *, decided: bool) -> Iterator[str]:
        """Which weights have become zeros or the worst of noise, and which tensors were broken before.

        decided: whether a pass gave codes, of which nothing follows from how far they are from the weights.
        """
        if zeros:
            yield (
                f"{_names(zeros)}: all values become zero, so small are they, alone or beside those that "
                "they share a scale with"
            )
        elif self.worst_sqnr_db is not None and self.worst_sqnr_db < LEAST_SQNR_DB and not decided:
            yield (
                f"{self.worst_tensor}: its error is at {self.worst_sqnr_db:.1f} dB; what suits the format "
                f"is at {LEAST_SQNR_DB} dB and more"
            )
        if not_finite:
            yield f"{_names(not_finite)}: NaN or Inf in what is carried through as it is"


def _names(names: Sequence[str]) -> str:
    """Names counted and folded; a single one in full."""
    if len(names) == 1:
        return names[0]
    return f"{len(names)} tensors ({', '.join(name for name, _ in fold(names))})"


def unquantized(graph: Graph, program: Program) -> Iterator[str]:
    """What was left although the spec asked for it, and experts that it did not ask for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in program.left.items():
        by_reason.setdefault(fold([reason])[0][0], []).append(name)
    for reason, names in by_reason.items():
        yield f"{_listed(names, program)}: {reason}"
    quantized = {parameter_name(node) for node in graph.nodes if is_weight_quantize(node)}
    chosen = program.why_left()  # the spec says of these that they stay
    stacks: dict[str, list[str]] = {}
    for matmul in weight_matmuls(graph):
        name = str(matmul.parameter.target)
        if is_expert(matmul.w) and name not in quantized and not {name} & {*program.left, *chosen}:
            routed = multiplies_experts(matmul)
            why = (
                "no pass of the spec quantizes experts"
                if routed
                else "stacked, but no tokens are routed to it"
            )
            stacks.setdefault(why, []).append(name)
    for why, names in stacks.items():
        yield f"{_listed(list(dict.fromkeys(names)), program)}: {why}"


def _listed(names: Sequence[str], program: Program) -> str:
    """Parameters counted, under the names of the checkpoint."""
    stored = program.hub.names
    keys = [key for n in names for key in ([part[0] for part in stored[n].keys] if n in stored else [n])]
    patterns = ", ".join(pattern for pattern, _ in fold(key.removesuffix(".weight") for key in keys))
    return f"{len(names)} weight{'s' * (len(names) > 1)} left unquantized ({patterns})"


def fold(names: Iterable[str]) -> list[tuple[str, int]]:
    """(name, how many) with the numbers of layers and experts as `*`, and nodes without theirs; in order.

    What stands in quotes is a user's, as a glob is, and stays as it is.
    """
    return list(Counter("".join(_folded(_QUOTED.split(name))) for name in names).items())


def _folded(parts: Sequence[str]) -> Iterator[str]:
    """Every second part is in quotes."""
    for i, part in enumerate(parts):
        yield part if i % 2 else _NODE_NUMBER.sub(r"\1", NUMBER.sub("*", part))


def fold_among(names: Iterable[str], everything: Iterable[str]) -> list[tuple[str, int]]:
    """`fold`, with the numbers themselves where `everything` has more of them than `names`:
    `layers.{0,29}.mlp`."""
    own, every = _by_pattern(names), _by_pattern(everything)
    found = []
    for pattern, alike in own.items():
        columns = _numbers(alike)
        whole = map(set, _numbers(every.get(pattern, alike)))
        is_product = math.prod(map(len, columns)) == len(alike)
        shown = [
            "*" if not is_product or set(column) == other else _set(column)
            for column, other in zip(columns, whole, strict=True)
        ]
        found.append((_with_numbers(alike[0], shown), len(alike)))
    return found


def _with_numbers(name: str, numbers: Sequence[str]) -> str:
    following = iter(numbers)
    return NUMBER.sub(lambda _: next(following), name)


def _by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(NUMBER.sub("*", name), []).append(name)
    return found


def _numbers(alike: Sequence[str]) -> list[list[str]]:
    """Of names that differ in numbers alone, which numbers stand at each place."""
    return [[*dict.fromkeys(column)] for column in zip(*map(NUMBER.findall, alike), strict=True)]


def _set(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}"


def _shared_scales(lowered: Graph) -> int:
    """How many sets of two or more emitted linears have one weight amax."""
    linears: dict[Any, int] = {}
    for node in lowered.nodes:
        if node.target is dialect.STORE_LINEAR:
            amax = node_at(node_at(node, 1), 1)
            linears[amax] = linears.get(amax, 0) + 1
    return sum(1 for count in linears.values() if count > 1)


def _rewritten(lowered: Graph) -> set[str]:
    """The tensors that a lowered program computes before it stores, or packs, them, or has codes of.

    %norm_half : bf16[64] = aten.mul.Tensor(%norm, 0.5)
    %norm_new : bf16[64] = fxq.rewrite(%norm, %norm_half)
    %norm_store = fxq.store('norm.weight', %norm_new)     norm.weight
    """
    found: set[str] = set()
    for node in lowered.nodes:
        if node.target is dialect.STORE and node_at(node, 1).target is not dialect.LOAD:
            found.add(str(node.args[0]))
        elif node.target in (dialect.STORE_LINEAR, dialect.STORE_ROWS):
            pack = node_at(node, 1)
            is_new = any(n.target is dialect.REWRITE for n in weight_path(node_at(pack, 0)))
            if is_new or pack.target is dialect.PACK_ROUNDED:
                suffix = ".weight" if node.target is dialect.STORE_LINEAR else ""
                found.add(f"{node.args[0]}{suffix}")
    return found


def sqnr_db(pairs: Any) -> float | None:
    """10 log10(total energy / total squared error) of (squared error, energy) pairs; None without any."""
    error, energy = (
        (sum(column) for column in zip(*pairs, strict=True)) if (pairs := list(pairs)) else (0.0, 0.0)
    )
    if energy == 0:
        return None
    return 10 * math.log10(energy / error) if error > 0 else math.inf


def _ratio(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0] if pair[0] else math.inf


def _amaxes(node: Node) -> Sequence[Node]:
    """What an amax of activations, or of a group's, is made of."""
    return nodes_at(node, 0) if node.target is dialect.SYNC else [node]


def _experts_by_layer(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token counts per experts module: its up and down weights see the same tokens."""
    return {name.rpartition(".")[0]: counts for name, counts in tokens.items()}
