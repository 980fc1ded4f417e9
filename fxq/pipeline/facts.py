"""Facts that passes require and ensure: each answers None when it holds for a program, else why it does
not."""

from collections import Counter
from collections.abc import Callable, Iterator

from torch.fx import Node

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.hub import Stored
from fxq.graph.places import places
from fxq.graph.program import Program
from fxq.graph.structure.experts import expert_lists, multiplies_experts
from fxq.graph.structure.groups import fused_by_engines
from fxq.graph.structure.matmuls import Frontiers, WeightMatmul, input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, parameter_name, root, statistics, strip, value_of, weight_of
from fxq.graph.text import format_target

Fact = Callable[[Program], str | None]


def experts_fused(program: Program) -> str | None:
    """Every stacked parameter that reaches a matmul does so through `fxq.expert_linear` or one
    `fxq.slice`; or a pass was allowed to leave it."""
    for matmul in weight_matmuls(program.graph):
        is_slice = weight_of(matmul.w).target is dialect.SLICE
        known = matmul.node.target is dialect.EXPERT_LINEAR or is_slice
        if multiplies_experts(matmul) and not known and matmul.parameter.target not in program.left:
            return (
                f"@{matmul.parameter.target} reaches %{matmul.node.name} "
                f"({format_target(matmul.node.target)}) "
                "in a form that no pattern knows"
            )
    return None


def weights_quantized(program: Program) -> str | None:
    """Some weight goes through a quantize node."""
    return None if any(is_weight_quantize(node) for node in program.graph.nodes) else "no weight is quantized"


def groups_whole(program: Program) -> str | None:
    """The linears that engines fuse are all quantized alike, or none is (engines refuse a mixture)."""
    frontiers = Frontiers(program.graph)
    for kind, group in fused_by_engines(program.graph, frontiers):
        names: dict[str, list[str]] = {}
        for matmul in (frontiers.matmuls[node] for node in group):
            names.setdefault(_formats(matmul), []).append(str(matmul.parameter.target))
        if len(names) > 1 and (plain := names.pop("", None)) is not None:
            quantized = [name for siblings in names.values() for name in siblings]
            return (
                f"engines fuse {kind}, so all or none must be quantized: "
                f"{', '.join(quantized)} would be, {', '.join(plain)} not; change `only` or `skip`"
            )
        if len(names) > 1:
            found = " and ".join(f"{', '.join(siblings)} {formats}" for formats, siblings in names.items())
            return (
                f"engines fuse {kind}, so all must be quantized alike, found {found}; change `only` or `skip`"
            )
    return None


def _formats(matmul: WeightMatmul) -> str:
    """The formats of a linear's weight and input, as a spec names them; "" if it is not quantized."""
    w, x = strip(matmul.w, VIEWS), input_quantize(matmul.x)
    if not is_rounding(w):
        return ""
    return f"{w.kwargs['format']} with inputs {x.kwargs['format'] if x is not None else 'none'}"


def amaxes_shared(program: Program) -> str | None:
    """Quantized weights that read one value, or lie in one tensor of the checkpoint, have one weight amax
    and one input amax; experts that are linears of their own have one input amax a layer, as engines do."""
    for quantizes in routed_inputs(program):
        for other in quantizes[1:]:
            if other.args[1] is not quantizes[0].args[1]:
                why = "rounds the tokens of an expert, of whose layer"
                return f"%{other.name} {why} %{quantizes[0].name} is another, but has an amax of its own"
    groups = [("reads the same value as", siblings) for siblings in quantized_siblings(program).values()]
    groups += [
        (f"lies in the checkpoint's {key} like", siblings)
        for key, siblings in tensor_siblings(program).items()
    ]
    for why, siblings in groups:
        first = siblings[0]
        for sibling in siblings[1:]:
            for what, mine, theirs in zip(("a weight", "an input"), sibling, first, strict=True):
                if mine is not None and theirs is not None and mine.args[1] is not theirs.args[1]:
                    return f"%{mine.name} {why} %{theirs.name} but has {what} amax of its own"
    return None


