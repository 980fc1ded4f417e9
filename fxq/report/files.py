"""The report beside the weights: report.json for programs, report.html for people.

They lie in the directory fxq-report of the output, which engines do not look into: they read the
*.safetensors and the JSON files of the output directory itself. The HTML is one file that fetches nothing.

report.json (`version` changes when the meaning of a field does; everything outside `measured` is the same in
every run of the same inputs):

version, fxq, spec, title   1; fxq's version; the spec's name; the model's directory name or class
made                        how: model, spec (a mapping, which `fxq.compile` takes), options, versions,
                            calibration and evaluation: from, samples,
                            tokens, shortest, longest, tokens_hash, seq_len, pack; null if none
summary                     the fields of `fxq.report.summary.Report` that are counts and errors
weights                     a parameter each: name; layer (its first number) and projection (the rest); per
                            expert (or once) sqnr_db (null: exact), crest and spread (`fxq.numbers.quality`)
tokens                      a layer of experts each: name, layer, tokens calibration routed to each
scales                      steps and counts: sampled blocks by how many FP8 codes their scale lies above the
                            one that reaches their maximum
worst                       name, expert or null, sqnr_db, noise (error / energy), typical (the median noise
                            of its projection), reason; worst first
groups                      linears that share global scales: linears (names with * for numbers), count
excluded                    what is not quantized: name (* for numbers, {0,29} for some), count, reason
rewritten                   names of the checkpoint's tensors that hold what a pass computed; of a quantized
                            linear m `m.weight`, whatever its format calls it
untied                      names of modules that share a tensor in the source and have one of their own here
sizes                       bytes: weights, scales, untouched
warnings                    sentences
measured                    seconds by stage, peak_host_bytes, peak_device_bytes, source_bytes_read, device,
                            date: differ from run to run
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from fxq import __version__
from fxq.graph.hub import NUMBER, natural_order
from fxq.numbers.quality import STEPS, Quality
from fxq.report.card import README, card, is_ours
from fxq.report.pages import page
from fxq.report.summary import Report, fold

VERSION = 1
DIRECTORY = "fxq-report"
WORST = 10
# A weight stands out from its fellows if a property is so many times theirs.
STANDS_OUT = 1.15
# What of `Report` is no part of the summary: what differs between runs, and what is a field of its own.
_MEASURED = ("seconds", "peak_host_bytes", "peak_device_bytes", "source_bytes_read", "out", "device")
_OWN_FIELDS = ("warnings", "spec", "rewritten", "untied", "made")
_Weights = Mapping[tuple[str, int | None], Quality]


@dataclass(frozen=True)
class Details:
    """What the report shows beside the counts of `Report`.

    weights: (parameter, expert or None) -> what packing did to it. tokens: fused weight -> tokens of each
    expert. groups, excluded: as `fxq.report.reasons` yields them. sizes: bytes of weights, scales,
    untouched. steps: blocks by where the search put their scales.
    """

    title: str
    weights: _Weights = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Sequence[tuple[str, int]] = ()
    excluded: Sequence[tuple[str, int, str]] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    steps: Sequence[int] = (0,) * len(STEPS)


def write(report: Report, details: Details, directory: Path) -> None:
    """Write fxq-report/report.json and report.html into a checkpoint's directory, and a model card unless
    there is one."""
    folder = directory / DIRECTORY
    folder.mkdir()
    made = content(report, details)
    for name, text in _files(made).items():
        (folder / name).write_text(text, encoding="utf-8")
    if not (readme := directory / README).exists():
        readme.write_text(card(made), encoding="utf-8")


def update(report: Report, directory: Path) -> None:
    """Put what was measured of a complete checkpoint into its report: each file is replaced as a whole."""
    folder = directory / DIRECTORY
    made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    made |= {
        "made": report.made,
        "summary": _summary(report),
        "warnings": report.warnings,
        "measured": _measured(report),
    }
    for name, text in _files(made).items():
        _replace(folder / name, text)
    if is_ours(directory / README):
        _replace(directory / README, card(made))


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.part")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _files(made: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the report's files."""
    title = f"{made['title']}, {made['spec']}"
    # The page shows folded names: with all experts of a large model rewritten, the others are megabytes.
    rewritten = [{"name": name, "count": count} for name, count in fold(made["rewritten"])]
    html = page("report", title, {**made, "rewritten": rewritten})
    return {"report.json": _lines(made), "report.html": html}


