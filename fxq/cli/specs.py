"""`fxq specs`: the shipped specs, one of them, their JSON schema, or what they would do to a model."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.cli import arguments as shared
from fxq.cli import logs
from fxq.errors import SpecError, choices

if TYPE_CHECKING:
    from fxq.preview import Hits, Preview

ABOUT = "List the shipped specs, print one, or show what they would do to a model."
EXAMPLES = """examples:
  fxq specs                                                        the shipped specs
  fxq specs nvfp4_default-fp8_kv                                   its YAML, to start from
  fxq specs --model ./model                                        what each would do to it, or why not
  fxq specs my.yaml --model ./model                                in detail: groups, what is left and why
  fxq specs my.yaml --model ./model --hits                         what each of its globs fits
  fxq specs --schema > spec.schema.json                            what editors need to complete a spec
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME|FILE", help="a shipped spec or a YAML file")
    add("--model", metavar="MODEL", type=Path, help="what the spec would do to this model; reads no weight")
    add("--hits", action="store_true", help="list what each glob of the spec fits (with NAME and --model)")
    add("--schema", action="store_true", help="print the JSON schema of specs, for editors")
    shared.add_settings(parser)
    shared.add_partial(parser)
    shared.add_json(parser, "print it as JSON (with --model)")
    shared.add_passes(parser)
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status."""
    if arguments.settings and (arguments.model is None or arguments.name is None):
        raise SpecError("--set: expected NAME|FILE and --model: it shows what a spec then does to a model")
    if arguments.hits and (arguments.model is None or arguments.name is None):
        raise SpecError("specs --hits: expected NAME or FILE, and --model MODEL: globs fit names of a model")
    if arguments.schema:
        print_schema(arguments)
    elif arguments.model is not None and arguments.name is not None:
        preview_one(arguments)
    elif arguments.model is not None:
        preview_all(arguments)
    elif arguments.name is not None:
        print_spec(arguments.name)
    else:
        list_specs(arguments)
    return 0


def print_schema(arguments: argparse.Namespace) -> None:
    """The JSON schema of specs."""
    from fxq.passes import table
    from fxq.pipeline.schema import schema

    if arguments.name is not None or arguments.model is not None:
        raise SpecError("specs --schema: expected no NAME and no --model: one schema is that of all specs")
    print(json.dumps(schema(table(arguments.passes)), indent=2))


def print_spec(name: str) -> None:
    """The YAML of a shipped spec."""
    from fxq.pipeline.spec import shipped

    if name not in shipped():
        hint = "; with --model it may be a file" if name.endswith((".yaml", ".yml")) else ""
        raise SpecError(f"no spec is called {name!r}; there are {choices(shipped())}{hint}")
    print(shipped()[name].read_text(encoding="utf-8"), end="")


def list_specs(arguments: argparse.Namespace) -> None:
    """The shipped specs, each with its description."""
    from fxq.passes import table
    from fxq.pipeline import spec

    known = table(arguments.passes)
    for name in spec.shipped():
        print(f"{name}\n    {spec.load(name, known).description}")


def preview_one(arguments: argparse.Namespace) -> None:
    """What one spec would do to the model, in detail."""
    from fxq.passes import table
    from fxq.pipeline import spec

    known = table(arguments.passes)
    chosen = spec.load(arguments.name, known)  # its mistakes come before anything is traced
    chosen = chosen.with_settings(arguments.settings)
    from fxq.model import open_model
    from fxq.preview import hits, preview

    chosen = chosen.with_flags(partial=arguments.allow_partial or None)
    model = open_model(
        arguments.model,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.hits:
        print_hits(list(hits(model, chosen)), as_json=arguments.json)
        return
    found = preview(model, chosen, known)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_preview(found)


def preview_all(arguments: argparse.Namespace) -> None:
    """What each shipped spec would do to the model, or why it does not apply."""
    from fxq.model import open_model
    from fxq.passes import table
    from fxq.pipeline import spec
    from fxq.preview import previews

    known = table(arguments.passes)
    loaded = [spec.load(name, known) for name in spec.shipped()]
    specs = [chosen.with_flags(partial=arguments.allow_partial or None) for chosen in loaded]
    model = open_model(
        arguments.model,
        follow_links=arguments.follow_links,
        trust_remote_code=arguments.trust_remote_code,
    )
    rows = []
    with logs.progress_of(arguments)("plan", len(specs)) as step:
        for row in previews(model, specs, known):
            rows.append(row)
            step(1)
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        print_previews(rows, arguments.model)


def print_hits(found: Sequence["Hits"], *, as_json: bool) -> None:
    """A row for each glob: what it fits."""
    from fxq.cli import tables

    if as_json:
        print(json.dumps([vars(hit) for hit in found], indent=2))
        return
    table = tables.grid("what globs fit among the linears of the model", "glob", "linears")
    table.add_column("names", overflow="fold")
    for hit in found:
        names = "\n".join(f"{name}{f' ×{count}' if count > 1 else ''}" for name, count in hit.names)
        count = sum(count for _, count in hit.names)
        table.add_row(f"{hit.step}: {hit.option}: {hit.glob}", str(count), names or "none")
    tables.console().print(table if found else "no pass of this spec has globs")


def print_preview(found: "Preview") -> None:
    """Tables of the facts, of what shares scales and of what is left, then warnings."""
    from fxq.cli import tables

    console = tables.console()
    console.print(tables.facts(_facts(found), title=f"{found.spec}, before any weight is read"))
    if found.groups:
        table = tables.grid("linears that share their global scales", "names", "groups")
        for name, count in found.groups:
            table.add_row(name, str(count))
        console.print(table)
    if found.excluded:
        table = tables.Table(title="left as they are", title_justify="left", show_lines=True)
        table.add_column("why", max_width=24, overflow="fold")
        table.add_column("names", overflow="fold")
        for why, names in _by_reason(found).items():
            table.add_row(why, "\n".join(names))
        console.print(table)
    for warning in found.warnings:
        console.print(tables.labelled("warning", warning, "yellow"))


def _by_reason(found: "Preview") -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, count, why in found.excluded:
        reasons.setdefault(why, []).append(name + (f" ×{count}" if count > 1 else ""))
    return reasons


def _facts(found: "Preview") -> Iterator[tuple[str, str]]:
    from fxq.cli.tables import size

    total = found.experts + found.linears
    yield "tensors quantized", f"{total}: {found.experts} of experts, {found.linears} other linears"
    yield "calibration data", "needed" if found.needs_data else "not needed"
    yield "KV cache", found.kv_cache
    before, after = found.source_bytes, found.output_bytes
    yield "size", f"{size(after)} ({after:,} bytes), {after / before:.1%} of {size(before)}"
    yield (
        "bits per weight",
        f"{found.bits_per_weight:.2f} over the whole checkpoint, {found.source_bits_per_weight:.2f} before",
    )


def print_previews(rows: Sequence["Preview"], model: Path) -> None:
    """A row for each spec, then why some do not apply and what warns."""
    from fxq.cli import tables

    source = next((row.source_bytes for row in rows if row.source_bytes), 0)
    title = f"{model.name or model}" + (f", {tables.size(source)}" if source else "")
    table = tables.grid(title, "spec", "experts", "linears", "size")
    table.add_column("data")
    for row in rows:
        counts = [f"{row.experts}", f"{row.linears}", tables.size(row.output_bytes)]
        if row.refused is not None:
            counts = ["-"] * 3
        table.add_row(row.spec, *counts, "yes" if row.needs_data else "no")
    console = tables.console()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for text in (*row.warnings, *([f"does not apply: {row.refused}"] if row.refused else [])):
            reasons.setdefault(text, []).append(row.spec)
    for text, specs in reasons.items():
        which = "every spec" if len(specs) == len(rows) else ", ".join(specs)
        console.print(tables.labelled(which, text, "bold"))
