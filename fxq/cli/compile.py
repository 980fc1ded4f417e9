"""`fxq compile`: a checkpoint from a model and a spec, and the summary that is printed."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.cli import arguments as shared
from fxq.cli import logs
from fxq.cli.dry_run import dry_run
from fxq.errors import CheckpointError
from fxq.gc_paused import gc_paused

if TYPE_CHECKING:
    from fxq.compiled import Compiled
    from fxq.pipeline.spec import Spec
    from fxq.report.summary import Report

ABOUT = "Turn a model directory into an NVFP4 checkpoint."
EXAMPLES = """examples:
  fxq compile ./model --spec nvfp4_experts_only_mse-fp8_cast_kv --calib text.jsonl --out ./model-nvfp4
  fxq compile ./model --spec nvfp4_weight_only_mse --out ./model-w4a16          (needs no data)
  fxq compile ./model --spec my.yaml --calib text.jsonl --samples 64 --seq-len 1024 --device cuda --out ./out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    shared.add_model(parser)
    add("--spec", required=True, metavar="NAME|FILE", help="a shipped spec (see `fxq specs`) or a YAML file")
    add(
        "--out",
        required=True,
        metavar="DIR",
        type=Path,
        help="new or empty directory; appears whole or not at all",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with what an interrupted run left beside DIR: finished work is checked, not redone",
    )
    shared.add_calibration(parser)
    shared.add_device(parser, "where calibration and packing run")
    add(
        "--format",
        metavar="FORMAT",
        help="checkpoint format, instead of the spec's: modelopt, compressed-tensors",
    )
    add(
        "--eval",
        metavar="FILE",
        type=Path,
        help="when all is written, measure it on this text as `fxq eval DIR --base MODEL` does",
    )
    add("--eval-samples", type=int, default=64, metavar="N", help="lines of it to use (default 64)")
    add(
        "--eval-seq-len", type=int, default=512, metavar="L", help="tokens kept of each of them (default 512)"
    )
    add("--dry-run", action="store_true", help="check everything and show what would be written, then stop")
    shared.add_settings(parser)
    shared.add_partial(parser)
    shared.add_json(parser, "print the summary as JSON")
    shared.add_passes(parser)
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compile and print the summary; returns the exit status."""
    from fxq.passes import table
    from fxq.pipeline.spec import load

    chosen = load(arguments.spec, table(arguments.passes))  # its mistakes come before a file is read
    chosen = chosen.with_settings(arguments.settings)
    if arguments.dry_run:
        dry_run(arguments, chosen)
        return 0
    from fxq.sources.locate import model_directory
    from fxq.sources.prefetch import prefetch

    with prefetch(model_directory(arguments.model)):
        compiled = _compiled(arguments, chosen)
    try:
        if arguments.json:
            print(json.dumps(compiled.report.as_dict(), indent=2))
        else:
            print_summary(compiled.report)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still in the buffer must not fail again, and decide the status, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CheckpointError(
            f"{arguments.out} is complete, but its summary cannot be printed: {error.strerror}"
        ) from error
    return 0


def print_summary(report: "Report") -> None:
    """A table of the report's figures, then its warnings."""
    from fxq.cli import tables

    console = tables.console()
    console.print(tables.facts(report.rows(), title=report.title))
    for warning in report.warnings:
        console.print(tables.labelled("warning", warning, "yellow"))


def _compiled(arguments: argparse.Namespace, chosen: "Spec") -> "Compiled":
    with gc_paused():
        from fxq.compile import compile

    return compile(
        arguments.model,
        chosen,
        calib=shared.text_of(arguments.calib),
        out=arguments.out,
        resume=arguments.resume,
        evaluate=arguments.eval,
        eval_samples=arguments.eval_samples,
        eval_seq_len=arguments.eval_seq_len,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        pack=arguments.pack,
        device=arguments.device,
        format=arguments.format,
        allow_partial=arguments.allow_partial,
        passes=arguments.passes,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
        progress=logs.progress_of(arguments),
    )
