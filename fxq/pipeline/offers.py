"""Offers: the weights of a group, and what they multiply, in several formats of which one will be chosen.

%w_q : bf16[64,64] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='mse')   what an earlier pass made
%w_fp8 : bf16[64,64] = fxq.quantize(%w, %w_amax, format='fp8', scale='max')   its amax in another format
%w_choice : bf16[64,64] = fxq.choose([%w_q, %w_fp8, %w], %w_which)
"""

from collections.abc import Sequence

import torch
from torch.fx import Node

from fxq.errors import SpecError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.choices import Choice
from fxq.graph.places import named
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import WeightMatmul, input_quantize
from fxq.graph.structure.views import VIEWS, shape_of, strip
from fxq.numbers.formats import FORMATS
from fxq.pipeline.choosing import NONE, pair_of
from fxq.pipeline.format_groups import roundings


def offer(
    program: Program, group: Sequence[WeightMatmul], formats: Sequence[str], settled: str | None
) -> Choice:
    """Put an `fxq.choose` for each weight of a group and for each of its inputs, between those of the formats
    that can hold the weights, and the one that is settled. A group whose format has no amaxes, by which
    others could be scaled, keeps it: it is the source's own.

    Raises SpecError if the settled one cannot, or if one rounds inputs that no earlier pass rounds.
    """
    widths = [shape_of(rounding)[-1] for matmul in group for rounding in roundings(matmul)]
    asked = dict.fromkeys((*formats, *([settled] if settled is not None else [])))
    held = [f for f in asked if f == NONE or all(map(FORMATS[pair_of(f)[0]].holds, widths))]
    own = str(roundings(group[0])[0].kwargs["format"])
    if not FORMATS[own].has_amaxes:
        held = [own]
    names = ", ".join(dict.fromkeys(str(matmul.parameter.target) for matmul in group))
    if settled is not None and settled not in held:
        raise SpecError(
            f"choose-formats: {names} cannot be {settled}: rows of {min(widths)}, in {own}; there are "
            f"{', '.join(held)}"
        )
    inputs = dict.fromkeys(input_quantize(matmul.x) for matmul in group)
    rounding_inputs = [f for f in held if pair_of(f)[1] != NONE]
    if None in inputs and rounding_inputs:
        raise SpecError(
            f"choose-formats: the inputs of {names} are not rounded, so that there is no scale for "
            f"{rounding_inputs[0]}; expected quantize passes with inputs, beside which `nvfp4 weight-only` "
            "may be offered"
        )
    first = group[0].parameter
    which = edit.value(program.graph, f"{first.name}_which", torch.tensor(0))
    choice = _choice(which.name, group, tuple(held), settled, program)
    for w, parameter in {strip(matmul.w, VIEWS): matmul.parameter for matmul in group}.items():
        values = [_weight(w, pair_of(format)[0], parameter.name) for format in held]
        _replace(w, f"{parameter.name}_choice", values, which)
    for quantize in inputs:
        if quantize is not None:
            values = [_input(quantize, pair_of(format)[1]) for format in held]
            _replace(quantize, f"{quantize.name}_choice", values, which)
    return choice


def _choice(
    which: str, group: Sequence[WeightMatmul], formats: tuple[str, ...], settled: str | None, program: Program
) -> Choice:
    parameters = dict.fromkeys(matmul.parameter for matmul in group)
    weights = dict.fromkeys(rounding for matmul in group for rounding in roundings(matmul))
    numbers = sum(w.meta["val"].numel() for w in weights)
    work = sum(shape_of(roundings(m)[0])[0] * m.x.meta["val"].numel() for m in group)
    plain = 8 * next(iter(weights)).meta["val"].dtype.itemsize
    pairs = [pair_of(format) for format in formats]
    stored = (named(program.hub, str(p.target), shape_of(p)) for p in parameters)
    return Choice(
        which,
        tuple(str(p.target) for p in parameters),
        formats,
        tensors=sum(len(keys) for s in stored for keys in s.keys),
        numbers=numbers,
        work=work,
        bits=tuple(numbers * (FORMATS[w].bits if w in FORMATS else plain) for w, _ in pairs),
        operations=tuple(work * (FORMATS[x].operand_bits if x in FORMATS else plain) for _, x in pairs),
        fixed=settled,
    )


def _replace(old: Node, name: str, values: list[Node], which: Node) -> None:
    """Let what reads `old` read a choice between values."""
    chosen = edit.call(old.graph, name, dialect.CHOOSE, values, which)
    edit.replace(old, chosen, [user for user in old.users if user is not chosen])


def _weight(w: Node, format: str, name: str) -> Node:
    """A rounded weight, or a stack of such, in a format: itself, with its amaxes in another, or unrounded."""
    if w.target is not dialect.STACK:
        return _rounded(w, format)
    pieces = [_rounded(piece, format) for piece in nodes_at(w, 0)]
    if pieces == list(nodes_at(w, 0)):
        return w
    whole = {node_at(piece, 0) for piece in pieces if piece.target is dialect.SLICE}
    if len(whole) == 1 and [piece.args for piece in pieces] == [(*whole, e) for e in range(len(pieces))]:
        return whole.pop()
    return edit.call(w.graph, f"{name}_{format}", dialect.STACK, pieces)


def _rounded(rounding: Node, format: str) -> Node:
    if format == rounding.kwargs["format"]:
        return rounding
    before = node_at(rounding, 0)
    if format == NONE:
        return before
    return _in_format(rounding, format, FORMATS[format].scales[-1])  # the scale of least error


def _input(quantize: Node, format: str) -> Node:
    if format == quantize.kwargs["format"]:
        return quantize
    if format == NONE:
        return node_at(quantize, 0)
    return _in_format(quantize, format, FORMATS[format].input_scale)


def _in_format(quantize: Node, format: str, scale: str) -> Node:
    """What a node rounds, in another format, by its amax if the format has any."""
    before = node_at(quantize, 0)
    amax = node_at(quantize, 1) if FORMATS[format].has_amaxes else None
    return edit.quantize(before, f"{before.name}_{format}", format=format, scale=scale, amax=amax)
