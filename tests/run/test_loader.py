"""Loading ahead: order, what is in flight, errors, and an iterator that is left early."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxq.run import stages
from fxq.run.loader import Request, loaded

CPU = torch.device("cpu")


class Reader:
    """Reads item n as the tensor [n]; notes which thread read what."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.started: list[int] = []
        self.threads: set[int] = set()

    def requests(self, count: int) -> Iterator[Request[int]]:
        for item in range(count):
            yield Request(item, (1,), torch.int64, [functools.partial(self.fill, item)])

    def fill(self, item: int, out: Tensor) -> None:
        self.started.append(item)
        self.threads.add(threading.get_ident())
        if item == self.fails_at:
            raise OSError(f"item {item}")
        out.fill_(item)


def test_items_come_in_order_and_are_read_on_another_thread() -> None:
    reader = Reader()
    found = [(item, int(value)) for item, value in loaded(reader.requests(50), CPU, concurrent=True)]
    assert found == [(i, i) for i in range(50)]
    assert threading.get_ident() not in reader.threads


@pytest.mark.parametrize(("limit", "ahead"), [(0, 1), (8, 1), (23, 2), (24, 3), (1000, 9)])
def test_no_more_is_read_ahead_than_the_limit_allows(
    limit: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.AHEAD, "cpu", limit)
    reader = Reader()
    iterator = loaded(reader.requests(10), CPU, concurrent=True)
    next(iterator)
    iterator.close()  # waits for what has begun
    assert len(reader.started) <= 1 + ahead
    assert reader.started == sorted(reader.started)  # as it closes, one of those that waited may still begin


def test_the_item_after_the_one_in_use_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.AHEAD, "cpu", 0)
    second = threading.Event()
    requests = [Request(0, (1,), torch.int64, [Tensor.zero_])]
    requests.append(Request(1, (1,), torch.int64, [lambda out: second.set()]))
    iterator = loaded(requests, CPU, concurrent=False)
    next(iterator)
    assert second.wait(timeout=30)
    iterator.close()


def test_an_error_comes_at_its_item_and_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.AHEAD, "cpu", 0)
    reader = Reader(fails_at=2)
    iterator = loaded(reader.requests(10), CPU, concurrent=True)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(iterator)
    assert reader.started in ([0, 1, 2], [0, 1, 2, 3])  # the one after it may have begun


def test_nothing_is_nothing() -> None:
    assert list(loaded(Reader().requests(0), CPU, concurrent=True)) == []
