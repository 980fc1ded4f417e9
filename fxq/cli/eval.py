"""`fxq eval`: perplexity of a model, and its distance from the one it was made from."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.cli import arguments as shared
from fxq.cli import logs

if TYPE_CHECKING:
    from fxq.evaluate.evaluation import Evaluation

ABOUT = "Measure perplexity, and how far a model is from the one it was made from."
EXAMPLES = """examples:
  fxq eval ./model --text heldout.jsonl                            perplexity
  fxq eval ./model-nvfp4 --base ./model --text heldout.jsonl       and how far predictions are from the base's
  fxq eval ./model-nvfp4 --base ./model --text heldout.jsonl --samples 200 --device cuda --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    shared.add_model(
        parser, "directory with safetensors: unquantized, or an NVFP4 checkpoint, run as engines serve it"
    )
    add("--text", required=True, metavar="FILE", type=Path, help="text, in files as for calibration")
    add(
        "--base",
        metavar="MODEL",
        type=Path,
        help="the model it was made from: KL divergence, top-1 agreement",
    )
    add("--samples", type=int, default=64, metavar="N", help="samples to use (default 64)")
    add("--seq-len", type=int, default=512, metavar="L", help="tokens kept of each sample (default 512)")
    shared.add_device(parser, "where the models run")
    shared.add_json(parser)
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    from fxq.evaluate.evaluation import evaluate

    found = evaluate(
        arguments.model,
        arguments.text,
        base=arguments.base,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        device=arguments.device,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
        progress=logs.progress_of(arguments),
    )
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_evaluation(found)
    return 0


def print_evaluation(found: "Evaluation") -> None:
    """What was measured on, a table of figures, and notes on what could not be simulated."""
    from fxq.cli import tables

    console = tables.console()
    console.print(f"{found.model}: {found.tokens} predicted tokens of {found.samples} samples")
    console.print(tables.facts(_figures(found)))
    for note in found.notes:
        console.print(tables.labelled("note", note, "yellow"))


def _figures(found: "Evaluation") -> Iterator[tuple[str, str]]:
    yield "perplexity", f"{found.perplexity:.4f}"
    if (against := found.against) is not None:
        yield "of the base", f"{against.perplexity:.4f} ({against.base})"
        yield "KL from the base", f"{against.kl['mean']:.5f} nats per token"
        yield "", ", ".join(f"{name} {value:.5f}" for name, value in against.kl.items() if name != "mean")
        yield "top-1 agreement", f"{against.top1_agreement:.2%}"
    yield "time", f"{found.seconds:.1f} s"
