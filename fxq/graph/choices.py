"""Choices: groups of weights for each of which one of several formats is to be chosen.

%w_choice : bf16[64,64] = fxq.choose([%w_q, %w_fp8, %w], %which)    formats: nvfp4, fp8, none
%x_choice : bf16[8,64] = fxq.choose([%x_q, %x_fp8, %x], %which)     what they multiply
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at


@dataclass(frozen=True)
class Choice:
    """A group of weights that one kernel multiplies, and what each format would cost.

    which: the name of the `fxq.value` that decides, the place of a format in `formats`. parameters: their
    names; tensors: how many tensors of the checkpoint they are. numbers: how many weights there are. work:
    how many multiplications by them, of the example that the graph's types describe. bits: of all the weights
    in each format, block scales included; operations: of an operand of each multiplication, summed. fixed:
    the format that the user asked for, if any.
    """

    which: str
    parameters: tuple[str, ...]
    formats: tuple[str, ...]
    tensors: int
    numbers: int
    work: int
    bits: tuple[float, ...]
    operations: tuple[float, ...]
    fixed: str | None = None

    @property
    def loss_names(self) -> list[str]:
        """The names of the values that say what each format was measured to lose, float64 [] each."""
        return [f"{self.which}_loss_{place}" for place in range(len(self.formats))]

    @property
    def settled(self) -> int:
        """The place of the fixed format, or of the first."""
        return self.formats.index(self.fixed) if self.fixed is not None else 0

    def place(self, values: Mapping[str, Tensor]) -> int:
        """The place of the format that was chosen; before that, of the one that is shown instead."""
        return int(values.get(self.which, self.settled))

    def losses(self, values: Mapping[str, Tensor]) -> list[float]:
        """What each format was measured to lose."""
        return [float(values[name]) for name in self.loss_names]


def chooses(graph: Graph) -> list[Node]:
    """Every `fxq.choose`."""
    return [node for node in graph.nodes if node.target is dialect.CHOOSE]


def which_of(choose: Node) -> str:
    """The name of the value that decides an `fxq.choose`."""
    return str(node_at(choose, 1).args[0])
