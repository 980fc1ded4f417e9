"""Training: lots of batches, steps, and what is kept of them."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.errors import SourceError
from fxq.run.training import ONE_OF, lots_of, train


class Number:
    """A part that is one number, 0 at the beginning."""

    def __init__(self, graph: Graph, name: str = "x") -> None:
        self.node: Node = graph.placeholder(name)
        self.moved, self.best = torch.zeros(1, requires_grad=True), torch.zeros(1)

    def groups(self) -> list[dict[str, object]]:
        return [{"params": [self.moved], "lr": 0.1}]

    def values(self) -> Tensor:
        return self.moved * 2

    def limit(self) -> None:
        self.moved.data.clamp_(-1, 1)

    def keep(self) -> None:
        self.best = self.values().detach()


def toward(fitted: float, held: float, number: Number) -> Tensor:
    """What is kept if lots that are fitted lose the squared distance to one number, those held back to
    another."""
    lots = [[batch] for batch in range(2 * ONE_OF)]

    def loss(batch: int, now: Mapping[Node, Tensor]) -> tuple[Tensor, int]:
        goal = held if batch % ONE_OF == 0 else fitted
        return (now.get(number.node, torch.zeros(1)) - goal).square().sum(), 3

    train([number], lots, loss, 60)
    return number.best


@pytest.mark.parametrize("goal", [1.5, -0.8])
def test_what_moves_goes_where_least_is_lost(goal: float) -> None:
    assert float(toward(goal, goal, Number(Graph()))) == pytest.approx(goal, abs=0.1)


def test_it_goes_no_further_than_its_limit() -> None:
    number = Number(Graph())
    assert float(toward(9, 9, number)) == 2
    assert float(number.moved.detach()) == 1


def test_what_text_held_back_says_is_kept() -> None:
    assert float(toward(1.5, -0.01, Number(Graph()))) == 0
    assert 0 < float(toward(1.8, 0.6, Number(Graph()))) < 1.2


def test_what_cannot_move_and_what_nothing_leads_to_stay() -> None:
    graph = Graph()
    number, beside = Number(graph), Number(graph, "y")

    def loss(batch: int, now: Mapping[Node, Tensor]) -> tuple[Tensor, int]:
        return torch.ones(()), 1

    train([number, beside], [[0], [1]], loss, 5)
    train([], [[0], [1]], loss, 5)
    assert float(number.moved.detach()) == float(beside.moved.detach()) == 0


@pytest.mark.parametrize("sizes", [[(1, 5)] * 2, [(8, 100), (2, 3)], [(1, 7)] * 40, [(5, 900)] * 9, [(3, 4)]])
def test_lots_have_every_batch_once(sizes: list[tuple[int, int]]) -> None:
    given = [torch.arange(b * s).reshape(b, s) for b, s in sizes]
    batches, lots = lots_of(given, 100, "it")
    assert sorted(batch for lot in lots for batch in lot) == list(range(len(batches)))
    assert len(lots) >= 2
    assert sum(batch.numel() for batch in batches) == sum(batch.numel() for batch in given)
    for lot in lots[:-1]:
        assert sum(batches[i].numel() for i in lot[:-1]) < 100


@pytest.mark.parametrize("given", [[], [torch.zeros(1, 50, dtype=torch.long)]])
def test_one_sample_cannot_be_held_back(given: list[Tensor]) -> None:
    with pytest.raises(SourceError, match=f"it holds .*: expected two samples or more, found {len(given)}"):
        lots_of(given, 100, "it")
