"""Python's search for unreachable cycles, which growing graphs set off again and again, each time over all of
them: with it, tracing and passes take twice as long.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def off() -> Iterator[None]:
    """Within the block no search runs; what is to go at once may not be part of a cycle there."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def sweeping() -> Iterator[Callable[[], object]]:
    """`off`; what it yields searches among what was made in the block: nothing older is looked at until an
    outermost block ends."""
    outermost = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with off():
            yield gc.collect
    finally:
        if outermost:
            gc.unfreeze()


@contextmanager
def swept() -> Iterator[None]:
    """`sweeping`, once, at the end of the block."""
    with sweeping() as sweep:
        yield
        sweep()
