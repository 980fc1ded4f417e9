"""What a command says beside its result: progress, and a log of its stages."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fxq.errors import SpecError

if TYPE_CHECKING:
    from fxq.pipeline.base import Progress

LOGGER = logging.getLogger("fxq")
LOGGER.addHandler(logging.NullHandler())  # else Python prints errors that nobody asked to see twice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    add = parser.add_argument
    add("--debug", action="store_true", help="show a traceback when something fails")
    add("-q", "--quiet", action="store_true", help="show no progress")
    add("-v", "--verbose", action="store_true", help="say what each stage did and how long it took")
    add("--log-file", metavar="FILE", type=Path, help="add that, warnings and errors to a file, with times")


def progress_of(arguments: argparse.Namespace) -> "Progress":
    """Bars, or lines where there is no terminal; nothing if it is to be quiet."""
    from fxq.cli import tables
    from fxq.pipeline.base import no_progress

    return no_progress if arguments.quiet else tables.progress


@contextlib.contextmanager
def logged(arguments: argparse.Namespace) -> Iterator[None]:
    """Within the block what is logged goes where the options say."""
    handlers: list[logging.Handler] = []
    if arguments.verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    if arguments.log_file is not None:
        try:
            file = logging.FileHandler(arguments.log_file, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise SpecError(f"--log-file {arguments.log_file}: cannot write it: {error}") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO if handlers else level)
    for handler in handlers:
        LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()
