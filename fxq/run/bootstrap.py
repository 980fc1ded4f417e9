"""Bootstrap: fills every amax that data did not reach."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import root, shape_of
from fxq.numbers.formats import UNSEEN_INPUT_AMAX
from fxq.run.statistics import amax_of, check_finite
from fxq.run.weights import WeightExpressions


class Bootstrap:
    """Fills every amax that data did not reach: weights from the weights, inputs from their layer."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.weights = program, WeightExpressions(program, source, device)
        self.graph = program.calibrated or program.graph
        self.alike: dict[object, dict[Node, int]] = {}

    @torch.no_grad()
    def run(self, step: Callable[[], None] = lambda: None, *, shared_only: bool = False) -> dict[str, Tensor]:
        """Values for the empty amax nodes of the program, by name.

        shared_only: leave out those that nothing but their own weight needs, which is not read.
        """
        empty = [
            n for n in self.graph.nodes if n.target is dialect.AMAX and n.name not in self.program.values
        ]
        weights: dict[Node, list[Node]] = defaultdict(list)
        for hole in empty:
            if shared_only and is_own(hole):
                step()
            elif root(node_at(hole, 0)) is not None:
                weights[node_at(hole, 0)].append(hole)
        found: dict[str, Tensor] = {}
        for nodes, values in self.weights.batches(weights):
            for node, amax, weight in zip(nodes, amax_of(values).cpu(), values, strict=True):
                for hole in weights[node]:
                    check_finite(self.program.hub, hole, amax, weight)
                    found[hole.name] = amax
                    step()
        for hole in empty:
            if root(node_at(hole, 0)) is None:
                found[hole.name] = self._input_amax(hole)
                step()
        return found

    def _input_amax(self, hole: Node) -> Tensor:
        """For an input that no token reached: the largest amax of what shares its scale or its fused weight,
        else that of the nearest input made and used alike (a fellow expert's), else a constant."""
        peers = [self.program.values[n.name] for n in _input_peers(hole) if n.name in self.program.values]
        if not peers:
            peers = [self.program.values[n.name] for n in self._nearest_alike(hole)]
        return torch.stack(peers).amax() if peers else torch.tensor(UNSEEN_INPUT_AMAX)

    def _nearest_alike(self, hole: Node) -> list[Node]:
        if not self.alike:
            for place, node in enumerate(self.graph.nodes):
                if node.target is dialect.AMAX and root(node_at(node, 0)) is None:
                    self.alike.setdefault(_use(node), {})[node] = place
        fellows = self.alike[_use(hole)]
        seen = [node for node in fellows if node.name in self.program.values]
        return sorted(seen, key=lambda node: abs(fellows[node] - fellows[hole]))[:1]


def is_own(hole: Node) -> bool:
    """Whether an amax is a weight's and serves to quantize that weight alone."""
    w = node_at(hole, 0)
    return root(w) is not None and all(
        user.target is dialect.QUANTIZE and node_at(user, 0) is w for user in hole.users
    )


def _use(hole: Node) -> object:
    """What an input is made by and multiplied with: alike for the same linear of two experts or layers."""
    made: list[object] = []
    node = node_at(hole, 0)
    while node.op == "call_function" and len(made) < 6 and node.args and isinstance(node.args[0], Node):
        made.append(node.target)
        node = node_at(node, 0)
    matmuls = dict.fromkeys(user for quantize in _quantizes(hole) for user in quantize.users)
    shapes = {shape_of(o) for matmul in matmuls for o in matmul.all_input_nodes if root(o) is not None}
    return tuple(made), frozenset(shapes)


def _quantizes(hole: Node) -> list[Node]:
    """The quantize nodes that use an amax, alone or in a group."""
    users = [u for user in hole.users for u in (user.users if user.target is dialect.SYNC else [user])]
    return [user for user in users if user.target is dialect.QUANTIZE and root(node_at(user, 0)) is None]


def _input_peers(hole: Node) -> list[Node]:
    """Input amax nodes that share a group with this one, or whose weights lie in the same parameter."""
    peers: dict[Node, None] = {}
    for group in [u for u in hole.users if u.target is dialect.SYNC]:
        peers.update(dict.fromkeys(nodes_at(group, 0)))
    for quantize in _quantizes(hole):
        if node_at(quantize, 0) is not node_at(hole, 0):
            continue
        for matmul in quantize.users:
            for operand in matmul.all_input_nodes:
                parameter = root(operand)
                if parameter is not None:
                    peers.update(dict.fromkeys(_input_holes(parameter)))
    return [peer for peer in peers if peer is not hole]


def _input_holes(parameter: Node) -> list[Node]:
    holes, stack, seen = [], list(parameter.users), set(parameter.users)
    while stack:
        node = stack.pop()
        if root(node) is parameter:
            new = [u for u in node.users if u not in seen]
            seen.update(new)
            stack.extend(new)
            continue
        for operand in node.all_input_nodes:
            if operand.target is dialect.QUANTIZE and root(operand) is None:
                amax = node_at(operand, 1)
                holes += list(nodes_at(amax, 0)) if amax.target is dialect.SYNC else [amax]
    return holes
