"""The fxq dialect: the few operators that passes add to an aten graph.

Each is made by `operator`, in one call that says all about it, and is from then on a target of nodes like
any of torch's: `SLICE(w, 3)` runs it, and graphs with it print, parse, verify and run. Another package makes
operators of its own in the same way:

    MEAN_SQUARE = operator(
        "acme::mean_square(Tensor t) -> Tensor",
        run=lambda t: t.float().square().mean(),
        shape=lambda t: tensor_type((), torch.float32),
        rules=((lambda node: shape_at(node, 0) != (), "expected a tensor of one dimension or more"),),
    )
    edit.call(graph, "w_mean_square", MEAN_SQUARE, w)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.numbers.formats import FORMATS

# What must hold of a call (if it raises IndexError, TypeError or AttributeError it does not), and the words
# for its failing.
Rule = tuple[Callable[[Node], bool], str]


@dataclass(frozen=True)
class Operator:
    """What verifying, typing and tidying a graph need to know of a target; see `operator`."""

    schema: str
    shape: Callable[..., object]
    rules: tuple[Rule, ...]

    @property
    def has_result(self) -> bool:
        """Whether it gives a value; a call without one is there for its effect, used or not."""
        return not self.schema.endswith("-> ()")


_OPERATORS: dict[object, Operator] = {}
_LIBRARIES: dict[str, torch.library.Library] = {}  # an operator lives as long as the library it is in


def operator(
    schema: str,
    *,
    run: Callable[..., object] | None = None,
    shape: Callable[..., object] | None = None,
    rules: tuple[Rule, ...] = (),
) -> Callable[..., Any]:
    """A new operator; what it returns is the `target` of its nodes, and can be called.

    schema: as torch.library has it, `name(Tensor t, int n) -> Tensor`, in torch's namespace `fxq` unless it
    begins with `another::`. Without a result, `-> ()`, it is kept in a graph for its effect.
    run: computes it from tensors; None for what a writer alone can do, which does nothing when run.
    shape: from the same arguments, tensors being on the meta device, the result's type (`tensor_type` makes
    one); None without a result.
    rules: what must hold of a call, besides the schema, in a graph that verifies.
    Raises RuntimeError, as torch does, for a name that is taken or a schema that cannot be read.
    """
    namespace, _, signature = schema.rpartition("::")
    namespace = namespace or "fxq"
    name, _, arguments = signature.partition("(")
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _LIBRARIES[namespace]
    library.define(signature)
    has_tensors = "Tensor" in arguments.partition("->")[0]
    # Without a tensor argument torch does not know whose implementation to take, and asks this key.
    library.impl(name, run or _nothing, "CompositeExplicitAutograd" if has_tensors else "BackendSelect")
    if shape is not None and has_tensors:
        library.impl(name, shape, "Meta")
    target = getattr(getattr(torch.ops, namespace), name).default
    _OPERATORS[target] = Operator(signature, shape or _nothing, rules)
    return target  # type: ignore[no-any-return]


def find(target: object) -> Operator | None:
    """The operator whose nodes have this target; None for torch's own and others'."""
    return _OPERATORS.get(target)


def _nothing(*args: object, **kwargs: object) -> None:
    """What a call for its effect gives outside of a writer."""


def tensor_type(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor type, as shape rules give it."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _scalar(*args: object, **kwargs: object) -> Tensor:
    return tensor_type((), torch.float32)


def shape_at(node: Node, position: int) -> tuple[int, ...] | None:
    """The shape of the tensor that stands at `position`; None if there is none."""
    return _shape(node.args[position])


def _shape(value: object) -> tuple[int, ...] | None:
    val = value.meta.get("val") if isinstance(value, Node) else None
    return tuple(val.shape) if isinstance(val, Tensor) else None


def _rank(position: int, rank: int) -> Callable[[Node], bool]:
    return lambda node: len(shape_at(node, position) or ()) == rank


def _is_amax(value: object) -> bool:
    val = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(val, Tensor) and val.dtype == torch.float32 and val.shape == ()


_HAS_AMAX: Rule = (lambda node: _is_amax(node.args[1]), "expected an amax of type f32[]")


# Experts: what `index > bmm` or `_grouped_mm` computes over a fused weight, one expert of it, and it again.


def _expert_linear(x: Tensor, w: Tensor, expert_ids: Tensor) -> Tensor:
    """y[t] = w[expert_ids[t]] @ x[t] for x [T, in], w [E, out, in], expert_ids int [T] >= 0: tokens
    sorted by expert, one matmul an expert that has tokens; a weight is never gathered per token. An id
    >= E (no expert) gives zeros."""
    out = x.new_zeros(x.shape[0], w.shape[1])
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=w.shape[0])[: w.shape[0]].tolist()
    spare = _rounded(max(counts, default=0))
    sorted_x, start = x[torch.cat([order, order.new_zeros(spare)])], 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            padded = sorted_x[start : start + _rounded(count)]
            out[rows] = torch.nn.functional.linear(padded, w[expert])[:count]
            start += count
    return out


def _rounded(count: int) -> int:
    """The next of 4 sizes an octave: a matmul library compiles and keeps code for every size it meets."""
    step = max(16, 1 << max(count.bit_length() - 3, 0))
    return -(-count // step) * step


def _is_index(node: Node) -> bool:
    val = node_at(node, 2).meta["val"]
    return len(val.shape) == 1 and val.dtype in (torch.int32, torch.int64)


def _same_shapes(node: Node) -> bool:
    slices = node.args[0]
    return isinstance(slices, (list, tuple)) and len({_shape(s) for s in slices}) == 1


EXPERT_LINEAR = operator(
    "expert_linear(Tensor x, Tensor w, Tensor expert_ids) -> Tensor",
    run=_expert_linear,
    shape=lambda x, w, expert_ids: tensor_type((x.shape[0], w.shape[1]), x.dtype),
    rules=(
        (_rank(0, 2), "expected tokens x [T, in]"),
        (_rank(1, 3), "expected a fused weight w [E, out, in]"),
        (_is_index, "expected expert_ids, integers [T]"),
        (
            lambda n: (shape_at(n, 0) or (0, -1))[1] == (shape_at(n, 1) or (0, 0, 0))[2],
            "x and w disagree on `in`",
        ),
    ),
)
SLICE = operator(
    "slice(Tensor(a) w, int e) -> Tensor(a)",
    run=lambda w, e: w.select(0, e),
    shape=lambda w, e: tensor_type(w.shape[1:], w.dtype),
    rules=(
        (_rank(0, 3), "expected a fused weight w [E, out, in]"),
        (lambda n: 0 <= int_at(n, 1) < (shape_at(n, 0) or (0,))[0], "the expert index is out of range"),
    ),
)
STACK = operator(
    "stack(Tensor[] slices) -> Tensor",
    run=lambda slices: torch.stack(list(slices)),
    shape=lambda slices: tensor_type((len(slices), *slices[0].shape), slices[0].dtype),
    rules=((_same_shapes, "the slices differ in shape"),),
)


# Statistics, and the rounding that they scale.


def _format_is_known(node: Node) -> bool:
    return node.kwargs.get("format") in FORMATS


def _scale_is_known(node: Node) -> bool:
    format = FORMATS[str(node.kwargs.get("format"))]
    return node.kwargs.get("scale") in (*format.scales, format.input_scale)


def _has_whole_blocks(name: str) -> Rule:
    format = FORMATS[name]
    return (
        lambda n: n.kwargs.get("format") != name or format.holds((shape_at(n, 0) or (1,))[-1]),
        f"{name} needs a last dimension that is a multiple of {format.block}",
    )


_FORMAT_RULES: tuple[Rule, ...] = (
    (_format_is_known, f"format is one of {', '.join(FORMATS)}"),
    (
        _scale_is_known,
        "scale is one of "
        + "; of ".join(f"{', '.join((*f.scales, f.input_scale))} for {f.name}" for f in FORMATS.values()),
    ),
    *(_has_whole_blocks(format.name) for format in FORMATS.values() if format.block is not None),
)


def _pack_shape(w: Tensor, amax: Tensor, *, format: str, scale: str) -> list[Tensor]:
    return [tensor_type(part.shape(tuple(w.shape)), part.dtype) for part in FORMATS[format].parts]


def _pack(w: Tensor, amax: Tensor, *, format: str, scale: str) -> list[Tensor]:
    packed = FORMATS[format].quantize(w, amax, scale)
    return [*FORMATS[format].rows(packed).values(), *FORMATS[format].scalars(packed).values()]


AMAX = operator("amax(Tensor t) -> Tensor", run=lambda t: t.abs().amax().to(torch.float32), shape=_scalar)
SYNC = operator(
    "sync(Tensor[] amaxes) -> Tensor",
    run=lambda amaxes: torch.stack(list(amaxes)).amax(0),
    shape=_scalar,
    rules=(
        (lambda n: bool(n.args[0]) and all(map(_is_amax, nodes_at(n, 0))), "expected amaxes, f32[] each"),
    ),
)
# What remains of `t` in a format, given amax f32 []: its own shape and dtype, so that a graph with it
# simulates the deployed model. A weight's scales are chosen by one of the format's `scales`, those of a
# linear's input by its `input_scale`.
QUANTIZE = operator(
    "quantize(Tensor t, Tensor amax, *, str format, str scale) -> Tensor",
    run=lambda t, amax, *, format, scale: FORMATS[format].fake_quantize(t, amax, scale),
    shape=lambda t, amax, *, format, scale: tensor_type(t.shape, t.dtype),
    rules=(_HAS_AMAX, *_FORMAT_RULES),
)


# The checkpoint program: load, pack and store, which a writer interprets.


def _value(name: str) -> Tensor:
    raise RuntimeError(
        f"fxq.value({name!r}) is calibrated elsewhere: run the program with an interpreter that has values"
    )


def _load(key: str, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError(
        f"fxq.load({key!r}) has no tensor of its own: run the program with an interpreter that has a source"
    )


def _option(node: Node, name: str) -> Any:
    return node.kwargs[name]


def _fits_tensor(node: Node) -> bool:
    """Whether rows [start, end) of a packed weight fit range(*rows) of one expert of the stored tensor."""
    *tall, width = _option(node, "shape")
    experts = _option(node, "experts")
    sizes = [math.prod(tall) // experts, width]
    out, columns = reversed(sizes) if _option(node, "transposed") else sizes
    rows, inputs = node_at(node_at(node, 1), 0).meta["val"].shape
    fits = columns == inputs and range(*_option(node, "rows"))[-1] < out
    return bool(fits and _option(node, "end") <= rows and math.prod(tall) % experts == 0)


VALUE = operator("value(str name) -> Tensor", run=_value, shape=_scalar)
LOAD = operator(
    "load(str key, *, int[] shape, ScalarType dtype) -> Tensor",
    run=_load,
    shape=lambda key, *, shape, dtype: tensor_type(shape, dtype),
)
# The parts of a weight [out, in] in a format, as `Format.parts` lists them.
PACK = operator(
    "pack(Tensor w, Tensor amax, *, str format, str scale) -> Tensor[]",
    run=_pack,
    shape=_pack_shape,
    rules=(_HAS_AMAX, *_FORMAT_RULES),
)
STORE_LINEAR = operator(
    "store_linear(str name, Tensor[] packed, Tensor? input_amax, *, int start, int end) -> ()"
)
# A weight that shares a tensor of the checkpoint with others: rows [start, end) of `packed` become rows
# range(*rows) of expert `expert` of the tensor `key`. That tensor has `shape` before packing, seen as
# [experts, out, in], or as [experts, in, out] if `transposed`; all that is stored into it has one amax.
STORE_ROWS = operator(
    "store_rows(str key, Tensor[] packed, Tensor? input_amax, *, int start, int end, int[] rows, "
    "int[] shape, int expert, int experts, bool transposed) -> ()",
    rules=(
        (lambda n: 0 <= _option(n, "expert") < _option(n, "experts"), "the expert index is out of range"),
        (
            lambda n: len(range(*_option(n, "rows"))) == _option(n, "end") - _option(n, "start"),
            "expected as many rows of the tensor as of the weight",
        ),
        (_fits_tensor, "the rows lie outside of the tensor"),
    ),
)
STORE_KV = operator("store_kv(str attention, Tensor? k_amax, Tensor? v_amax, *, str format) -> ()")
STORE = operator("store(str key, Tensor t) -> ()")
