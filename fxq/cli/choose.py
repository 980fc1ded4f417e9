"""`fxq choose`: which format each group of weights should have, as a spec; nothing is compiled."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.cli import arguments as shared
from fxq.cli import logs
from fxq.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from fxq.choose import Chosen

ABOUT = "Measure what each group of weights loses in each format, and choose formats for a size."
EXAMPLES = """examples:
  fxq choose ./model --bits 5.0 --calib text.jsonl                 the frontier, and chosen.yaml
  fxq choose ./model --size '18 GB' --calib text.jsonl --out my.yaml
  fxq choose ./model --max-kl 0.05 --calib text.jsonl --json
  fxq compile ./model --spec chosen.yaml --calib text.jsonl --out ./model-nvfp4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    shared.add_model(parser)
    add(
        "--spec",
        default="nvfp4_auto-fp8_cast_kv",
        metavar="NAME|FILE",
        help="a spec with choose-formats (default nvfp4_auto-fp8_cast_kv)",
    )
    add("--bits", metavar="B", help="bits of a weight on average (default 5.0)")
    add("--size", metavar="S", help="size of the checkpoint instead, as in '18 GB'")
    add("--max-kl", metavar="KL", help="largest loss instead, in nats a token: the smallest such model")
    shared.add_calibration(parser)
    shared.add_device(parser, "where the model runs")
    add(
        "--out",
        default=Path("chosen.yaml"),
        type=Path,
        metavar="FILE.yaml",
        help="the spec to write; must not exist (default chosen.yaml)",
    )
    shared.add_settings(parser)
    shared.add_json(parser, "print what was measured as JSON")
    shared.add_passes(parser)
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, choose, print the frontier and write the spec; returns the exit status."""
    from fxq.passes import table
    from fxq.pipeline.spec import dump, load

    if arguments.out.suffix not in (".yaml", ".yml"):
        raise SpecError(f"--out {arguments.out}: expected a name that ends in .yaml, as specs have")
    if arguments.out.exists():
        raise CheckpointError(f"{arguments.out}: is there already; expected a new file")
    budgets = {"bits": arguments.bits, "size": arguments.size, "max_kl": arguments.max_kl}
    given = {name: value for name, value in budgets.items() if value is not None}
    if given:  # instead of the spec's own
        given = dict.fromkeys(budgets, "null") | given
    budget = [f"choose-formats.{name}={value}" for name, value in given.items()]
    spec = load(arguments.spec, table(arguments.passes)).with_settings([*arguments.settings, *budget])
    from fxq.choose import choose

    found = choose(
        arguments.model,
        spec,
        calib=shared.text_of(arguments.calib),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        pack=arguments.pack,
        device=arguments.device,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
        progress=logs.progress_of(arguments),
    )
    try:
        arguments.out.write_text(dump(found.spec), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{arguments.out}: cannot write the spec: {error.strerror}") from error
    if arguments.json:
        print(json.dumps(found.content, indent=2))
    else:
        print_chosen(found, arguments.out)
    return 0


def print_chosen(found: "Chosen", out: Path) -> None:
    """The frontier, what was chosen, and where its spec is."""
    from fxq.cli import tables

    console, content = tables.console(), found.content
    chosen = content["chosen"]
    frontier = tables.grid("the best formats at each size", "", "bits", "size", "loss")
    for point in sorted([*content["frontier"], chosen], key=lambda point: point["bytes"]):
        is_chosen = point is chosen
        frontier.add_row("chosen" if is_chosen else "", *_figures(point))
    console.print(frontier)
    groups = tables.grid("groups by format", "weights", "numbers", *content["groups"][0]["losses"])
    groups.add_column("chosen")
    for group in content["groups"]:
        label = f"{'' if group['layer'] is None else group['layer']} {group['projections']}"
        losses = [f"{loss:.3g}" for loss in group["losses"].values()]
        groups.add_row(label.strip(), f"{group['numbers']:,}", *losses, group["chosen"])
    console.print(groups)
    if chosen["measured"] is not None:
        console.print(
            f"the model as chosen loses {chosen['measured']:.4g}, {chosen['loss']:.4g} were predicted"
        )
    for note in found.notes:
        console.print(tables.labelled("note", note, "yellow"))
    console.print(f"{out}: the spec for fxq compile")


def _figures(point: dict[str, Any]) -> tuple[str, str, str]:
    from fxq.cli.tables import size

    return f"{point['bits']:.2f}", size(point["bytes"]), f"{point['loss']:.4g}"
