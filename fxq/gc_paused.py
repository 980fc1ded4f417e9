"""Garbage collection paused: while graphs grow, Python searches them for unreachable cycles again and again,
each time over all of them; with that, tracing and passes take twice as long.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within the block no search runs: what is part of a cycle there stays until after it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
