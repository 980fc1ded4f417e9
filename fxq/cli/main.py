"""The command line: compile, dump-graph, verify, eval, specs.

Errors are one to three lines; exit status 2 for usage, 1 for the rest.
"""

import argparse
import atexit
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import CheckpointError, FxqError, SpecError, choices
from fxq.gc_paused import gc_paused
from fxq.sources.prefetch import read_ahead

if TYPE_CHECKING:
    from rich.table import Table

    from fxq.evaluate.evaluation import Evaluation
    from fxq.graph.program import Program
    from fxq.preview import Preview
    from fxq.report.summary import Report

_COMPILE = """examples:
  fxq compile ./model --spec nvfp4_experts_only_mse-fp8_cast_kv --calib text.jsonl --out ./model-nvfp4
  fxq compile ./model --spec nvfp4_weight_only_mse --out ./model-w4a16          (needs no data)
  fxq compile ./model --spec my.yaml --calib text.jsonl --samples 64 --seq-len 1024 --device cuda --out ./out
"""
_DUMP = """examples:
  fxq dump-graph ./model                                           the traced graph, repeats folded
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --after sync-groups
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --after quantize-linears --diff fuse-experts
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --explain quantize-linears
  fxq dump-graph ./model --full --only '*layers_0*'                 every node of a layer, as parseable text
  fxq dump-graph ./model --spec nvfp4_default-fp8_kv --format html > graph.html
  fxq dump-graph ./model --cone linear_3 --format dot | dot -Tsvg > cone.svg
"""
_SPECS = """examples:
  fxq specs                                                        the shipped specs
  fxq specs nvfp4_default-fp8_kv                                   its YAML, to start from
  fxq specs --model ./model                                        what each would do to it, or why not
  fxq specs my.yaml --model ./model                                in detail: groups, what is left and why
  fxq specs --schema > spec.schema.json                            what editors need to complete a spec
"""
_VERIFY = """examples:
  fxq verify ./model-nvfp4                                         the files alone
  fxq verify ./model-nvfp4 --base ./model                          and against what they were made from
  fxq verify ./model-nvfp4 --json | jq .groups                     for programs

exit status: 0 without errors (warnings do not count), 1 with errors or if this is no NVFP4 checkpoint
"""
_EVAL = """examples:
  fxq eval ./model --text heldout.jsonl                            perplexity
  fxq eval ./model-nvfp4 --base ./model --text heldout.jsonl       and how far predictions are from the base's
  fxq eval ./model-nvfp4 --base ./model --text heldout.jsonl --samples 200 --device cuda --json
"""
_PARTIAL = "leave what cannot be quantized as it is, with a warning, instead of failing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.debug:
        return int(arguments.run(arguments))
    try:
        with _terminable(), gc_paused():
            return int(arguments.run(arguments))
    except FxqError as error:
        print("\n".join([f"fxq: {error}", *_notes(error)]), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as error:
        what = "\n".join(_notes(error)) or "nothing was written"
        print(f"fxq: interrupted; {what}", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: with its work kept."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM is an exception; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxq",
        description="Compile Hugging Face models into NVFP4 checkpoints for vLLM, SGLang and TensorRT-LLM.",
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=epilog,
            parents=[shared],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    add = command(
        "compile", _compile, "Turn a model directory into an NVFP4 checkpoint.", _COMPILE
    ).add_argument
    add("model", metavar="MODEL", type=Path, help="Hugging Face directory with safetensors")
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
    add("--calib", metavar="FILE", type=Path, help='JSON lines of {"text": ...} or {"input_ids": [...]}')
    add("--samples", type=int, default=128, metavar="N", help="calibration lines to use (default 128)")
    add("--seq-len", type=int, default=512, metavar="L", help="tokens kept of each line (default 512)")
    add("--device", default="cpu", metavar="cpu|cuda", help="where calibration and packing run (default cpu)")
    add(
        "--format",
        metavar="FORMAT",
        help="checkpoint format, instead of the spec's: modelopt, compressed-tensors",
    )
    add("--eval", metavar="FILE", type=Path, help="also measure perplexity before and after on this text")
    add("--allow-partial", action="store_true", help=_PARTIAL)
    add("--json", action="store_true", help="print the summary as JSON")
    add("--trust-remote-code", action="store_true", help="allow the model directory's own python code to run")

    add = command(
        "dump-graph", _dump, "Print the graph at any stage of a spec's pipeline.", _DUMP
    ).add_argument
    add("model", metavar="MODEL", type=Path, help="Hugging Face directory with safetensors")
    add("--spec", metavar="NAME|FILE", help="run this spec's passes (without calibrating)")
    add("--after", metavar="PASS", help="stop after this pass (default: the last)")
    add("--only", metavar="GLOB", help="nodes whose name, operator or parameter fits")
    add("--cone", metavar="NODE", help="this node and all that leads to it")
    add("--diff", metavar="PASS", help="what changed since this pass (`trace` for the start)")
    add("--explain", metavar="PASS", help="where this pass fires, and where it does not and why")
    add("--full", action="store_true", help="every node, as text that parses back; nothing folded")
    add(
        "--format",
        choices=("text", "json", "dot", "html"),
        default="text",
        help="output format (default text); html is a page with every stage, to be searched and compared",
    )
    add("--trust-remote-code", action="store_true", help="allow the model directory's own python code to run")

    add = command(
        "verify",
        _verify,
        "Check a quantized checkpoint, whoever wrote it, against what engines need.",
        _VERIFY,
    ).add_argument
    add(
        "directory",
        metavar="DIR",
        type=Path,
        help="ModelOpt NVFP4 or compressed-tensors nvfp4-pack-quantized",
    )
    add("--base", metavar="MODEL", type=Path, help="the model it was made from: compare every tensor with it")
    add("--json", action="store_true", help="print every finding as JSON")

    add = command(
        "eval",
        _eval,
        "Measure perplexity, and how far a model is from the one it was made from.",
        _EVAL,
    ).add_argument
    add(
        "model",
        metavar="MODEL",
        type=Path,
        help="directory with safetensors: unquantized, or an NVFP4 checkpoint, run as engines serve it",
    )
    add("--text", required=True, metavar="FILE", type=Path, help="JSON lines, as for calibration")
    add(
        "--base",
        metavar="MODEL",
        type=Path,
        help="the model it was made from: KL divergence, top-1 agreement",
    )
    add("--samples", type=int, default=64, metavar="N", help="lines to use (default 64)")
    add("--seq-len", type=int, default=512, metavar="L", help="tokens kept of each line (default 512)")
    add("--device", default="cpu", metavar="cpu|cuda", help="where the models run (default cpu)")
    add("--json", action="store_true", help="print it as JSON")
    add("--trust-remote-code", action="store_true", help="allow the model directory's own python code to run")

    add = command(
        "specs", _specs, "List the shipped specs, print one, or show what they would do to a model.", _SPECS
    ).add_argument
    add("name", nargs="?", metavar="NAME|FILE", help="a shipped spec or a YAML file")
    add("--model", metavar="MODEL", type=Path, help="what the spec would do to this model; reads no weight")
    add("--schema", action="store_true", help="print the JSON schema of specs, for editors")
    add("--allow-partial", action="store_true", help=_PARTIAL)
    add("--json", action="store_true", help="print it as JSON (with --model)")
    add("--trust-remote-code", action="store_true", help="allow the model directory's own python code to run")
    return parser


def _compile(arguments: argparse.Namespace) -> int:
    read_ahead(arguments.model)
    from fxq.passes import PASSES
    from fxq.pipeline import spec

    chosen = spec.load(arguments.spec, PASSES)  # its mistakes come before torch has traced anything
    from fxq.compile import compile

    compiled = compile(
        arguments.model,
        chosen,
        calib=arguments.calib,
        out=arguments.out,
        resume=arguments.resume,
        evaluate=arguments.eval,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        device=arguments.device,
        format=arguments.format,
        allow_partial=arguments.allow_partial,
        trust_remote_code=arguments.trust_remote_code,
        progress=_progress,
    )
    try:
        if arguments.json:
            print(json.dumps(compiled.report.as_dict(), indent=2))
        else:
            _print_summary(compiled.report)
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


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal; nothing where there is none."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda: bars.advance(task)
        bars.update(task, completed=total)


def _print_summary(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"fxq compiled with {report.spec}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _summary(report):
        table.add_row(label, value)
    console = Console()
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _summary(report: "Report") -> Iterator[tuple[str, str]]:
    def number(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    yield (
        "quantize nodes",
        (
            f"{report.quantize_nodes}: {report.expert_nodes} expert weights, {report.linear_nodes} "
            "linear weights, "
            f"{report.input_nodes} inputs, {report.kv_nodes} keys and values"
        ),
    )
    if report.experts:
        yield "experts", f"{report.experts}, {report.dead_experts} of them reached by no token"
    yield "bootstrapped", f"{report.bootstrapped} amaxes that data did not reach, filled from the weights"
    yield "groups", f"{report.groups} of linears that share their scales"
    yield "calibration", f"{report.calibration_tokens} tokens" if report.calibration_tokens else "none needed"
    yield (
        "tensors",
        f"{report.tensors_quantized} quantized, {report.tensors_excluded} left as they are and listed "
        "as such",
    )
    yield "bits per weight", number(report.bits_per_weight, ".3f")
    yield (
        "weight SQNR",
        number(report.sqnr_db, ".2f", " dB")
        + f" (worst {number(report.worst_sqnr_db, '.2f', ' dB')}, {report.worst_tensor})",
    )
    if report.perplexity_before is not None and report.perplexity_after is not None:
        yield (
            "perplexity",
            f"{report.perplexity_before:.3f} before, {report.perplexity_after:.3f} after (weights, "
            "inputs and KV as served)",
        )
    if report.source_bytes and report.output_bytes:
        yield "size", f"{report.source_bytes / 1e6:.1f} MB before, {report.output_bytes / 1e6:.1f} MB after"
    yield "time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    memory = number((report.peak_host_bytes or 0) / 2**30, ".2f", " GiB host")
    if report.peak_device_bytes is not None:
        memory += f", {report.peak_device_bytes / 2**30:.2f} GiB GPU"
    yield "peak memory", memory
    yield "output", str(report.out)


def _dump(arguments: argparse.Namespace) -> int:
    from fxq.graph.text import dump, format_node
    from fxq.model import open_model
    from fxq.passes import PASSES
    from fxq.pipeline import run as pipeline
    from fxq.pipeline import spec
    from fxq.view import folded as view
    from fxq.view import page as viewer

    passes = spec.load(arguments.spec, PASSES).passes if arguments.spec else ()
    stages = ["trace", *(step.name for step in passes)]
    for option in ("after", "diff", "explain"):
        name = getattr(arguments, option)
        if name is not None and name not in stages and not (option == "explain" and name in PASSES):
            hint = "" if arguments.spec else " (give --spec to run passes)"
            raise SpecError(
                f"--{option}: expected a stage of the pipeline, {choices(stages)}; found {name!r}{hint}"
            )
    model = open_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    program = model.program
    last = arguments.after or stages[-1]
    if arguments.explain is not None and arguments.after is None and arguments.explain in stages:
        last = stages[stages.index(arguments.explain) - 1]
    kept: dict[str, str] = {}
    pages = viewer.Viewer(arguments.only, arguments.cone) if arguments.format == "html" else None

    def keep(name: str, program: "Program") -> None:
        if pages is not None:
            pages.add(name, program.graph)
        if name == arguments.diff:
            kept["before"] = dump(program.graph) if arguments.full else view.fold(program.graph)

    keep("trace", program)
    if last != "trace":
        steps = passes[: stages.index(last)]
        pipeline.run(steps, program, after=lambda step, program, count: keep(step.name, program))
    graph = program.graph
    if arguments.explain is not None:
        step = next((p for p in passes if p.name == arguments.explain), None) or PASSES[arguments.explain]()
        print(view.explain(step.sites(program)), end="")
        return 0
    if arguments.diff is not None and "before" not in kept:
        raise SpecError(f"--diff: {arguments.diff} comes after {last}")
    if pages is not None:
        if not pages.lines:
            view.select(graph, cone=arguments.cone)  # says which nodes have a name like it
            raise SpecError(f"--only: no node's name, operator or parameter fits {arguments.only!r}")
        title = arguments.model.resolve().name + (f", {arguments.spec}" if arguments.spec else "")
        print(pages.page(title, compared=arguments.diff), end="")
        return 0
    if arguments.diff is not None:
        text = dump(graph) if arguments.full else view.fold(graph)
        print(view.difference(kept["before"], text, arguments.diff, last), end="")
        return 0
    nodes = view.select(graph, only=arguments.only, cone=arguments.cone)
    if not nodes:
        raise SpecError(f"--only: no node's name, operator or parameter fits {arguments.only!r}")
    narrowed = arguments.only is not None or arguments.cone is not None
    if arguments.format == "json":
        print(json.dumps(view.as_json(graph, nodes), indent=1))
    elif arguments.format == "dot":
        print(view.as_dot(graph, nodes), end="")
    elif narrowed:
        print("".join(format_node(node) + "\n" for node in nodes), end="")
    else:
        print(dump(graph) if arguments.full else _fitted(view.fold(graph)), end="")
    return 0


def _fitted(text: str) -> str:
    """Lines cut to the terminal's width; as they are where there is none."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "".join(
        (line if len(line) <= width else line[: width - 1] + "…") + "\n" for line in text.splitlines()
    )


def _verify(arguments: argparse.Namespace) -> int:
    from fxq.audit import verify_checkpoint

    findings = verify_checkpoint(arguments.directory, arguments.base)
    if arguments.json:
        print(json.dumps(findings.as_dict(), indent=2))
    else:
        from rich.console import Console

        from fxq.audit.show import show

        show(findings, Console())
    return 1 if findings.errors else 0


def _eval(arguments: argparse.Namespace) -> int:
    from fxq.evaluate.evaluation import evaluate

    found = evaluate(
        arguments.model,
        arguments.text,
        base=arguments.base,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        progress=_progress,
    )
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print_evaluation(found)
    return 0


def _print_evaluation(found: "Evaluation") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("perplexity", f"{found.perplexity:.4f}")
    if (against := found.against) is not None:
        table.add_row("of the base", f"{against.perplexity:.4f} ({escape(against.base)})")
        table.add_row("KL from the base", f"{against.kl['mean']:.5f} nats per token")
        spread = (f"{name} {value:.5f}" for name, value in against.kl.items() if name != "mean")
        table.add_row("", ", ".join(spread))
        table.add_row("top-1 agreement", f"{against.top1_agreement:.2%}")
    table.add_row("time", f"{found.seconds:.1f} s")
    console = Console()
    console.print(escape(f"{found.model}: {found.tokens} predicted tokens of {found.samples} samples"))
    console.print(table)
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")


def _specs(arguments: argparse.Namespace) -> int:
    from fxq.pipeline.spec import shipped

    if arguments.schema:
        return _print_schema(arguments)
    if arguments.model is not None:
        return _preview(arguments)
    if arguments.name is not None:
        if arguments.name not in shipped():
            hint = "; with --model it may be a file" if arguments.name.endswith((".yaml", ".yml")) else ""
            raise SpecError(f"no spec is called {arguments.name!r}; there are {choices(shipped())}{hint}")
        print(shipped()[arguments.name].read_text(encoding="utf-8"), end="")
        return 0
    import yaml

    for name, path in shipped().items():
        print(f"{name}\n    {yaml.safe_load(path.read_text(encoding='utf-8'))['description']}")
    return 0


def _print_schema(arguments: argparse.Namespace) -> int:
    from fxq.passes import PASSES
    from fxq.pipeline.schema import schema

    if arguments.name is not None or arguments.model is not None:
        raise SpecError("specs --schema: expected no NAME and no --model: one schema is that of all specs")
    print(json.dumps(schema(PASSES), indent=2))
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    """`fxq specs --model`: one spec in detail, or a row for each that is shipped."""
    from fxq.passes import PASSES
    from fxq.pipeline import spec

    names = [arguments.name] if arguments.name is not None else list(spec.shipped())
    specs = [spec.load(name, PASSES) for name in names]  # their mistakes come before anything is traced
    from fxq import preview
    from fxq.compile import with_options
    from fxq.model import open_model

    specs = [with_options(chosen, None, arguments.allow_partial) for chosen in specs]
    model = open_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if arguments.name is not None:
        found = preview.preview(model, specs[0])
        if arguments.json:
            print(json.dumps(found.as_dict(), indent=2))
        else:
            _print_preview(found)
        return 0
    rows = []
    with _progress("plan", len(specs)) as step:
        for row in preview.previews(model, specs):
            rows.append(row)
            step()
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        _print_previews(rows, arguments.model)
    return 0


def _print_preview(found: "Preview") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table(title=f"{found.spec}, before any weight is read", show_header=False, title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for label, value in _facts(found):
        facts.add_row(label, value)
    console.print(facts)
    if found.groups:
        table = Table(title="linears that share their global scales", title_justify="left")
        table.add_column("names", overflow="fold")
        table.add_column("groups", justify="right")
        for name, count in found.groups:
            table.add_row(escape(name), str(count))
        console.print(table)
    if found.excluded:
        console.print(_left_table(found))
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def _left_table(found: "Preview") -> "Table":
    """A row a reason, with the names of what stays."""
    from rich.markup import escape
    from rich.table import Table

    reasons: dict[str, list[str]] = {}
    for name, count, why in found.excluded:
        reasons.setdefault(why, []).append(name + (f" ×{count}" if count > 1 else ""))
    table = Table(title="left as they are", title_justify="left", show_lines=True)
    table.add_column("why", max_width=24, overflow="fold")
    table.add_column("names", overflow="fold")
    for why, names in reasons.items():
        table.add_row(escape(why), escape("\n".join(names)))
    return table


def _facts(found: "Preview") -> Iterator[tuple[str, str]]:
    total = found.experts + found.linears
    yield "tensors quantized", f"{total}: {found.experts} of experts, {found.linears} other linears"
    yield "calibration data", "needed" if found.needs_data else "not needed"
    yield "KV cache", found.kv_cache
    before, after = found.source_bytes, found.output_bytes
    yield "size", f"{_size(after)} ({after:,} bytes), {after / before:.1%} of {_size(before)}"
    yield (
        "bits per weight",
        f"{found.bits_per_weight:.2f} over the whole checkpoint, {found.source_bits_per_weight:.2f} before",
    )


def _size(count: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    unit, scale = next(u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= u[1] or u[1] == 1e3)
    return f"{count / scale:.2f} {unit}"


def _print_previews(rows: Sequence["Preview"], model: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    size = next((row.source_bytes for row in rows if row.source_bytes), 0)
    title = f"{model.name or model}" + (f", {_size(size)}" if size else "")
    table = Table(title=title, title_justify="left")
    table.add_column("spec", overflow="fold")
    for column in ("experts", "linears", "size"):
        table.add_column(column, justify="right")
    table.add_column("data")
    for row in rows:
        counts = [f"{row.experts}", f"{row.linears}", _size(row.output_bytes)]
        if row.refused is not None:
            counts = ["-"] * 3
        table.add_row(row.spec, *counts, "yes" if row.needs_data else "no")
    console = Console()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for text in (*row.warnings, *([f"does not apply: {row.refused}"] if row.refused else [])):
            reasons.setdefault(text, []).append(row.spec)
    for text, specs in reasons.items():
        which = "every spec" if len(specs) == len(rows) else ", ".join(specs)
        console.print(f"[bold]{which}[/bold]: {escape(text)}")


# What is alive when the process ends needs no search.
atexit.register(gc.freeze)

if __name__ == "__main__":
    sys.exit(main())
