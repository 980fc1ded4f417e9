"""Stages: order, how far ahead, errors, and what is left when one is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fxq.run.stages import stage


def test_results_come_in_order_from_several_threads() -> None:
    seen: set[int] = set()

    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        seen.add(threading.get_ident())
        return item * item

    found = list(stage(work, range(50), threads=3, ahead=8, size=lambda item: 1))
    assert found == [i * i for i in range(50)]
    assert 1 < len(seen) <= 3
    assert threading.get_ident() not in seen


@pytest.mark.parametrize(("ahead", "most"), [(0, 1), (1, 1), (5, 5), (1000, 20)])
def test_no_more_is_begun_than_the_limit_allows(ahead: int, most: int) -> None:
    begun: list[int] = []
    one = stage(lambda item: begun.append(item), range(20), threads=1, ahead=ahead, size=lambda item: 1)
    next(one)
    time.sleep(0.05)
    assert len(begun) <= 1 + most
    one.close()


def test_an_item_larger_than_the_limit_is_done_alone() -> None:
    alive, most = 0, 0

    def work(item: int) -> int:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return item

    for _ in stage(work, range(10), threads=1, ahead=10, size=lambda item: 100):
        alive -= 1
    assert most <= 3  # the one in use, the next, and for a moment the one after it


def test_an_error_comes_where_the_result_would_have() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise OSError("item 3")
        return item

    results = stage(work, range(10), threads=2, ahead=4, size=lambda item: 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3"):
        next(results)
    assert list(results) == []


def test_what_feeds_a_stage_is_closed_with_it_and_no_thread_stays() -> None:
    before, closed = threading.active_count(), []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    one = stage(lambda item: item, items(), threads=2, ahead=4, size=lambda item: 1)
    assert next(one) == 0
    one.close()
    assert closed == [True]
    assert threading.active_count() == before
