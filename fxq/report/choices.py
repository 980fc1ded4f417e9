"""The report of choices: what each group of weights loses in each format, the frontier of size against loss,
and what was chosen.

It lies in fxq-report beside report.json: choices.json for programs, choices.html for people, and chosen.yaml,
the spec that does the same without measuring again. Losses are in nats a token, or relative errors, as the
score of choose-formats says.

choices.json:

groups                a group each: names of its parameters, layer (the first number) and projections, numbers
                      (of weights), losses by format, chosen, fixed (by the user)
frontier              best choices from the smallest to the largest: bits a weight, bytes of all tensors, loss
chosen                bits, bytes, loss (predicted by what the groups lose alone) and measured (what the model
                      loses on the same text; null if it was not measured)
"""

import json
from pathlib import Path
from typing import Any

from fxq.graph.choices import Choice
from fxq.graph.hub import NUMBER
from fxq.graph.program import Program
from fxq.pipeline.choosing import MEASURED, average_bits, frontier, is_chosen, predicted_loss, total_bytes
from fxq.report.pages import page


def content(program: Program) -> dict[str, Any] | None:
    """choices.json as plain values; None if no formats were chosen."""
    choices, values = program.choices, program.values
    if not is_chosen(program):
        return None
    places, table = [c.place(values) for c in choices], [c.losses(values) for c in choices]
    measured = float(values[MEASURED]) if MEASURED in values else None
    return {
        "groups": [_group(*each) for each in zip(choices, places, table, strict=True)],
        "frontier": [_point(program, each) for each in frontier(program, table)],
        "chosen": {**_point(program, places), "measured": measured},
    }


def write(program: Program, title: str, spec: str, folder: Path) -> None:
    """Write choices.json, choices.html and chosen.yaml, whose text is `spec`, if formats were chosen."""
    made = content(program)
    if made is None:
        return
    (folder / "choices.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (folder / "choices.html").write_text(page("choices", title, made), encoding="utf-8")
    (folder / "chosen.yaml").write_text(spec, encoding="utf-8")


def _point(program: Program, places: list[int]) -> dict[str, float]:
    return {
        "bits": average_bits(program.choices, places),
        "bytes": total_bytes(program, places),
        "loss": predicted_loss(program, places),
    }


def _group(choice: Choice, place: int, losses: list[float]) -> dict[str, Any]:
    first = NUMBER.search(choice.parameters[0])
    rest = [name[first.end() + 1 :] if first else name for name in choice.parameters]
    return {
        "parameters": list(choice.parameters),
        "layer": int(first[0]) if first else None,
        "projections": ", ".join(dict.fromkeys(NUMBER.sub("*", n.removesuffix(".weight")) for n in rest)),
        "numbers": choice.numbers,
        "losses": dict(zip(choice.formats, losses, strict=True)),
        "chosen": choice.formats[place],
        "fixed": choice.fixed is not None,
    }
