"""`fxq compile` of whole checkpoints against a plain copy of the same files, and against ModelOpt.

    python benchmarks/end_to_end.py MODEL [MODEL ...] [--spec NAME ...] [--device cuda] [--cold]

Each MODEL (benchmarks/make_checkpoint.py makes them, with calib.jsonl inside) is read once before the clock
starts, so that all runs find the files in the page cache; with --cold (as root) the cache is emptied before
each run instead. Every run is a process of its own: wall time from launch to exit, peak GPU memory, and peak
resident memory above that of a process that imports what fxq imports (tracing one layer and packing one
matrix, as torch imports much when it is first used). Below the table: how fast weights were calibrated and
packed, against the kernel alone on weights that lie in memory, timed before and after. --modelopt PYTHON is
one that has nvidia-modelopt; it loads the model and runs the recipe nearest to the spec.
"""

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_IMPORTS = """
import resource
import torch
from transformers import LlamaConfig
import fxq.audit, fxq.checkpoint.writer, fxq.compile, fxq.passes
from fxq.numbers import nvfp4
from fxq.trace.export import trace
from fxq.trace.fake_model import fake_model_of_config
size = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, vocab_size=64, num_hidden_layers=1)
trace(fake_model_of_config(LlamaConfig(**size), torch.bfloat16))
nvfp4.quantize_measured(torch.ones(1, 16, 64, dtype=torch.bfloat16), torch.ones(1), "mse")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
_KERNEL = """
import sys, time, torch
from fxq.numbers import nvfp4
device, scale = sys.argv[1:3]
w = torch.randn(8, 1024, 1024, device=device).to(torch.bfloat16) * 0.02
amax = w.abs().amax((1, 2)).float()
def run():
    nvfp4.quantize_measured(w, amax, scale).error.sum().item()
run()
start = time.perf_counter()
count = 0
while time.perf_counter() - start < 3:
    run()
    count += w.numel()
print(count / (time.perf_counter() - start))
"""
_MODELOPT = """
import json, sys, time
import torch, modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model, out, recipe, device = sys.argv[1:5]
lines = [json.loads(line)["input_ids"] for line in open(model + "/calib.jsonl")]
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device)
def forward(m):
    for ids in lines:
        m(torch.tensor([ids], device=device))
mtq.quantize(loaded, getattr(mtq, recipe), forward)
export_hf_checkpoint(loaded, export_dir=out)
if device == "cuda":
    print(torch.cuda.max_memory_allocated())
"""


@dataclass
class Run:
    """What one process took: seconds, bytes of memory, and bytes of GPU memory."""

    seconds: float
    memory: int
    device_memory: int | None = None


def process(command: list[str]) -> tuple[Run, str]:
    """Run a process to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} ... ended with {done.returncode}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Run(seconds, 1024 * memory if memory > before else 0), done.stdout


def copy(model: Path, out: Path) -> tuple[float, float]:
    """Seconds to copy all files, and to have them on the disk."""
    start = time.perf_counter()
    shutil.copytree(model, out)
    copied = time.perf_counter() - start
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return copied, time.perf_counter() - start


def compile_(model: Path, spec: str, device: str, out: Path) -> tuple[Run, dict[str, Any]]:
    """One `fxq compile` from launch to exit."""
    command = [sys.executable, "-m", "fxq", "compile", str(model), "--spec", spec, "--out", str(out)]
    if "weight_only" not in spec:
        command += ["--calib", str(model / "calib.jsonl")]
    run, text = process([*command, "--device", device, "--json"])
    report = json.loads(text)
    run.memory, run.device_memory = report["peak_host_bytes"], report["peak_device_bytes"]
    return run, report


def _read(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def _forget() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def kernel(spec: str, device: str) -> float:
    """Weights a second that the kernel alone packs."""
    scale = "mse" if "mse" in spec else "max"
    return float(process([sys.executable, "-c", _KERNEL, device, scale])[1])


def _pace(name: str, report: dict[str, Any], alone: float) -> str:
    seconds = report["seconds"]
    saved = report["source_bytes"] - report["output_bytes"]
    weights = saved / (2 - report["bits_per_weight"] / 8)  # all were bf16
    pace = weights / (seconds["passes"] + seconds["write"])
    stages = ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())
    return (
        f"{name}: {stages}; {weights / 1e6:.0f} M weights at {pace / 1e6:.0f} M/s in passes and write, "
        f"{pace / alone:.0%} of the kernel alone ({alone / 1e6:.0f} M/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--spec", nargs="+", default=["nvfp4_experts_only_mse-fp8_cast_kv"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--scratch", type=Path, help="where outputs are written (default: a temporary directory)"
    )
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run")
    parser.add_argument("--modelopt", metavar="PYTHON")
    parser.add_argument("--modelopt-recipe", default="NVFP4_DEFAULT_CFG")
    arguments = parser.parse_args()
    imports = int(process([sys.executable, "-c", _IMPORTS])[1])
    caches = "cold" if arguments.cold else "warm"
    table = Table(title=f"{arguments.device}, page cache {caches}; imports alone {imports / 2**20:.0f} MiB")
    for title in (
        "model",
        "GB",
        "run",
        "s",
        "GB/s",
        "of copy",
        "of copy on disk",
        "MiB above imports",
        "GPU GiB",
    ):
        table.add_column(title, justify="left" if title in ("model", "run") else "right")
    notes: list[str] = []
    for model in arguments.models:
        measure(model, arguments, imports, table, notes)
    Console(width=170).print(table)
    print("\n".join(notes))


def measure(model: Path, arguments: argparse.Namespace, imports: int, table: Table, notes: list[str]) -> None:
    """The rows of one model."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))

    def row(name: str, run: Run, copied: float, synced: float) -> None:
        gpu = "-" if run.device_memory is None else f"{run.device_memory / 2**30:.2f}"
        memory = "-" if not run.memory else f"{(run.memory - imports) / 2**20:.0f}"
        ratios = (f"{run.seconds / copied:.2f}", f"{run.seconds / synced:.2f}")
        table.add_row(
            model.name, f"{size / 1e9:.2f}", name, f"{run.seconds:.1f}", f"{size / run.seconds / 1e9:.2f}",
            *ratios, memory, gpu,
        )  # fmt: skip

    prepare = _forget if arguments.cold else functools.partial(_read, model)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        prepare()
        copied, synced = copy(model, Path(scratch, "copy"))
        shutil.rmtree(Path(scratch, "copy"))
        row("copy", Run(copied, 0), copied, synced)
        row("copy, on disk", Run(synced, 0), copied, synced)
        for spec in arguments.spec:
            prepare()
            alone = [kernel(spec, arguments.device)]
            run, report = compile_(model, spec, arguments.device, Path(scratch, "out"))
            shutil.rmtree(Path(scratch, "out"))
            row(spec, run, copied, synced)
            alone.append(kernel(spec, arguments.device))
            notes.append(_pace(f"{model.name} {spec}", report, sum(alone) / 2))
        if arguments.modelopt:
            prepare()
            out = Path(scratch, "modelopt")
            command = [arguments.modelopt, "-c", _MODELOPT, str(model), str(out)]
            run, text = process([*command, arguments.modelopt_recipe, arguments.device])
            if arguments.device == "cuda":
                run.device_memory = int(text.split()[-1])
            row(f"ModelOpt {arguments.modelopt_recipe}", run, copied, synced)


if __name__ == "__main__":
    main()
