"""Compile one model on the CPU and on CUDA and count every tensor that differs.

    python benchmarks/device_parity.py MODEL CALIB.jsonl [--spec NAME] [--samples N]

Prints both wall times and peak memory, the number of differing bytes per kind of tensor, and the largest
relative difference of input scales. Weights and block scales are expected equal; input scales within bf16
rounding.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

import fxq


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found


def main() -> None:
    """Run the comparison and print it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("--spec", default="nvfp4_experts_only_mse-fp8_cast_kv")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval")
    arguments = parser.parse_args()
    outputs, report = {}, {"spec": arguments.spec}
    with tempfile.TemporaryDirectory() as scratch:
        for device in ("cpu", "cuda"):
            out = Path(scratch) / device
            start = time.perf_counter()
            compiled = fxq.compile(
                arguments.model,
                arguments.spec,
                calib=arguments.calib,
                samples=arguments.samples,
                evaluate=arguments.eval,
                device=device,
                out=out,
            )
            found = compiled.report
            report[device] = {
                "seconds": round(time.perf_counter() - start, 2),
                "by_stage": {name: round(value, 2) for name, value in found.seconds.items()},
                "peak_host_MB": round((found.peak_host_bytes or 0) / 1e6),
                "peak_device_MB": round((found.peak_device_bytes or 0) / 1e6),
                "sqnr_db": found.sqnr_db,
                "perplexity": [found.perplexity_before, found.perplexity_after],
            }
            outputs[device] = tensors(out)
    differing: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    worst = 0.0
    for key, ours in outputs["cpu"].items():
        theirs = outputs["cuda"][key]
        kind = key.rpartition(".")[2]
        compared[kind] += ours.numel()
        differing[kind] += int((ours.flatten().view(torch.uint8) != theirs.flatten().view(torch.uint8)).sum())
        if kind in ("input_scale", "k_scale", "v_scale"):
            worst = max(worst, float((ours / theirs - 1).abs()))
    report["compared"], report["differing_bytes"] = dict(compared), dict(differing)
    report["largest_relative_scale_difference"] = worst
    report["torch"] = torch.__version__
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
