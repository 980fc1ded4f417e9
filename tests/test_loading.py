"""Loading ahead: order, what is in flight, errors, and an iterator that is left early."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from fxq import loading
from fxq.loading import loaded

CPU = torch.device("cpu")


class Reader:
    """Reads item n as a tensor of n; notes which thread read what."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.started: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, item: int) -> Tensor:
        self.started.append(item)
        self.threads.add(threading.get_ident())
        if item == self.fails_at:
            raise OSError(f"item {item}")
        return torch.tensor(item)


def test_items_come_in_order_and_are_read_on_another_thread() -> None:
    reader = Reader()
    found = [(item, int(value)) for item, value in loaded(range(50), reader, nbytes=lambda i: 8, device=CPU)]
    assert found == [(i, i) for i in range(50)]
    assert threading.get_ident() not in reader.threads


@pytest.mark.parametrize(("limit", "ahead"), [(0, 1), (8, 1), (23, 2), (24, 3), (1000, 9)])
def test_no_more_is_read_ahead_than_the_limit_allows(
    limit: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loading.AHEAD_BYTES, "cpu", limit)
    reader = Reader()
    iterator = loaded(range(10), reader, nbytes=lambda i: 8, device=CPU)
    next(iterator)
    iterator.close()  # waits for what has begun
    assert len(reader.started) <= 1 + ahead
    assert reader.started == list(range(len(reader.started)))


def test_the_item_after_the_one_in_use_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.AHEAD_BYTES, "cpu", 0)
    second = threading.Event()

    def read(item: int) -> Tensor:
        if item == 1:
            second.set()
        return torch.tensor(item)

    iterator = loaded(range(3), read, nbytes=lambda i: 8, device=CPU)
    next(iterator)
    assert second.wait(timeout=30)
    iterator.close()


def test_an_error_comes_at_its_item_and_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.AHEAD_BYTES, "cpu", 0)
    reader = Reader(fails_at=2)
    iterator = loaded(range(10), reader, nbytes=lambda i: 8, device=CPU)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(iterator)
    assert reader.started == [0, 1, 2]


def test_nothing_is_nothing() -> None:
    assert list(loaded([], Reader(), nbytes=lambda i: 8, device=CPU)) == []