def tensors_whole(program: Program) -> str | None:
    """Of the parameters that lie in one tensor of the checkpoint, or in one list of experts, all are
    quantized alike, or none is."""
    quantized: dict[str, str] = {}
    for node in filter(is_weight_quantize, program.graph.nodes):
        name, format = parameter_name(node), str(node.kwargs["format"])
        if quantized.setdefault(name, format) != format:
            return (
                f"{name} is quantized to {quantized[name]} in one part and to {format} in another; expected "
                "one format for all of a parameter"
            )
    names, owners = program.hub.names, dict[str, str]()
    for name in quantized.keys() & names.keys():
        for holder in holders(names[name]):
            owner = owners.setdefault(holder, name)
            if quantized[owner] != quantized[name]:
                return (
                    f"the checkpoint's {holder} holds both {owner}, quantized to {quantized[owner]}, and "
                    f"{name}, to {quantized[name]}; change `only` or `skip` so that both are alike"
                )
    for name, stored in names.items():
        for holder in holders(stored) if name not in quantized else ():
            held = owners.get(holder)
            if held is not None and names[held] is not stored:  # one parameter may have several names
                return (
                    f"the checkpoint's {holder} holds both {held}, which is quantized, and {name}, "
                    "which is not; change `only` or `skip` so that both are or neither"
                )
    return None


def holders(stored: Stored) -> Iterator[str]:
    """The tensors of a parameter, a list of experts as one name with `*` for their number."""
    for part in stored.parts:
        words = zip(*(key.split(".") for key in part.keys[:2]), strict=True)  # the first two experts'
        yield ".".join(same[0] if len(set(same)) == 1 else "*" for same in words)


def weights_placed(program: Program) -> str | None:
    """Every quantized weight is rows of the checkpoint's tensors, so that these can hold it quantized."""
    for node in program.graph.nodes:
        if is_weight_quantize(node):
            try:
                places(program.hub, node_at(node, 0))
            except VerifyError as error:
                return str(error)
    return None


def amaxes_filled(program: Program) -> str | None:
    """Every statistic of activations has a value, or is an amax that `fxq.first` has an answer for."""
    for node in statistics(program.graph) if program.pending is None else ():
        value = program.values.get(node.name)
        unreached = value is not None and node.target is dialect.AMAX and float(value) < 0
        if (value is None or unreached) and not _is_optional(node):
            return f"%{node.name} has no value" + (": no token reached it" if unreached else "")
    return None


def _is_optional(statistic: Node) -> bool:
    """Whether whatever uses an amax has a value in its stead."""
    users = [u for user in statistic.users for u in (user.users if user.target is dialect.SYNC else [user])]
    return all(user.target is dialect.FIRST for user in users)


def is_weight_quantize(node: Node) -> bool:
    """True for a rounding of a parameter or of a slice of one."""
    return is_rounding(node) and root(node_at(node, 0)) is not None


Sibling = tuple[Node, Node | None]  # a weight's quantize node, and its input's


def quantized_siblings(program: Program) -> dict[tuple[Node, int | None, str], list[Sibling]]:
    """(input value, expert or None, format) -> (weight quantize, input quantize or None) of what reads it."""
    found: dict[tuple[Node, int | None, str], list[Sibling]] = {}
    for matmul in weight_matmuls(program.graph):
        w, x_quantize = strip(matmul.w, VIEWS), input_quantize(matmul.x)
        slices = nodes_at(w, 0) if w.target is dialect.STACK else [w]
        for expert, quantize in enumerate(slices):
            if is_rounding(quantize):
                among = expert if matmul.node.target is dialect.EXPERT_LINEAR else None
                key = (value_of(matmul.x), among, str(quantize.kwargs["format"]))
                found.setdefault(key, []).append((quantize, x_quantize))
    return found


def routed_inputs(program: Program) -> list[list[Node]]:
    """What rounds the inputs of experts that are linears of their own, those together that are of one layer
    and format and do the same."""
    found: dict[tuple[int, str], dict[Node, None]] = {}
    for number, experts in enumerate(expert_lists(program.graph, routed=True)):
        for matmul in experts:
            if (quantize := input_quantize(matmul.x)) is not None and is_rounding(strip(matmul.w, VIEWS)):
                found.setdefault((number, str(quantize.kwargs["format"])), {})[quantize] = None
    return [list(quantizes) for quantizes in found.values()]


def tensor_siblings(program: Program) -> dict[str, list[Sibling]]:
    """Tensor of the checkpoint -> the quantized weights that lie in it and so have one global scale: all
    experts of a fused tensor, linears whose rows it joins. An expert with a tensor of its own has none.

    A weight that layers share brings no input: theirs may depend on each other.
    """
    quantized = [sibling for siblings in quantized_siblings(program).values() for sibling in siblings]
    uses = Counter(quantize for quantize, _ in quantized)
    found: dict[str, list[Sibling]] = {}
    for quantize, x in quantized:
        stored = program.hub.names.get(parameter_name(quantize))
        for part in stored.parts if stored is not None and not stored.stacked else ():
            found.setdefault(part.keys[0], []).append((quantize, x if uses[quantize] == 1 else None))
    return found
