"""How long what decides codes and scales takes a layer, against the least that its operations can.

    python benchmarks/solvers.py [--device cuda] [--weights 128x768x2048 ...]

Each row is one call on weights [n, R, K] with Gram matrices of random tokens. The floor is the operations
that the method needs over the rate that this device reaches for them in a large matrix product, float32
and float64, or the bytes that it must read and write over that of a large copy, whichever takes longer.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxq.numbers.gptq import NEAR, WINDOW, gptq
from fxq.numbers.hessian import quantize_weighted
from fxq.numbers.nvfp4 import BLOCK, quantize_measured
from fxq.numbers.retarget import OUTPUTS, RIDGES, retarget

SWEEPS = 2
# From a block's maximum over six to four times it: so many FP8 scales have to be tried whatever the inputs.
SCALES = 37


@dataclass
class Work:
    """What a call must at least do: operations in float32 and float64, and bytes read and written."""

    single: float
    double: float
    bytes: float

    def floor(self, rates: "Rates") -> float:
        """Seconds."""
        return max(self.single / rates.single + self.double / rates.double, self.bytes / rates.bandwidth)


@dataclass
class Rates:
    """Operations and bytes a second of this device."""

    single: float
    double: float
    bandwidth: float


def rates(device: torch.device) -> Rates:
    """Measured: square products, and a copy of 1 GiB (its bytes count twice, read and written)."""
    size = 8192 if device.type == "cuda" else 1024

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(size, size, dtype=dtype, device=device)
        return 2 * size**3 / seconds(lambda: a @ a, device)

    held = torch.zeros(1 << 30 if device.type == "cuda" else 1 << 27, dtype=torch.uint8, device=device)
    copy = seconds(lambda: held.clone(), device)
    return Rates(product(torch.float32), product(torch.float64), 2 * held.numel() / copy)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median of some calls after one to warm up."""
    took = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls(w: Tensor, x: Tensor) -> Iterator[tuple[str, Callable[[], object], Work]]:
    """Name, call and least work of every solver for weights w [n, R, K] and tokens x [n, T, K]."""
    n, _, width = w.shape
    amax = w.abs().amax((1, 2)).float()
    blocks = x.unflatten(-1, (-1, BLOCK)).transpose(1, 2)
    gram_blocks = blocks.mT @ blocks
    halves = torch.stack([x[:, ::4].mT @ x[:, ::4], x.mT @ x], dim=1)
    gram = halves[:, 1]
    drifted = halves + 0.02 * halves.roll(1, -1)
    count = torch.full((n,), x.shape[1], device=w.device)
    weights, held = w.numel(), 2 * w.numel() + w.numel() * 9 / 16  # read in bf16, codes and scales written
    squares = n * width * width
    a_scale = 16 * 6 + 16 * 17 * 2
    yield (
        "MSE scales",
        lambda: quantize_measured(w, amax, "mse"),
        Work(weights / BLOCK * 8 * 16 * 6, 0, held),
    )
    yield (
        "Hessian scales",
        lambda: quantize_weighted(w, amax, gram_blocks),
        Work(0, weights / BLOCK * SCALES * a_scale, held + 4 * n * width * BLOCK),
    )
    window = WINDOW[1] - WINDOW[0] + 1 + SWEEPS * (NEAR[1] - NEAR[0] + 1)
    yield (
        f"GPTQ, {SWEEPS} sweeps",
        lambda: gptq(w, amax, gram, damp=0.01, order="blocks", sweeps=SWEEPS),
        Work(
            weights * width * (1 + 2 * SWEEPS) + weights / BLOCK * window * a_scale / 2,
            squares * width * 2 / 3,
            held + 4 * squares,
        ),
    )

    some, tries = min(1.0, OUTPUTS / w.shape[1]), len(RIDGES) + 1
    # O C and W H, of both parts for some outputs; for each ridge a factor, a solution and D H; and the last.
    yield (
        "retarget",
        lambda: retarget(w, w, drifted, halves, count),
        Work(
            2 * weights * width * (2 + some * (4 + len(RIDGES))),
            squares * width / 3 * tries + 2 * weights * width * (1 + some * len(RIDGES)),
            held + 16 * squares,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", nargs="+", default=["128x768x2048", "128x2048x768"], help="n x out x in")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    reached = rates(device)
    found = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    table = Table(
        title=f"{found}: {reached.single / 1e12:.2f} and {reached.double / 1e12:.2f} TFLOP/s in float32 and"
        f" float64, {reached.bandwidth / 1e9:.0f} GB/s"
    )
    for title in ("weights", "solver", "seconds", "floor", "ratio", "GiB"):
        table.add_column(title, justify="left" if title in ("weights", "solver") else "right")
    for text in arguments.weights:
        n, rows, width = (int(number) for number in text.split("x"))
        generator = torch.Generator(device=device).manual_seed(0)
        w = (torch.randn(n, rows, width, device=device, generator=generator) * 0.02).to(torch.bfloat16)
        tokens = 8 * width
        x = torch.randn(n, tokens, width, device=device, generator=generator)
        for name, call, work in calls(w, x):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            took, floor = seconds(call, device, repeats=1), work.floor(reached)
            memory = (
                f"{(torch.cuda.max_memory_allocated(device) - before) / 2**30:.2f}"
                if device.type == "cuda"
                else "-"
            )
            table.add_row(text, name, f"{took:.3f}", f"{floor:.3f}", f"{took / floor:.1f}", memory)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
