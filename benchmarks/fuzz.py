"""Fuzz of architectures: random decoders in code of their own, compiled and read back.

    python benchmarks/fuzz.py [SEED ...] [--range FIRST LAST] [--timeout SECONDS] [--json FILE]

States are those of benchmarks/architectures.py: `ok`, `refused` in an error of fxq's own, or `wrong`. A seed
is `ok` if the graph equals the eager model, the checkpoints are read back without a finding by
tests/reader.py, every routed expert is quantized, and the model's own code on the decoded weights computes
what fxq runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fxq
from benchmarks import architectures
from benchmarks.architectures import Begin, Row
from fxq.errors import FxqError
from fxq.model import Model, open_model
from fxq.run.simulate import simulation
from tests import generated, oracle, tiny
from tests.generated import Architecture

DEFAULT, EXPERTS_ONLY = architectures.DEFAULT, architectures.EXPERTS_ONLY
WEIGHT_ONLY = "nvfp4_weight_only_mse"
# Of the largest logit: two kernels in bfloat16 stay nearer. A choice among experts that are almost equal may
# fall otherwise for a few tokens.
NEAR, FLIPPED = 0.05, 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED")
    parser.add_argument("--range", nargs=2, type=int, default=(0, 500), metavar=("FIRST", "LAST"))
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = run(options.seeds or range(*options.range), options.timeout, options.json)
    counts = Counter(row.state for row in rows)
    print(", ".join(f"{state} {counts[state]}" for state in architectures.STATES))
    return int(counts["wrong"] > 0)


def run(seeds: Iterable[int], timeout: float, out: Path | None = None) -> list[Row]:
    """Examine each seed in a process of its own, and say what became of it."""
    architectures.quiet()
    architectures.warm_up()
    rows: list[Row] = []
    for seed in seeds:
        row = architectures.run_apart(Architecture(seed), timeout, examine)
        rows.append(row)
        print(f"{row.state:8} {row.seconds:5.1f} s  {row.family}  {row.reason}", flush=True)
        if out is not None:
            out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return rows


def examine(architecture: Architecture, row: Row, work: Path, begin: Begin) -> None:
    """Every check of one architecture, in order; fills `row`."""
    begin("eager")
    source = work / "model"
    model = generated.save(architecture, source)
    experts = generated.expert_weights(model)
    row.expert_weights, row.experts = len(experts), sum(len(matrices) for matrices in experts.values())
    begin("trace")
    opened = open_model(source, trust_remote_code=True)
    row.nodes = len(opened.program.graph.nodes)
    begin("interpret")
    architectures.interpret(row, opened, model)
    if row.max_diff:
        row.findings.append(f"interpretation differs from eager by {row.max_diff:.3g}")
    architectures.keep_trace(opened.program)
    refusals: list[FxqError] = []
    for spec in [DEFAULT, WEIGHT_ONLY, *([EXPERTS_ONLY] if experts else [])]:
        begin(spec)
        try:
            compile_and_read(row, model, opened, spec, work)
        except FxqError as error:
            refusals.append(error)
    if row.findings:
        row.state, row.reason = "wrong", "; ".join(row.findings)
    elif refusals:
        raise refusals[0]
    else:
        row.state = "ok"


def compile_and_read(row: Row, model: PreTrainedModel, opened: Model, spec: str, work: Path) -> None:
    """Compile with one spec; what the independent reader and the model's own code make of the files."""
    source, out = work / "model", work / spec
    calib = tiny.text_ids(4, 24, seed=1).tolist()
    compiled = fxq.compile(source, spec, calib=calib, out=out, trust_remote_code=True)
    rows = architectures.fingerprints(generated.expert_weights(model))
    head = architectures.tied_head(model)
    found = architectures.read_back(source, out, rows, head)
    row.findings += [f"{spec}: {finding}" for finding in found]
    row.read_back.append(spec)
    if spec == WEIGHT_ONLY:
        decoded = oracle.dequantized_model(out, work / "decoded", trust_remote_code=True)
        own = AutoModelForCausalLM.from_pretrained(decoded, trust_remote_code=True, dtype=torch.bfloat16)
        ids = tiny.text_ids(4, 24, seed=11)
        (said,) = simulation(compiled.program, opened.source, torch.device("cpu")).run_batches([ids])
        with torch.no_grad():
            logits = own.eval()(ids).logits.float()
        far = (said.float() - logits).abs().amax(-1) > NEAR * logits.abs().max()
        if far.float().mean() > FLIPPED:
            row.findings.append(
                f"{spec}: its own code differs from what fxq runs, for {int(far.sum())} tokens"
            )


if __name__ == "__main__":
    sys.exit(main())
