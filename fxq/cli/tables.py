"""Tables and messages on a terminal: the one place where consoles are made.

No text is ever parsed as markup: a shape such as [in, out] in a warning is not a style. So consoles know no
markup, and styles are given beside the text, never within it.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Table", "Text", "console", "facts", "grid", "labelled", "progress", "size"]


_REDRAWN, _SECONDS_A_LINE = 0.1, 15.0
# Before so much of the work is done, what it took says little of the rest.
_TOO_EARLY = 0.01


def console(*, stderr: bool = False) -> Console:
    """A terminal that prints text as it is."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def facts(rows: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    """A row for each label and value."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    return table


def grid(title: str | None, first: str, *right: str) -> Table:
    """A table whose first column is text, folded if it is long, and whose other columns are figures."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def labelled(label: str, text: str, style: str) -> Text:
    """`label: text`, the label in that style."""
    return Text.assemble((f"{label}:", style), f" {text}")


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, advanced by calling what the block is given with what was done; lines now and
    then where there is no terminal. Nothing where there is nothing to do."""
    with (_bar if sys.stderr.isatty() else _lines)(label, total) if total else _nothing() as step:
        yield step


def shown_in_python(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar in a terminal or a notebook, elsewhere nothing: a library does not print."""
    seen = sys.stderr.isatty() or console(stderr=True).is_jupyter
    return _bar(label, total) if seen and total else _nothing()


@contextlib.contextmanager
def _nothing() -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TimeElapsedColumn(),
        _Left(),
    )
    with Progress(*columns, console=console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        done, shown = 0, time.monotonic()

        def step(more: int) -> None:
            nonlocal done, shown
            done += more
            if (now := time.monotonic()) - shown > _REDRAWN:  # of many small steps each would cost a redraw
                bars.update(task, completed=done)
                shown = now

        yield step
        bars.update(task, completed=total)


class _Left(ProgressColumn):
    """The time left if work goes on as it went so far; it grows where the work halts."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(_left(task.completed, task.total or 0, task.elapsed or 0), style="progress.remaining")


def _left(done: float, total: float, elapsed: float) -> str:
    """`about 0:12:00 left` of work that took `elapsed` seconds so far."""
    if done >= total or done < total * _TOO_EARLY:
        return ""
    return f"about {datetime.timedelta(seconds=round(elapsed * (total - done) / done))} left"


@contextlib.contextmanager
def _lines(label: str, total: int) -> Iterator[Callable[[int], None]]:
    start = said = time.monotonic()
    done = 0

    def step(more: int) -> None:
        nonlocal done, said
        done += more
        if (now := time.monotonic()) - said >= _SECONDS_A_LINE:
            said = now
            elapsed = datetime.timedelta(seconds=round(now - start))
            left = _left(done, total, now - start)
            text = f"{label}: {min(1, done / total):.0%} after {elapsed}{left and ', '}{left}"
            print(text, file=sys.stderr, flush=True)

    yield step


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    unit, scale = next(u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= u[1] or u[1] == 1e3)
    return f"{count / scale:.2f} {unit}"
