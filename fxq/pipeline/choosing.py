"""Choosing: which format each group gets, by what it was measured to lose and a budget; the frontier of all
budgets."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from fxq.errors import SpecError
from fxq.graph.choices import Choice
from fxq.graph.hub import Stored
from fxq.graph.program import Program
from fxq.numbers.budget import least
from fxq.numbers.formats import FORMATS, check_pair

Cost = Literal["size", "compute"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SCALES_BYTES = 8  # of a quantized tensor: its own scale, and that of its inputs
DEFAULT_BITS = 5.0
# A format may be one of `fxq.numbers.formats.FORMATS`, that for weights alone, or that of the source.
NONE, _WEIGHT_ONLY = "none", " weight-only"
# Values of a program, float64 []: what the model loses with the formats chosen, what with those of the first
# round, and by how much more it loses with all groups in their smallest formats than they do alone.
MEASURED, MEASURED_BEFORE, TOGETHER = "formats_loss", "formats_loss_before", "formats_loss_together"
# A model that loses so many times more or less than was predicted is one of which groups alone say little.
_FAR = 1.5


@dataclass(frozen=True)
class Budget:
    """What a choice may cost: `bits` a weight on average, a `size` in bytes of all the checkpoint's tensors,
    or a loss of at most `max_kl`, the smallest model being wanted. cost: whether bits are those of the file
    or of the operands that are multiplied."""

    bits: float | None = None
    size: int | None = None
    max_kl: float | None = None
    cost: Cost = "size"

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"max_kl: {self.max_kl:g}"
        if self.size is not None:
            return f"size: {self.size:,} bytes"
        return f"bits: {self.bits:g}" + (", cost: compute" if self.cost == "compute" else "")

    def check(self, program: Program) -> None:
        """SpecError unless the budget lies between the smallest and the largest of the formats offered."""
        if self.max_kl is not None:
            return
        rows = [_options(choice, self._costs(choice)) for choice in program.choices]
        low, high = (sum(extreme(cost for _, cost in row) for row in rows) for extreme in (min, max))
        limit, unit, fixed = self._limit(program)
        if limit < low * (1 - 1e-9) or limit > high * (1 + 1e-9):
            said = "less than the smallest" if limit < low else "more than the largest"
            raise SpecError(
                f"choose-formats: {self} is {said} of the formats offered; expected "
                f"{_shown(low / unit + fixed)} to {_shown(high / unit + fixed)}"
            )

    def choose(self, program: Program, losses: Sequence[Sequence[float]], together: float = 1) -> list[int]:
        """The place of the format of each of the program's choices, of which the sum of losses is least.
        together: how much more than that sum the model loses, which matters to `max_kl`."""
        rows = [_options(choice, self._costs(choice)) for choice in program.choices]
        costs = [[cost for _, cost in row] for row in rows]
        lost = [[own[place] for place, _ in row] for own, row in zip(losses, rows, strict=True)]
        if self.max_kl is not None:
            taken = least(costs, lost, self.max_kl / together)
            if taken is None:
                found = sum(map(min, lost)) * together
                raise SpecError(
                    f"choose-formats: {self}: of the formats offered the most exact lose {found:.4g} in all; "
                    "expected more than that, or `none` among the formats"
                )
        else:
            taken = least(lost, costs, self._limit(program)[0])
            assert taken is not None, "checked"
        return [row[i][0] for row, i in zip(rows, taken, strict=True)]

    def _costs(self, choice: Choice) -> tuple[float, ...]:
        if self.size is not None:
            return tuple(_bytes(choice, place) for place in range(len(choice.formats)))
        return choice.operations if self.cost == "compute" else choice.bits

    def _limit(self, program: Program) -> tuple[float, float, float]:
        """(what choices may cost together, what a unit of the budget is of that, what is spent otherwise)."""
        if self.size is not None:
            others = untouched_bytes(program)
            return self.size - others, 1, others
        assert self.bits is not None
        compute = self.cost == "compute"
        unit = sum(choice.work if compute else choice.numbers for choice in program.choices)
        return self.bits * unit, unit, 0


def size_of(text: str) -> int:
    """The bytes of a size such as "18 GB"; SpecError for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text, flags=re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise SpecError(
            f"choose-formats: size is a number of B, KB, MB, GB or TB, as in 18 GB; found {text!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def pair_of(format: str) -> tuple[str, str]:
    """(format of weights, of inputs) of a format as `formats` names it; SpecError if engines know no such."""
    if format == NONE:
        return NONE, NONE
    weights = format.removesuffix(_WEIGHT_ONLY)
    if weights not in FORMATS:
        known = [*FORMATS, *(f"{f.name}{_WEIGHT_ONLY}" for f in FORMATS.values() if NONE in f.inputs), NONE]
        raise SpecError(f"choose-formats: no format is called {format!r}; there are {', '.join(known)}")
    inputs = NONE if format.endswith(_WEIGHT_ONLY) else weights
    check_pair(weights, inputs, f"choose-formats: {format}")
    return weights, inputs


def average_bits(choices: Sequence[Choice], places: Sequence[int], cost: Cost = "size") -> float:
    """The mean bits a weight (or of the operands of a multiplication) with these formats."""
    if cost == "compute":
        spent = sum(choice.operations[place] for choice, place in zip(choices, places, strict=True))
        return spent / sum(choice.work for choice in choices)
    spent = sum(choice.bits[place] for choice, place in zip(choices, places, strict=True))
    return spent / sum(choice.numbers for choice in choices)


def total_bytes(program: Program, places: Sequence[int]) -> int:
    """The bytes of all tensors of a checkpoint with these formats."""
    chosen = sum(_bytes(choice, place) for choice, place in zip(program.choices, places, strict=True))
    return untouched_bytes(program) + round(chosen)


def is_chosen(program: Program) -> bool:
    """Whether there are choices, and formats were chosen."""
    return bool(program.choices) and all(choice.which in program.values for choice in program.choices)


def predicted_loss(program: Program, places: Sequence[int]) -> float:
    """What the model should lose with these formats: what each group loses alone, summed, times how much more
    or less than that they lose together where all have their smallest formats."""
    values = program.values
    alone = sum(c.losses(values)[place] for c, place in zip(program.choices, places, strict=True))
    return alone * float(values.get(TOGETHER, 1))


def smallest(program: Program) -> list[int]:
    """The places of the formats of fewest bits, of several the first."""
    rows = (_options(choice, choice.bits) for choice in program.choices)
    return [min(row, key=itemgetter(1))[0] for row in rows]


def summary(program: Program) -> str | None:
    """How many groups got which format, the bits that makes and the loss; None if nothing was chosen."""
    if not is_chosen(program):
        return None
    places = [choice.place(program.values) for choice in program.choices]
    counts = Counter(choice.formats[place] for choice, place in zip(program.choices, places, strict=True))
    groups = ", ".join(f"{count} {format}" for format, count in sorted(counts.items()))
    bits = average_bits(program.choices, places)
    text = f"chosen for {len(places)} groups: {groups}; {bits:.2f} bits a weight"
    if MEASURED not in program.values:
        return text
    loss, predicted = float(program.values[MEASURED]), predicted_loss(program, places)
    return f"{text}, KL {loss:.4f} nats a token ({predicted:.4f} predicted)"


def notes(program: Program) -> list[str]:
    """What the user should know of how formats were chosen."""
    if not is_chosen(program):
        first = ", ".join(dict.fromkeys(choice.formats[choice.settled] for choice in program.choices))
        said = f"formats are chosen when the model is calibrated; shown is {first} throughout"
        return [said] if first else []
    places = [choice.place(program.values) for choice in program.choices]
    predicted, measured = predicted_loss(program, places), float(program.values.get(MEASURED, 0))
    if MEASURED in program.values and max(predicted, measured) > _FAR * min(predicted, measured):
        return [
            f"by what its groups lose alone the model should lose {predicted:.4g} nats a token with the "
            f"formats chosen, and it loses {measured:.4g}: rounds: 2 of choose-formats chooses by what each "
            "changes in the model as chosen"
        ]
    return []


def untouched_bytes(program: Program) -> int:
    """The bytes of the source's tensors that no choice is about."""
    hub = program.hub
    names = [name for choice in program.choices for name in choice.parameters]
    held = (hub.stored.get(name, Stored.whole(name, ())) for name in names)
    taken = {key for stored in held for keys in stored.keys for key in keys}
    return sum(info.nbytes for key, info in hub.tensors.items() if key not in taken)


def frontier(program: Program, losses: Sequence[Sequence[float]], steps: int = 24) -> list[list[int]]:
    """The best places for budgets of bits from the smallest to the largest, evenly between; each once."""
    rows = [_options(choice, choice.bits) for choice in program.choices]
    low, high = (sum(extreme(value for _, value in row) for row in rows) for extreme in (min, max))
    numbers = sum(choice.numbers for choice in program.choices)
    limits = (low + (high - low) * i / steps for i in range(steps + 1))
    found = (Budget(bits=limit / numbers).choose(program, losses) for limit in limits)
    return [list(places) for places in dict.fromkeys(map(tuple, found))]


def _options(choice: Choice, costs: Sequence[float]) -> list[tuple[int, float]]:
    """(place, cost) of the formats that a group may get."""
    return [
        (place, costs[place])
        for place, format in enumerate(choice.formats)
        if choice.fixed is None or format == choice.fixed
    ]


def _bytes(choice: Choice, place: int) -> float:
    scales = 0 if choice.formats[place] == NONE else _SCALES_BYTES * choice.tensors
    return choice.bits[place] / 8 + scales


def _shown(value: float) -> str:
    return f"{math.floor(value):,} bytes" if value > 1000 else f"{value:.4g}"