def _lines(made: Mapping[str, Any]) -> str:
    """JSON with a line for each field, and for each item of a list of objects."""
    fields = []
    for name, value in made.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def content(report: Report, details: Details) -> dict[str, Any]:
    """report.json as plain values."""
    return {
        "version": VERSION,
        "fxq": __version__,
        "spec": report.spec,
        "title": details.title,
        "made": report.made,
        "summary": _summary(report),
        "weights": [_weight(name, found) for name, found in _by_parameter(details.weights)],
        "tokens": _tokens(details.tokens),
        "scales": {"steps": list(STEPS), "counts": list(details.steps)},
        "worst": _worst(details),
        "groups": [{"linears": name, "count": count} for name, count in details.groups],
        "excluded": [{"name": n, "count": count, "reason": why} for n, count, why in details.excluded],
        "rewritten": report.rewritten,
        "untied": report.untied,
        "sizes": {name: details.sizes.get(name, 0) for name in ("weights", "scales", "untouched")},
        "warnings": report.warnings,
        "measured": _measured(report),
    }


def _summary(report: Report) -> dict[str, Any]:
    plain = report.as_dict()
    return {n: _plain(v) for n, v in plain.items() if n not in _MEASURED + _OWN_FIELDS}


def _measured(report: Report) -> dict[str, Any]:
    return {
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "peak_host_bytes": report.peak_host_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "source_bytes_read": report.source_bytes_read,
        "device": report.device,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: an exact weight has no SQNR."""
    if isinstance(value, float):
        return None if value in (float("inf"), float("-inf")) or value != value else round(value, 6)
    return value


def _by_parameter(weights: _Weights) -> Iterable[tuple[str, list[Quality]]]:
    """Parameters in their order, each with its experts in theirs."""
    found: dict[str, dict[int, Quality]] = {}
    for (name, expert), own in weights.items():
        found.setdefault(name, {})[expert or 0] = own
    order = sorted(found, key=natural_order)
    return ((name, [found[name][e] for e in sorted(found[name])]) for name in order)


def _weight(name: str, experts: Sequence[Quality]) -> dict[str, Any]:
    return {
        "name": name,
        "layer": _layer(name),
        "projection": _projection(name),
        "sqnr_db": [_plain(m.sqnr_db and round(m.sqnr_db, 2)) for m in experts],
        "crest": [round(m.crest, 2) for m in experts],
        "spread": [round(m.spread, 1) for m in experts],
    }


def _layer(name: str) -> int | str:
    """The first number of a name, which every model's layers have; "" without one."""
    match = NUMBER.search(name)
    return int(match[0]) if match else ""


def _projection(name: str) -> str:
    """What follows the layer, without `.weight`; other numbers as `*`."""
    match = NUMBER.search(name)
    rest = name[match.end() + 1 :] if match else name
    return NUMBER.sub("*", rest.removesuffix(".weight"))


def _tokens(tokens: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One entry a module of experts: its weights see the same tokens."""
    modules = {name.rpartition(".")[0]: counts for name, counts in tokens.items()}
    return [
        {"name": name, "layer": _layer(name), "tokens": modules[name].tolist()}
        for name in sorted(modules, key=natural_order)
    ]


def _worst(details: Details) -> list[dict[str, Any]]:
    fellows: dict[str, list[Quality]] = {}
    for (name, _), own in details.weights.items():
        fellows.setdefault(_projection(name), []).append(own)
    lossy = [(key, m) for key, m in details.weights.items() if m.error > 0 and m.energy > 0]
    lossy.sort(key=lambda item: -item[1].error / item[1].energy)
    return [
        {
            "name": name,
            "expert": expert,
            "sqnr_db": _plain(m.sqnr_db),
            "noise": _plain(m.error / m.energy),
            "typical": _plain(median(f.error / f.energy for f in fellows[_projection(name)] if f.energy > 0)),
            "reason": _reason(m, fellows[_projection(name)], _seen(details.tokens, name, expert)),
        }
        for (name, expert), m in lossy[:WORST]
    ]


def _seen(tokens: Mapping[str, Tensor], name: str, expert: int | None) -> int | None:
    """Tokens that reached an expert while calibrating; None if it is none, or nothing was calibrated."""
    counts = tokens.get(name)
    return int(counts[expert]) if counts is not None and expert is not None else None


def _reason(own: Quality, fellows: Sequence[Quality], tokens: int | None) -> str:
    """What distinguishes a weight from others of its projection."""
    crest, spread = (median(values) for values in zip(*((m.crest, m.spread) for m in fellows), strict=True))
    said = []
    if own.spread > STANDS_OUT * spread:
        said.append(
            f"its largest weight is {own.spread:.0f} times the median block's (its fellows' "
            f"{spread:.0f}): small blocks are left with coarse scales"
        )
    if own.crest > STANDS_OUT * crest:
        said.append(
            f"outliers inside blocks: their maximum is {own.crest:.2f} times their root mean square "
            f"(its fellows' {crest:.2f})"
        )
    elif own.crest < crest / STANDS_OUT:
        said.append(
            f"even blocks: their values fill the gaps of the e2m1 grid (crest {own.crest:.2f} "
            f"against {crest:.2f})"
        )
    if tokens == 0:
        said.append("no token reached it, which does not change its weights' error")
    return "; ".join(said) or f"no outlier: the lower end of {len(fellows)} alike weights"
