"""`fxq compile --dry-run`: everything that can be known before a weight is read, checked and shown."""

import argparse
from typing import TYPE_CHECKING

from fxq.cli import arguments as shared
from fxq.cli.specs import print_preview

if TYPE_CHECKING:
    from fxq.pipeline.spec import Spec


def dry_run(arguments: argparse.Namespace, chosen: "Spec") -> None:
    """Check output, model, texts and spec as `fxq compile` would, and print what it would write."""
    from fxq.checkpoint.workdir import check_output
    from fxq.cli import tables
    from fxq.compile import SAMPLES, check_data
    from fxq.model import device_of, directory_of, open_model, samples_of
    from fxq.passes import table
    from fxq.preview import preview
    from fxq.report.reasons import doubts_of_text
    from fxq.run.batches import check_predicted

    chosen = chosen.with_flags(format=arguments.format, partial=arguments.allow_partial or None)
    check_data(chosen, arguments.calib)
    device = device_of(arguments.device)
    check_output(arguments.out, directory_of(arguments.model))
    reading = {"follow_links": arguments.follow_links, "trust_remote_code": arguments.trust_remote_code}
    model = open_model(arguments.model, **reading)
    notes: list[str] = []
    facts = [("device", str(device)), ("output", f"{arguments.out}, which nothing is written into now")]
    if arguments.calib is not None:
        wanted = arguments.samples or SAMPLES
        text = shared.text_of(arguments.calib)
        ids = samples_of(model, text, wanted, arguments.seq_len, pack=arguments.pack, notes=notes)
        tokens = sum(map(len, ids))
        facts.insert(0, ("calibration", f"{len(ids)} samples, {tokens} tokens"))
        notes += doubts_of_text(len(ids), arguments.samples, tokens)
    if arguments.eval is not None:
        unseen = samples_of(
            model, arguments.eval, arguments.eval_samples, arguments.eval_seq_len, name="--eval"
        )
        check_predicted(unseen)
        facts.insert(1, ("evaluation", f"{len(unseen)} samples, {sum(map(len, unseen))} tokens"))
    print_preview(preview(model, chosen, table(arguments.passes)))
    console = tables.console()
    console.print(tables.facts(facts))
    for note in notes:
        console.print(tables.labelled("warning", f"calibration: {note}", "yellow"))
