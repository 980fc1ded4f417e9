"""Computed: what a checkpoint program stores and does not copy, packed or rewritten weights, computed ahead
of the writer on other threads.

If calibration is yet to be done it is done here, and every weight is packed while it is there for that.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import CheckpointError, SourceError
from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.hub import Stored, WeightSource
from fxq.graph.program import Program
from fxq.numbers.formats import FORMATS, Format, Measured
from fxq.numbers.quality import Quality, qualities
from fxq.run.loader import on_host
from fxq.run.stages import AHEAD, stage
from fxq.run.statistics import Calibration
from fxq.run.weights import Computation, TensorExpressions, WeightExpressions, check_weight, needs
from fxq.run.work import Step

# Computations at the same time: on a CPU two, so that no core waits for the end of one.
THREADS = {"cpu": 2, "cuda": 1}


@dataclass(frozen=True)
class PackedWeights:
    """Weights [n, out, in] that were packed in one launch: their pack nodes, themselves on the device, what
    they became in host memory, how well. filled: for each, first row of what a store takes of it -> whether
    that row has another code than zero."""

    packs: Sequence[Node]
    values: Tensor
    packed: Measured
    qualities: Sequence[Quality]
    filled: Sequence[Mapping[int, bool]]


@dataclass(frozen=True)
class WholeTensor:
    """What a store writes that packs nothing, in host memory: a rewritten tensor, or one of the source that
    calibration had read."""

    store: Node
    value: Tensor
    is_finite: bool


Result = PackedWeights | WholeTensor


@dataclass(frozen=True)
class _Task:
    """nbytes: of the weights that are held for it."""

    nbytes: int
    work: Callable[[], list[Result]]


class Computed:
    """Everything of a program that is packed or rewritten.

    left: packs, and stores of rewritten tensors, that are to be computed. uncopied: tensor of the source ->
    store that carries it through; what calibration reads of these is taken out and given too. batches, keep:
    for statistics that are pending, calibration batches int64 [B, S], and what is called when all are found;
    step: is told what was done for them. Statistics that are no single number go from `program.values` when
    nothing needs them any more.
    """

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        device: torch.device,
        left: Iterable[Node],
        uncopied: dict[str, Node],
        batches: Sequence[Tensor],
        keep: Callable[[], None],
        step: Step,
    ) -> None:
        self.program, self.source, self.device = program, source, device
        self.left, self.uncopied = dict.fromkeys(left), uncopied
        self.batches, self.keep, self.step = batches, keep, step
        self.is_all_there = True

    def results(self) -> Generator[list[Result]]:
        """All results, in an order of their own, made while the next are read."""
        threads = THREADS[self.device.type]
        return stage(
            lambda task: task.work(),
            self._tasks(),
            threads=threads,
            ahead=threads * AHEAD[self.device.type],
            size=lambda task: task.nbytes,
        )

    def _tasks(self) -> Iterator[_Task]:
        if self.program.pending is not None:
            yield from self._calibrated(self.program.pending == "quantized")
            self.program.pending = None
            if self.is_all_there:
                self.keep()
        yield from self._computed(list(self.left), {})

    def _calibrated(self, is_rounded: bool) -> Iterator[_Task]:
        """Find the statistics that are pending, and compute what can be of the weights that this reads."""
        ready: list[_Task] = []

        def sink(roundings: tuple[Node, ...], values: Tensor, amaxes: Tensor, measured: Measured) -> None:
            packs = [self.program.packs[node] for node in roundings if node in self.program.packs]
            if len(packs) == len(roundings):
                for pack in packs:
                    self.left.pop(pack, None)
                ready.append(_Task(values.nbytes, lambda: [_looked_at(packs, values, measured)]))

        waiting = needs(self.left, self.program.constants)
        coming: set[Node] = set()

        def is_kept(statistic: str) -> bool:
            used = any(statistic in waiting.of[node] for node in self.left if node not in coming)
            self.is_all_there &= used
            return used

        calibration = Calibration(
            self.program,
            self.source,
            self.device,
            prefix="quantized" if is_rounded else "original",
            sink=sink if is_rounded else None,
            hold=True,
            keep=is_kept,
        )
        calibration.streaming.step = self.step
        for roundings in calibration.streaming.origins.values() if is_rounded else ():
            packs = [self.program.packs[node] for node in roundings if node in self.program.packs]
            coming.update(packs if len(packs) == len(roundings) else ())
        held: dict[str, Tensor] = {}  # until all that needs it is computed
        with closing(calibration.segments(self.batches)) as segments:
            for resident in segments:
                while ready:
                    yield ready.pop(0)
                held |= resident
                known = self.program.values.keys() | held.keys()
                now = [node for node in waiting.reading(held) if node in self.left and node not in coming]
                yield from self._computed([node for node in now if waiting.of[node] <= known], held)
                yield from self._whole(resident)
                needed = {name for node in self.left for name in waiting.of[node]}
                at_hand = {name for node in self.left if node not in coming for name in waiting.of[node]}
                held = {name: value for name, value in held.items() if name in at_hand}
                used_up = [n for n, v in self.program.values.items() if v.dim() and n not in needed]
                for name in used_up:  # of a large model all of them would not fit
                    del self.program.values[name]
                    self.is_all_there = False
                del resident

    def _computed(self, nodes: list[Node], resident: Mapping[str, Tensor]) -> Iterator[_Task]:
        """What is packed or rewritten, of parameters at hand or read."""
        for node in nodes:
            del self.left[node]
        values = dict(self.program.values)  # as some go before a thread comes to what needs them
        expressions = WeightExpressions(self.source, self.device, self.program.constants, values)
        with closing(expressions.computations(nodes, resident)) as computations:
            for computation in computations:
                yield _Task(computation.nbytes, functools.partial(self._compute, computation))

    @torch.no_grad()
    def _compute(self, computation: Computation) -> list[Result]:
        results: list[Result] = []
        for nodes in computation.groups:
            if dialect.is_pack(nodes[0]):
                results.append(self._packed(nodes, computation.expressions))
            else:
                store = nodes[0]
                value = on_host(computation.expressions.one(node_at(store, 1)))
                if not is_finite(value):
                    name = node_at(store, 1).name
                    raise CheckpointError(
                        f"{store.args[0]}: expected finite values of %{name}, found NaN or Inf"
                    )
                results.append(WholeTensor(store, value, True))
        return results

    def _packed(self, packs: Sequence[Node], expressions: TensorExpressions) -> PackedWeights:
        values = expressions.many(node_at(pack, 0) for pack in packs)
        try:
            return _looked_at(packs, values, expressions.many(packs))
        except SourceError:
            for w, value in expressions.held.items():  # a sibling's may have broken the group's amax
                if value.dim() == 2:
                    check_weight(self.program.hub, w, value)
            raise

    def _whole(self, resident: Mapping[str, Tensor]) -> Iterator[_Task]:
        """What is carried through and lies in parameters at hand."""
        hub = self.program.hub
        for name, value in resident.items():
            stored = hub.stored.get(name, Stored.whole(name, value.shape))
            wanted = {key: hub.tensors[key] for keys in stored.keys for key in keys if key in self.uncopied}
            for key, tensor in stored.tensors(value, wanted):
                yield _Task(tensor.nbytes, functools.partial(_copied, self.uncopied.pop(key), tensor))


@torch.no_grad()
def _looked_at(packs: Sequence[Node], values: Tensor, measured: Measured) -> PackedWeights:
    """Packed weights, with what can be said of them where they are."""
    format = format_of(packs[0])
    found = qualities(values, measured, format)
    starts = sorted({cast(int, store.kwargs["start"]) for pack in packs for store in pack.users})
    codes = measured.weight.view(torch.uint8)[:, starts] & format.magnitude
    filled = [dict(zip(starts, row, strict=True)) for row in codes.any(-1).tolist()]
    return PackedWeights(packs, values, _in_host_memory(measured), found, filled)


def _copied(store: Node, tensor: Tensor) -> list[Result]:
    value = on_host(tensor)
    value = value.clone() if value is tensor else value  # the parameter itself goes
    return [WholeTensor(store, value, is_finite(value))]


def format_of(pack: Node) -> Format:
    """The number format that a node packs to."""
    return FORMATS[str(pack.kwargs["format"])]


def is_finite(values: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf; of types of one byte, and integers, nothing is said."""
    if not values.is_floating_point() or values.dtype.itemsize < 2 or not values.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def _in_host_memory(packed: Any) -> Measured:
    """A packed weight, a dataclass of tensors, with each of them on the CPU."""
    tensors = {f.name: on_host(getattr(packed, f.name)) for f in dataclasses.fields(packed)}
    return cast(Measured, dataclasses.replace(packed, **tensors))
