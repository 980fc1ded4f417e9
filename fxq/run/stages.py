"""Stages: work on items in order, on other threads, ahead of whoever takes the results.

Reading weights, packing them and writing what was packed are a stage each, one fed by the other.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# How many bytes of weights are handled by one call: enough for a launch, little enough to hold.
AT_ONCE = {"cpu": 16 << 20, "cuda": 256 << 20}
# How many bytes a stage holds beyond what is being used, or one item if that is larger.
AHEAD = {"cpu": 16 << 20, "cuda": 1 << 30}


def stage(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int,
    size: Callable[[Item], int],
) -> Generator[Result]:
    """`work(item)` for every item, in order, done on `threads` threads.

    ahead: how many bytes may be begun and not taken, by the `size` of their items; one item always may. What
    `work` raises is raised where its result would have come, what `items` raises at once. Either ends the
    stage, as closing it does: nothing is begun after that, what has begun is waited for, and `items` is
    closed if it is a generator.
    """
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fxq-stage")
    try:
        for item in items:
            nbytes = size(item)
            due: deque[Future[Result]] = deque()
            while waiting and held + nbytes > ahead:
                freed, future = waiting.popleft()
                due.append(future)
                held -= freed
            waiting.append((nbytes, pool.submit(work, item)))  # while what is due is used
            held += nbytes
            while due:
                yield due.popleft().result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(items, Generator):
            items.close()
