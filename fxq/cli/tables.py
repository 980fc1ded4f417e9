"""Tables and messages on a terminal: the one place where consoles are made.

No text is ever parsed as markup: a shape such as [in, out] in a warning is not a style. So consoles know no
markup, and styles are given beside the text, never within it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Table", "Text", "console", "facts", "grid", "labelled", "progress", "size"]


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
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, advanced by calling what the block is given; nothing where there is none."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda: bars.advance(task)
        bars.update(task, completed=total)


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    unit, scale = next(u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= u[1] or u[1] == 1e3)
    return f"{count / scale:.2f} {unit}"
