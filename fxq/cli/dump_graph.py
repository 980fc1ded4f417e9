"""`fxq dump-graph`: the graph at any stage of a pipeline, whole or in part; what changed; why."""

import argparse
import json
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fxq.cli import arguments as shared
from fxq.errors import SpecError, choices

if TYPE_CHECKING:
    from torch.fx import Graph

    from fxq.graph.program import Program
    from fxq.pipeline.base import Pass
    from fxq.view.page import Viewer

ABOUT = "Print the graph at any stage of a spec's pipeline."
EXAMPLES = """examples:
  fxq dump-graph ./model                                           the traced graph, repeats folded
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --after sync-groups
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --after quantize-linears --diff fuse-experts
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --explain quantize-linears
  fxq dump-graph ./model --full --only '*layers_0*'                 every node of a layer, as parseable text
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --format html > graph.html
  fxq dump-graph ./model --cone linear_3 --format dot | dot -Tsvg > cone.svg
"""
START = "trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    shared.add_model(parser)
    add("--spec", metavar="NAME|FILE", help="run this spec's passes (without calibrating)")
    add("--after", metavar="PASS", help="stop after this pass (default: the last)")
    add("--only", metavar="GLOB", help="nodes whose name, operator or parameter fits")
    add("--cone", metavar="NODE", help="this node and all that leads to it")
    add("--diff", metavar="PASS", help=f"what changed since this pass (`{START}` for the start)")
    add("--explain", metavar="PASS", help="where this pass fires, and where it does not and why")
    add("--full", action="store_true", help="every node, as text that parses back; nothing folded")
    add(
        "--format",
        choices=("text", "json", "dot", "html"),
        default="text",
        help="output format (default text); html is a page with every stage, to be searched and compared",
    )
    shared.add_settings(parser)
    shared.add_passes(parser)
    shared.add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trace, run the passes up to the stage asked for, and print what was asked of it."""
    from fxq.passes import table
    from fxq.pipeline.run import run_passes

    known = table(arguments.passes)
    passes = _passes(arguments, known)
    stages = [START, *(step.name for step in passes)]
    _check(arguments, stages, known)
    last = _last(arguments, stages)
    from fxq.model import open_model
    from fxq.view.explain import difference, explain
    from fxq.view.page import Viewer

    options = {"follow_links": arguments.follow_links, "trust_remote_code": arguments.trust_remote_code}
    program = open_model(arguments.model, **options).program
    viewer = Viewer(arguments.only, arguments.cone) if arguments.format == "html" else None
    before = ""

    def look(stage: str) -> None:
        nonlocal before
        if viewer is not None:
            viewer.add(stage, program.graph)
        if stage == arguments.diff:
            before = _text(program.graph, arguments.full)

    look(START)
    if steps := passes[: stages.index(last)]:
        run_passes(steps, program, after=lambda step, program, count: look(step.name))
    if arguments.explain is not None:
        text = explain(_step(arguments.explain, passes, known).sites(program))
    elif viewer is not None:
        text = _page(viewer, arguments, program)
    elif arguments.diff is not None:
        text = difference(before, _text(program.graph, arguments.full), arguments.diff, last)
    else:
        text = _graph(arguments, program.graph)
    print(text, end="")
    return 0


def _passes(arguments: argparse.Namespace, known: "dict[str, type[Pass]]") -> "tuple[Pass, ...]":
    from fxq.pipeline import spec

    if arguments.spec:
        return spec.load(arguments.spec, known).with_settings(arguments.settings).passes
    if arguments.settings:
        raise SpecError("--set: expected a --spec, whose passes have options; found none")
    return ()


def _check(arguments: argparse.Namespace, stages: Sequence[str], known: Collection[str]) -> None:
    """SpecError if an option names no stage of the pipeline; any pass may be asked to explain itself."""
    for option in ("after", "diff", "explain"):
        name = getattr(arguments, option)
        if name is not None and name not in stages and not (option == "explain" and name in known):
            hint = "" if arguments.spec else " (give --spec to run passes)"
            raise SpecError(
                f"--{option}: expected a stage of the pipeline, {choices(stages)}; found {name!r}{hint}"
            )
    last = _last(arguments, stages)
    if arguments.diff is not None and stages.index(arguments.diff) > stages.index(last):
        raise SpecError(f"--diff: {arguments.diff} comes after {last}")


def _last(arguments: argparse.Namespace, stages: Sequence[str]) -> str:
    """The stage to stop at: what a pass explains is the graph that it would be given."""
    if arguments.after is None and arguments.explain in stages[1:]:
        return stages[stages.index(arguments.explain) - 1]
    return str(arguments.after or stages[-1])


def _step(name: str, passes: Sequence["Pass"], known: "dict[str, type[Pass]]") -> "Pass":
    """The pass with the spec's options, or one that is not in the spec with its own."""
    return next((step for step in passes if step.name == name), None) or known[name]()


def _text(graph: "Graph", full: bool) -> str:
    from fxq.graph.text import dump
    from fxq.view.folded import fold

    return dump(graph) if full else fold(graph)


def _page(viewer: "Viewer", arguments: argparse.Namespace, program: "Program") -> str:
    from fxq.view.select import select

    if not viewer.lines:
        select(program.graph, cone=arguments.cone)  # says which nodes have a name like it
        raise SpecError(_nothing(arguments.only))
    title = arguments.model.resolve().name + (f", {arguments.spec}" if arguments.spec else "")
    return viewer.page(title, compared=arguments.diff)


def _graph(arguments: argparse.Namespace, graph: "Graph") -> str:
    from fxq.graph.text import format_node
    from fxq.view.select import as_dot, as_json, select

    nodes = select(graph, only=arguments.only, cone=arguments.cone)
    if not nodes:
        raise SpecError(_nothing(arguments.only))
    if arguments.format == "json":
        return json.dumps(as_json(graph, nodes), indent=1) + "\n"
    if arguments.format == "dot":
        return as_dot(graph, nodes)
    if arguments.only is not None or arguments.cone is not None:
        return "".join(format_node(node) + "\n" for node in nodes)
    text = _text(graph, arguments.full)
    return text if arguments.full else _fitted(text)


def _nothing(only: str) -> str:
    return f"--only: no node's name, operator or parameter fits {only!r}"


def _fitted(text: str) -> str:
    """Lines cut to the terminal's width; as they are where there is none."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "".join(
        (line if len(line) <= width else line[: width - 1] + "…") + "\n" for line in text.splitlines()
    )
