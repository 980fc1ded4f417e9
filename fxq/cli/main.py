"""The command line: its parser, what an error prints, signals, exit status.

Errors are one to three lines. Exit status: 2 for usage, 1 for other errors, 130 and 143 when interrupted.
Each command has a file of its own beside this one: what it takes (`add_arguments`) and does (`run`).
"""

import argparse
import atexit
import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from fxq import __version__
from fxq.cli import choose, compile, dump_graph, eval, logs, specs, verify
from fxq.errors import FxqError

COMMANDS = {
    "compile": compile,
    "choose": choose,
    "dump-graph": dump_graph,
    "verify": verify,
    "eval": eval,
    "specs": specs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        with terminable(), logs.logged(arguments):
            return _run(arguments)
    except FxqError as error:
        if arguments.debug:
            raise
        print("\n".join([f"fxq: {error}", *_notes(error)]), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as error:
        what = "\n".join(_notes(error)) or "nothing was written"
        print(f"fxq: interrupted; {what}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except FxqError as error:
        logs.LOGGER.error("%s", error)
        raise


def parser() -> argparse.ArgumentParser:
    """What `fxq` takes; parsing imports neither torch nor rich, so that `--help` and slips are answered at
    once."""
    made = argparse.ArgumentParser(
        prog="fxq",
        description="Compile Hugging Face models into NVFP4 checkpoints for vLLM, SGLang and TensorRT-LLM.",
    )
    made.add_argument("--version", action="version", version=f"fxq {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    logs.add_arguments(shared)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.ABOUT,
            description=command.ABOUT,
            epilog=command.EXAMPLES,
            parents=[shared],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return made


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: with its work kept."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# When Python ends it searches all objects for cycles, up to a second after a large model; all memory goes.
atexit.register(gc.freeze)

if __name__ == "__main__":
    sys.exit(main())
