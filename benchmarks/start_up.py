"""From the launch of `fxq compile` to its first read of a weight, at full size: everything but the weights.

    python benchmarks/start_up.py [qwen3-30b-a3b qwen3.5-35b-a3b deepseek-v3 kimi-k2] [--spec NAME ...]

The checkpoint has the published shapes and the hub's names in one sparse file: its tensors take no disk, and
none is read. A fresh process runs the command and ends where it would first read one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from full_size import MODELS
from rich.console import Console
from rich.table import Table

from fxq.sources.conversion import own_names, revert
from fxq.trace.fake_model import fake_model_of_config

SPECS = ("nvfp4_experts_only_mse-fp8_cast_kv", "nvfp4_weight_only_mse")
SAMPLES, LENGTH = 8, 512
# Run in the fresh process; the second argument is when it was launched.
_CHILD = """
import sys, time
from fxq.cli.main import main
launched, command = float(sys.argv[1]), sys.argv[2:]

def first_read(self, *args):
    import os
    print(time.time() - launched, time.process_time(), flush=True)
    os._exit(0)

from fxq.sources import directory
directory.Directory._raw = first_read
raise SystemExit(main(command))
"""


def write_sparse(name: str, directory: Path) -> int:
    """A model directory of the published shapes, with calibration lines; the bytes its weights would take."""
    config = MODELS[name](None)
    fake = fake_model_of_config(config, torch.bfloat16)
    config.architectures, config.dtype = [type(fake.model).__name__], torch.bfloat16
    config.save_pretrained(directory)
    state = {n: t.to("meta") for n, t in fake.model.state_dict().items()}
    header, end = {}, 0
    for key, tensor in revert(fake.model, {n: state[n] for n in own_names(fake.model)}).items():
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
        header[key] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    lines = [json.dumps({"input_ids": list(range(LENGTH))})] * SAMPLES
    (directory / "calib.jsonl").write_text("\n".join(lines))
    return end


def seconds(directory: Path, spec: str) -> tuple[float, float]:
    """Seconds from launch to the first read of a weight: on the clock, and of CPU."""
    command = ["compile", str(directory), "--spec", spec, "--out", str(directory.with_name(spec))]
    command += ["--calib", str(directory / "calib.jsonl")]
    launch = [sys.executable, "-c", _CHILD, str(time.time()), *command]
    done = subprocess.run(launch, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    clock, cpu = map(float, done.stdout.split())
    return clock, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--spec", nargs="*", default=SPECS)
    arguments = parser.parse_args()
    table = Table(title="from launch to the first weight")
    for title in ("model", "bytes", "spec", "seconds", "CPU seconds"):
        table.add_column(title, justify="left" if title in ("model", "spec") else "right")
    for name in arguments.models or MODELS:
        with tempfile.TemporaryDirectory() as work:
            directory = Path(work) / "model"
            directory.mkdir()
            size = write_sparse(name, directory)
            for spec in arguments.spec:
                clock, cpu = seconds(directory, spec)
                table.add_row(name, f"{size:,}", spec, f"{clock:.1f}", f"{cpu:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
