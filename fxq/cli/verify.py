"""`fxq verify`: what an audit found, as a table of alike findings and a verdict.

The rules are in fxq/audit, which knows no terminal.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.cli import arguments as shared
from fxq.cli import logs
from fxq.cli.eval import print_evaluation
from fxq.errors import SpecError

if TYPE_CHECKING:
    from fxq.audit import Findings
    from fxq.evaluate.evaluation import Evaluation

ABOUT = "Check a quantized checkpoint, whoever wrote it, against what engines need."
EXAMPLES = """examples:
  fxq verify ./model-nvfp4                                         the files alone
  fxq verify ./model-nvfp4 --base ./model                          and against what they were made from
  fxq verify ./model-nvfp4 --base ./model --text heldout.jsonl     and what both models make of a text
  fxq verify ./model-nvfp4 --json | jq .groups                     for programs

exit status: 0 without errors (warnings do not count), 1 with errors or if this is no NVFP4 checkpoint
"""
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add(
        "directory",
        metavar="DIR",
        type=Path,
        help="ModelOpt NVFP4 or compressed-tensors nvfp4-pack-quantized",
    )
    add("--base", metavar="MODEL", type=Path, help="the model it was made from: compare every tensor with it")
    add(
        "--text",
        metavar="FILE",
        type=Path,
        help="text, in files as for calibration: also compare what both models predict (needs --base)",
    )
    add("--samples", type=int, default=64, metavar="N", help="samples of the text to use (default 64)")
    add("--seq-len", type=int, default=512, metavar="L", help="tokens kept of each sample (default 512)")
    shared.add_device(parser, "where the models run")
    shared.add_json(parser, "print every finding as JSON")
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check and print what was found; returns the exit status."""
    from fxq.audit import verify_checkpoint

    if arguments.text is not None and arguments.base is None:
        raise SpecError(
            "verify --text: expected --base MODEL too, the model that DIR was made from, found none: "
            "what the two predict is compared"
        )
    findings = verify_checkpoint(arguments.directory, arguments.base)
    plain = findings.as_dict()
    if not arguments.json:
        print_findings(findings)
    try:
        if arguments.text is not None:
            plain["against"] = None
            found = _evaluated(arguments)
            plain["against"] = _against(found)
            if not arguments.json:
                print_evaluation(found)
    finally:  # what was found counts even if the models cannot be run
        if arguments.json:
            print(json.dumps(plain, indent=2))
    return 1 if findings.errors else 0


def print_findings(findings: "Findings") -> None:
    """What was checked, a table of alike findings with an example each, and the verdict."""
    from fxq.audit import RULES
    from fxq.cli import tables

    console = tables.console()
    console.print(_headline(findings))
    if groups := findings.groups():
        table = tables.Table(show_lines=True)
        table.add_column("severity")
        table.add_column("count", justify="right")
        table.add_column("rule and why", max_width=40, overflow="fold")
        table.add_column("where and what, for example", overflow="fold")
        for group in groups:
            where = f"{group.example.where}: {group.example.message}"
            if group.count > 1:
                where = f"{group.pattern}\n{where}"
            rule = tables.Text.assemble((group.rule, "bold"), "\n", (RULES[group.rule][1], "dim"))
            table.add_row(tables.Text(group.severity, _STYLES[group.severity]), str(group.count), rule, where)
        console.print(table)
    style = _STYLES["error"] if findings.errors else "yellow" if findings.warnings else "bold green"
    console.print(tables.Text(findings.verdict, style))


def _headline(findings: "Findings") -> str:
    facts = findings.summary
    linears = ", ".join(f"{count} {kind}" for kind, count in facts["linears"].items()) or "no"
    text = (
        f"{facts['directory']}: {facts['format']} {facts['algorithm']}, {linears} linears in "
        f"{facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB"
    )
    if facts.get("sqnr_db") is not None:
        text += f"; against the base {facts['sqnr_db']:.2f} dB"
        if facts.get("worst_sqnr_db") is not None:
            text += f", worst {facts['worst_sqnr_db']:.2f} dB ({facts['worst']})"
    return text


def _evaluated(arguments: argparse.Namespace) -> "Evaluation":
    from fxq.evaluate.evaluation import evaluate

    return evaluate(
        arguments.directory,
        arguments.text,
        base=arguments.base,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        device=arguments.device,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
        progress=logs.progress_of(arguments),
    )


def _against(found: "Evaluation") -> dict[str, Any]:
    """The comparison as plain values: what `fxq eval --base --json` has, on one level."""
    against = found.against
    assert against is not None
    return {
        "base": against.base,
        "samples": found.samples,
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "base_perplexity": against.perplexity,
        "kl": dict(against.kl),
        "top1_agreement": against.top1_agreement,
        "notes": list(found.notes),
        "seconds": found.seconds,
    }
