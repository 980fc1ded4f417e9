"""The scale search against plain max, against trying all 126 candidates, and against the speed of memory.

python benchmarks/sweep.py                      # CUDA where there is one, else the CPU with smaller weights
python benchmarks/sweep.py --exactness 100000000
"""

import argparse
import functools
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxq.numbers import kernels, nvfp4

CASES = {
    "gate_up of Qwen3-30B-A3B": (128, 1536, 2048),
    "down of Qwen3-30B-A3B": (128, 2048, 768),
    "DeepSeek-V3-like, 64 of 256": (64, 4096, 7168),
    "dense": (1, 8192, 28672),
    "tiny slices": (512, 64, 64),
}
CPU_SLICES = {"gate_up of Qwen3-30B-A3B": 4, "down of Qwen3-30B-A3B": 8, "DeepSeek-V3-like, 64 of 256": 1}
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeat", type=int, default=None, help="timed runs (default: 20 on CUDA, 3 on the CPU)"
    )
    parser.add_argument("--exactness", type=int, default=None, metavar="BLOCKS", help="blocks checked in all")
    parser.add_argument("--no-timing", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {implementation(device).__name__}\n")
    if not args.no_timing:
        timing(device, args.repeat or (20 if cuda else 3))
    exactness(device, args.exactness or (100_000_000 if cuda else 200_000))


def implementation(device: torch.device) -> ModuleType:
    return kernels.implementation(torch.empty(1, dtype=torch.bfloat16, device=device))


def timing(device: torch.device, repeat: int) -> None:
    """One table a case: milliseconds, GB/s of weights, ratio to the floor and to 126 candidates."""
    start = time.perf_counter()
    w = gaussian((1, 16, 64), device)
    implementation(device).quantize(w, torch.ones(1, device=device), True, True, False)
    print(f"first call, with loading or compiling: {time.perf_counter() - start:.2f} s")
    bandwidth = copy_bandwidth(device, repeat)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s, read and written\n")
    run = getattr(implementation(device), "launch", implementation(device).quantize)
    for case, shape in CASES.items():
        if device.type == "cpu":
            shape = (min(shape[0], CPU_SLICES.get(case, shape[0])), *shape[1:])
        for layout in ("", ", stored transposed"):
            w = gaussian(shape, device)
            scale_2 = nvfp4.global_scale(w.abs().amax((1, 2)).float())
            if layout:
                w = w.transpose(1, 2).contiguous().transpose(1, 2)
            report(f"{case}{layout} {list(shape)}", w, scale_2, run, bandwidth, repeat)


def report(
    title: str, w: Tensor, scale_2: Tensor, run: Callable[..., Any], bandwidth: float, repeat: int
) -> None:
    every = w[: max(1, len(w) // 8)] if w.is_cuda else w[:1, : max(1, 250_000 // w.shape[-1])]
    tried = every_candidate_triton if w.is_cuda else every_candidate
    slow = measure(lambda: tried(every, scale_2[: len(every)]), w.device, 3) * w.numel() / every.numel()
    scales = w.numel() / 16
    rows: list[tuple[str, Callable[[], Any], float]] = [
        (f"{name}{what}", functools.partial(run, w, scale_2, search, pack, measure), moved)
        for name, search in (("search", True), ("plain max", False))
        for what, pack, measure, moved in (
            (" + pack", True, False, w.nbytes + w.numel() / 2 + scales),
            (" + pack + errors", True, True, w.nbytes + w.numel() / 2 + scales),
            (", scales only", False, False, w.nbytes + scales),
        )
    ]
    print(f"{title}, {w.nbytes / 1e6:.0f} MB")
    print(f"| {'':25} |       ms | GB/s of weights | M weights/s | x floor | faster than 126 |")
    print("|---|---|---|---|---|---|")
    for name, function, moved in rows:
        seconds = measure(function, w.device, repeat)
        print(
            f"| {name:25} | {seconds * 1e3:8.3f} | {w.nbytes / seconds / 1e9:15.1f} |"
            f" {w.numel() / seconds / 1e6:11.0f} | {seconds * bandwidth / moved:7.2f}"
            f" | {slow / seconds:15.1f} |"
        )
    print(
        f"| {'126 candidates, scales':25} | {slow * 1e3:8.3f} | from {every.numel() / 1e6:.1f} M weights |\n"
    )


def measure(function: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Seconds: the median of five calls by device events on CUDA, the least by the wall clock on the CPU."""
    function()
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 5e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, repeat: int) -> float:
    source = torch.ones(
        (1 << 29) if device.type == "cuda" else (1 << 25), dtype=torch.bfloat16, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device, repeat)


def gaussian(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)


# ------------------------------------------------------------------------------- all 126 candidates


def every_candidate(w: Tensor, scale_2: Tensor) -> Tensor:
    """Codes by trying all 126 in float32 with torch operators."""
    blocks = w.float().abs().reshape(len(w), -1, 16)
    best = torch.full(blocks.shape[:2], torch.inf, device=w.device)
    codes = torch.zeros(blocks.shape[:2], dtype=torch.uint8, device=w.device)
    for code in range(1, 127):
        value = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
        scale = (value * scale_2)[:, None, None]
        x = blocks / scale
        step = torch.where(x < 2, 0.5, torch.where(x < 4, 1.0, 2.0))
        error = (((x / step).round() * step).clamp(max=6) * scale - blocks).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, code, codes)
    return codes


@functools.cache
def candidate_kernel() -> Any:
    """A Triton kernel that tries all 126: tiles of 64 blocks, distances to every grid point, no bounds."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(
        w, scale_2, chosen, codes, least, lost, per_slice, blocks, WIDE: tl.constexpr, T: tl.constexpr
    ):
        n = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
        live = n < blocks
        at = n[:, None] * 16 + tl.arange(0, 16)[None, :]
        dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
        m = tl.abs(tl.load(w + at, mask=live[:, None], other=0).to(dtype))
        unit = tl.load(scale_2 + n // per_slice, mask=live, other=1).to(dtype)
        picked = tl.load(chosen + n, mask=live, other=1).to(tl.int32)
        best = tl.zeros([T], tl.int32)
        smallest = tl.full([T], float("inf"), dtype)
        at_picked = tl.full([T], float("inf"), dtype)
        for code in range(1, 127):
            value = tl.where(
                code < 8, code * 0.001953125, (1 + (code & 7) * 0.125) * tl.exp2((code >> 3) - 7.0)
            )
            s = (unit * value.to(dtype))[:, None]
            e = tl.minimum(m, tl.abs(m - 0.5 * s))
            e = tl.minimum(e, tl.minimum(tl.abs(m - s), tl.abs(m - 1.5 * s)))
            e = tl.minimum(e, tl.minimum(tl.abs(m - 2 * s), tl.abs(m - 3 * s)))
            e = tl.minimum(e, tl.minimum(tl.abs(m - 4 * s), tl.abs(m - 6 * s)))
            loss = tl.sum(e * e, 1)
            best = tl.where(loss < smallest, code, best)
            smallest = tl.minimum(smallest, loss)
            at_picked = tl.where(picked == code, loss, at_picked)
        tl.store(codes + n, best.to(tl.uint8), mask=live)
        if WIDE:
            tl.store(least + n, smallest, mask=live)
            tl.store(lost + n, at_picked, mask=live)

    return kernel


def every_candidate_triton(w: Tensor, scale_2: Tensor) -> Tensor:
    w = w if w.is_contiguous() else w.transpose(1, 2)  # the same bytes, blocks along the other side
    blocks = w.numel() // 16
    codes = torch.empty(blocks, dtype=torch.uint8, device=w.device)
    candidate_kernel()[((blocks + 63) // 64,)](
        w, scale_2, codes, codes, scale_2, scale_2, blocks // len(w), blocks, WIDE=False, T=64, num_warps=2
    )
    return codes


# --------------------------------------------------------------------------------------- exactness


def one_outlier(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    w = normal(shape, g) * 1e-3
    w[..., ::16] *= 100
    return w


def adversarial(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Grid points, midpoints and their neighbours: ties and near ties everywhere."""
    points = torch.tensor([*GRID, 0.25, 0.75, 1.25, 1.75, 2.25, 2.5, 3.5, 4.5, 5.0, 7.0], device=g.device)
    w = points[torch.randint(len(points), shape, generator=g, device=g.device)]
    return w * (1 + torch.randint(-1, 2, shape, generator=g, device=g.device) * 2.0**-8)


def student(shape: tuple[int, ...], g: torch.Generator, freedom: float) -> Tensor:
    """Normal over the root of a chi-square of 3 or 1.5 degrees of freedom (a gamma of half as many)."""
    torch.manual_seed(g.initial_seed())
    gamma = torch.distributions.Gamma(freedom / 2, torch.tensor(0.5, device=g.device)).sample(shape)
    return normal(shape, g) / (gamma / freedom).sqrt()


def normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device)


def uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, device=g.device)


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "Gaussian": lambda shape, g: normal(shape, g) * 0.02,
    "Gaussian, float32": lambda shape, g: normal(shape, g) * 0.02,
    "Student-t, 3": lambda shape, g: student(shape, g, 3) * 0.01,
    "Student-t, 1.5": lambda shape, g: student(shape, g, 1.5) * 0.01,
    "Laplace": lambda shape, g: normal(shape, g).sign() * (1 - uniform(shape, g)).log() * 0.02,
    "row-scaled": lambda shape, g: normal(shape, g) * torch.exp2(uniform((*shape[:2], 1), g) * 18 - 12),
    "sparse": lambda shape, g: normal(shape, g) * (uniform(shape, g) < 0.05),
    "constant": lambda shape, g: torch.ones(shape, device=g.device) * uniform((*shape[:2], 1), g),
    "one outlier": one_outlier,
    "denormal scales": lambda shape, g: normal(shape, g) * torch.exp2(-uniform((*shape[:2], 1), g) * 22),
    "adversarial": adversarial,
}


def exactness(device: torch.device, blocks: int) -> None:
    """Chosen scales against the float64 minimum of all 126, packed bytes against the nearest grid points."""
    rows = 4096 if device.type == "cuda" else 64
    per_slice = rows * 2048 // 16
    slices = math.ceil(blocks / len(DISTRIBUTIONS) / per_slice)
    print(
        "| blocks | number | other codes | worst loss / least - 1 | larger of equals | codes not nearest |"
        " error reported |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, make in DISTRIBUTIONS.items():
        found = [0.0] * 6
        for seed in range(slices):
            w = make((1, rows, 2048), torch.Generator(device).manual_seed(seed))
            w = w.float() if "float32" in name else w.bfloat16()
            checked = check(w, nvfp4.quantize_measured(w, w.abs().amax((1, 2)).float(), "mse"))
            found = [
                max(a, b) if i in (2, 5) else a + b
                for i, (a, b) in enumerate(zip(found, checked, strict=True))
            ]
        number, other, worst, larger, wrong, off = found
        print(
            f"| {name} | {number:.0f} | {other:.0f} | {worst:.1e} | {larger:.0f} | {wrong:.0f} | {off:.1e} |",
            flush=True,
        )


def check(w: Tensor, packed: nvfp4.Measured) -> tuple[float, ...]:
    """(blocks, codes unlike the brute force's, worst relative excess, larger ones of equals, wrong bytes,
    what the root of the error reported is off by, in that of the energy) of one slice."""
    chosen = packed.scale.view(torch.uint8).reshape(-1)
    code, least, lost = least_of_all(w, packed.scale_2, chosen)
    excess = torch.where(least > 0, lost / least - 1, torch.where(lost > 0, torch.inf, 0.0))
    larger = (chosen > code) & (lost >= least)
    step = (packed.scale.double() * packed.scale_2.double()[:, None, None]).reshape(-1, 1)
    magnitudes = w.reshape(-1, 16)
    codes = torch.stack([packed.weight & 7, packed.weight >> 4 & 7], -1).reshape(-1, 16)
    grid = torch.tensor(GRID, device=w.device, dtype=torch.float64)
    wrong = 0
    for part in (slice(i, i + (1 << 18)) for i in range(0, len(codes), 1 << 18)):
        m, s = magnitudes[part].double().abs(), step[part]
        nearest = functools.reduce(torch.minimum, ((m - point * s).abs() for point in GRID))
        wrong += int(((m - grid[codes[part].int()] * s).abs() > nearest + 2.0**-22 * s * 6).sum())
    signs = torch.stack([packed.weight >> 3 & 1, packed.weight >> 7], -1).reshape(-1, 16)
    wrong += int((signs != (magnitudes < 0)).sum())
    off = float((packed.error.sqrt() - lost.sum().sqrt()).abs() / packed.energy.sqrt())
    other = float((chosen != code).sum())
    return len(chosen), other, float(excess.max()), float(larger.sum()), float(wrong), off


def least_of_all(w: Tensor, scale_2: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(code, least loss, loss at `chosen`) of each block by brute force in float64; [blocks] each."""
    blocks = w.numel() // 16
    if w.is_cuda:
        code = torch.empty(blocks, dtype=torch.uint8, device=w.device)
        least, lost = (torch.empty(blocks, dtype=torch.float64, device=w.device) for _ in range(2))
        candidate_kernel()[((blocks + 63) // 64,)](
            w, scale_2, chosen, code, least, lost, blocks // len(w), blocks, WIDE=True, T=64, num_warps=2
        )
        return code, least, lost
    m = w.double().abs().reshape(-1, 16)
    unit = scale_2.double().repeat_interleave(blocks // len(w))[:, None]
    code = torch.zeros(blocks, dtype=torch.uint8)
    least = torch.full((blocks,), torch.inf, dtype=torch.float64)
    lost = least.clone()
    for candidate in range(1, 127):
        s = unit * torch.tensor(candidate, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        loss = functools.reduce(torch.minimum, ((m - point * s).abs() for point in GRID)).square().sum(-1)
        code = torch.where(loss < least, candidate, code)
        least = torch.minimum(least, loss)
        lost = torch.where(chosen == candidate, loss, lost)
    return code, least, lost


if __name__ == "__main__":
    main()
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", file=sys.stderr)
