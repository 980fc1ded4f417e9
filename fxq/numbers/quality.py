"""What packing did to each weight, seen while it is at hand: its error, what kind of values it has, and where
the search put its block scales."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fxq.numbers.formats import Format, Measured
from fxq.numbers.mxfp4 import Cast
from fxq.numbers.nvfp4 import BLOCK

# Block scales are compared by their codes, which are in the order of their values; of FP8's 8 are a factor of
# two.
MOST_STEPS = 16
STEPS = range(-MOST_STEPS, MOST_STEPS + 1)
# Of each weight about so many are looked at for all but the error: rows enough to tell, and so few that torch
# does not share the work among threads.
SAMPLED = 30_000


class Quality(NamedTuple):
    """One weight: sum (w - w')**2 and sum w**2; crest: mean of its blocks' maximum over their root mean
    square; spread: its global amax over the median block's; steps: how many sampled blocks got a scale so
    many codes above (STEPS) the one that reaches their maximum, farther ones counted at the ends; empty
    for a weight without block scales; zeros: what it is stored as that holds zeros alone, and should not;
    inexact: of a weight that was cast, how many blocks do not decode to what they were; None of others."""

    error: float
    energy: float
    crest: float = 0.0
    spread: float = 0.0
    steps: tuple[int, ...] = ()
    zeros: tuple[str, ...] = ()
    inexact: int | None = None

    @classmethod
    def of(cls, record: Sequence[Any]) -> Self:
        """From what JSON keeps of one."""
        error, energy, crest, spread, steps, zeros, inexact = record
        return cls(error, energy, crest, spread, tuple(steps), tuple(zeros), inexact)

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(energy / error); None if it is exact."""
        return 10 * math.log10(self.energy / self.error) if self.error > 0 < self.energy else None


def qualities(values: Tensor, packed: Measured, format: Format) -> list[Quality]:
    """A record for each of the weights [n, rows, K] that were packed together in a format."""
    # On the CPU one by one: torch would share larger work with threads that pack meanwhile.
    step = 1 if values.device.type == "cpu" else len(values)
    lots = [slice(start, start + step) for start in range(0, len(values), step)]
    sampled = [_sampled(values[lot], packed, format, lot) for lot in lots]
    error, energy = packed.error.clone(), packed.energy.clone()
    for i in (energy == 0).nonzero().flatten().tolist():  # zeros, or so small that nothing of them is left
        error[i] = energy[i] = values[i].double().square().sum()
    inexact = packed.inexact.tolist() if isinstance(packed, Cast) else [None] * len(values)
    columns = error.tolist(), energy.tolist(), itertools.chain(*sampled), inexact
    return [Quality(error, energy, *rest, inexact=n) for error, energy, rest, n in zip(*columns, strict=True)]


def _sampled(
    values: Tensor, packed: Measured, format: Format, lot: slice
) -> Iterator[tuple[float, float, tuple[int, ...]]]:
    """crest, spread and steps of some of the weights, by some of their rows."""
    every = max(1, -(-values.shape[1] * values.shape[2] // SAMPLED))
    block = format.block or BLOCK
    whole = values.shape[2] // block * block
    blocks = values[:, ::every, :whole].unflatten(-1, (-1, block)).to(torch.float32).flatten(1, 2)
    amax = blocks.abs().amax(-1)
    filled = amax > 0
    square = (blocks / torch.where(filled, amax, 1)[..., None]).square().mean(-1)  # of any magnitude
    crests = torch.where(filled, square.rsqrt(), 0).sum(1) / filled.sum(1).clamp_min(1)
    scalars = list(format.scalars(packed).values())
    tensor_scale = scalars[0] if scalars else packed.scale.flatten(1).amax(1)
    largest = tensor_scale[lot] * format.largest
    if format.reach is not None:
        reach = format.reach(amax, tensor_scale[lot])
        steps = _steps(packed.scale[lot, ::every].flatten(1), reach, filled).tolist()
    else:
        steps = [[]] * len(values)
    spreads = torch.where(filled.any(1), largest / amax.median(1).values.clamp_min(1e-38), 0)
    spreads = spreads.clamp_max(torch.finfo(torch.float32).max)
    return zip(crests.tolist(), spreads.tolist(), map(tuple, steps), strict=True)


def _steps(scale: Tensor, reach: Tensor, filled: Tensor) -> Tensor:
    """int64 [n, len(STEPS)]: blocks by the distance of their scale from the one that reaches the maximum."""
    distance = scale.view(torch.uint8).long() - reach.view(torch.uint8).long()
    place = (distance.clamp(-MOST_STEPS, MOST_STEPS) + MOST_STEPS).where(filled, len(STEPS))
    counts = torch.zeros(len(scale), len(STEPS) + 1, dtype=torch.int64, device=scale.device)
    return counts.scatter_add_(1, place, torch.ones_like(place))[:, :-1]
