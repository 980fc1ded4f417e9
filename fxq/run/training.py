"""Training: what of a block follows gradients, step by step, and keeps what does best on text held back."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SourceError
from fxq.graph import edit
from fxq.graph.arguments import node_at
from fxq.graph.dialect import REWRITE, VALUE
from fxq.graph.program import Program
from fxq.graph.structure.norms import norm_weights
from fxq.run.blocks import Block

# Of so many lots one is held back.
ONE_OF = 8
# How often the error on what is held back is looked at.
LOOKS = 10
# What Adam moves a norm's weight by in a step at first, as a share of its size.
NORMS_RATE = 1e-3
# Several batches, by their numbers.
Lot = Sequence[int]
# (batch, nodes of the program -> what they are now) -> (what is lost, a mean over rows; how many rows).
Loss = Callable[[int, Mapping[Node, Tensor]], tuple[Tensor, int]]


class Part(Protocol):
    """What moves. node: of the program, for which it stands."""

    node: Node

    @property
    def best(self) -> Tensor:
        """What is kept of the value."""
        ...

    def groups(self) -> list[dict[str, object]]:
        """What moves, and its rate, as optimizers have them; nothing if it stays."""
        ...

    def values(self) -> Tensor:
        """The node's value now, through which gradients flow."""
        ...

    def limit(self) -> None:
        """Bring back what moved too far."""
        ...

    def keep(self) -> None:
        """What is now is best."""
        ...


class NormWeight:
    """The weight of a norm [K], which begins as it is in a block."""

    best: Tensor

    def __init__(self, node: Node, block: Block) -> None:
        self.node, self.best = node, block.value(node)
        self.moved = self.best.to(torch.float32, copy=True).requires_grad_()

    def groups(self) -> list[dict[str, object]]:
        size = float(self.best.float().square().mean().sqrt())
        return [{"params": [self.moved], "lr": NORMS_RATE * size}]

    def values(self) -> Tensor:
        return self.moved.to(self.best.dtype)

    def limit(self) -> None:
        pass  # it may be anything

    def keep(self) -> None:
        self.best = self.values().detach()


def untrained_norms(program: Program, suffix: str) -> dict[Node, list[Node]]:
    """Weights of norms -> what reads them, but for those that are given by a value of such a name."""
    found = norm_weights(program.graph, program.constants)
    return {node: readers for node, readers in found.items() if not _is_given(node, suffix)}


def give_norms(program: Program, norms: Mapping[Node, Sequence[Node]], suffix: str) -> None:
    """Let what reads norms read a value of `program.values`, `NAME suffix`."""
    for norm, readers in norms.items():
        value = edit.value(program.graph, f"{norm.name}{suffix}", norm.meta["val"])
        made = edit.call(program.graph, f"{norm.name}_new", REWRITE, norm, value)
        edit.replace(norm, made, readers)


def _is_given(norm: Node, suffix: str) -> bool:
    new = node_at(norm, 1) if norm.target is REWRITE else norm
    return new.target is VALUE and str(new.args[0]).endswith(suffix)


def lots_of(batches: Sequence[Tensor], tokens: int, who: str) -> tuple[list[Tensor], list[Lot]]:
    """Batches int64 [B, S], and two lots or more of them, of about so many tokens each, mixed; SourceError
    for less than two samples."""
    batches = list(batches) if len(batches) > 1 else [row for batch in batches for row in batch.split(1)]
    if len(batches) < 2:
        raise SourceError(
            f"{who} holds a part of the calibration text back: expected two samples or more, "
            f"found {len(batches)}"
        )
    order = list(range(len(batches)))
    random.Random(0).shuffle(order)
    enough = min(tokens, sum(batch.numel() for batch in batches) // 2)
    lots: list[list[int]] = [[]]
    for batch in order:
        if sum(batches[i].numel() for i in lots[-1]) >= enough:
            lots.append([])
        lots[-1].append(batch)
    return batches, list(lots) if len(lots) > 1 else [order[:1], order[1:]]


def train(parts: Sequence[Part], lots: Sequence[Lot], loss: Loss, steps: int) -> None:
    """Move the parts by Adam, a lot a step, and let them keep what loses least of the lots held back: one of
    eight. Where nothing loses less than at the beginning, nothing is kept."""
    parts = [part for part in parts if part.groups()]
    if not parts:
        return
    held, fitted = lots[::ONE_OF], [lot for i, lot in enumerate(lots) if i % ONE_OF]
    order, least = random.Random(0), _mean(loss, held, {})
    adam = torch.optim.Adam([group for part in parts for group in part.groups()], betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for step in range(steps):
        if step % len(fitted) == 0:
            order.shuffle(fitted)
        _add_gradients(loss, fitted[step % len(fitted)], parts)
        adam.step()
        adam.zero_grad()
        decay.step()
        for part in parts:
            part.limit()
        if (step + 1) * LOOKS // steps > step * LOOKS // steps:
            with torch.no_grad():
                lost = _mean(loss, held, {part.node: part.values() for part in parts})
            if lost < least:
                least = lost
                for part in parts:
                    part.keep()


def _add_gradients(loss: Loss, lot: Lot, parts: Sequence[Part]) -> None:
    """Those of what a lot loses, a batch at a time, to the value of each part, and from there, once, to what
    moves."""
    with torch.enable_grad():
        values = {part.node: part.values() for part in parts}
        leaves = {node: value.detach().requires_grad_() for node, value in values.items()}
        for batch in lot:
            lost, rows = loss(batch, leaves)
            if lost.requires_grad:  # else nothing that moves leads to it
                (lost * rows).backward()
    reached = [node for node, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([values[node] for node in reached], [leaves[node].grad for node in reached])


def free_memory(device: torch.device) -> int | None:
    """The bytes that could be taken on a device; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)


@torch.no_grad()
def _mean(loss: Loss, lots: Sequence[Lot], now: Mapping[Node, Tensor]) -> float:
    """What is lost a row."""
    lost = [loss(batch, now) for lot in lots for batch in lot]
    return sum(float(each) * rows for each, rows in lost) / sum(rows for _, rows in lost)
