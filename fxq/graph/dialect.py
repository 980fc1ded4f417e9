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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.hub import row_axis
from fxq.numbers.formats import FORMATS, Measured
from fxq.numbers.nvfp4 import BLOCK

# What must hold of a call (if it raises IndexError, TypeError or AttributeError it does not), and the words
# for its failing.
Rule = tuple[Callable[[Node], bool], str]


@dataclass(frozen=True)
class Operator:
    """What verifying, typing, tidying and running a graph need to know of a target; see `operator` and
    `rounding`."""

    schema: str
    run: Callable[..., Any]
    shape: Callable[..., object]
    rules: tuple[Rule, ...]
    fold: Callable[[Tensor, Tensor], Tensor] | None = None
    add: Callable[..., object] | None = None
    many: Callable[..., Any] | None = None
    pack: Callable[..., Measured] | None = None
    pack_target: Callable[..., Any] | None = None

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
    fold: Callable[[Tensor, Tensor], Tensor] | None = None,
    add: Callable[..., object] | None = None,
    many: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A new operator; what it returns is the `target` of its nodes, and can be called.

    schema: as torch.library has it, `name(Tensor t, int n) -> Tensor`, in torch's namespace `fxq` unless it
    begins with `another::`. Without a result, `-> ()`, it is kept in a graph for its effect.
    run: computes it from tensors; None for what a writer alone can do, which does nothing when run.
    shape: from the same arguments, tensors being on the meta device, the result's type (`tensor_type` makes
    one); None without a result.
    rules: what must hold of a call, besides the schema, in a graph that verifies.
    fold: makes it a statistic. Of activations its value is that of all calibration batches: what `run` gives
    for each, joined by `fold`, two at a time and in order. Of a weight it is what `run` gives.
    add: for a large statistic, called with what earlier batches gave, and the arguments of another: it adds
    that batch in place, so that there never are two.
    many: another operator, that computes n such calls at once: every tensor has n in front.
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
    _OPERATORS[target] = Operator(signature, run or _nothing, shape or _nothing, rules, fold, add, many)
    return target  # type: ignore[no-any-return]


def rounding(
    schema: str,
    *,
    pack: Callable[..., Measured],
    run: Callable[..., Tensor] | None = None,
    rules: tuple[Rule, ...] = (),
) -> Callable[..., Any]:
    """A new operator that stands for its first argument, a weight, rounded to a number format: what the
    checkpoint holds is what `pack` gives, to the bit, and what the graph computes is what that decodes to.

    schema: `name(Tensor t, Tensor amax, ..., *, str format, ...) -> Tensor`; what it returns has the shape
    and dtype of t, and an option `scale` is one of the format's. pack: from the same arguments, but for n
    weights at once, t [n, out, in], amax f32 [n] and every other tensor with n in front: those packed. run:
    what remains of one t, if there is a shorter way to it. rules: as for `operator`; that the format holds t
    is seen to. A lowered graph has `pack_name` in its place, with the same arguments, whose results are
    stored.
    """
    namespace, _, signature = schema.rpartition("::")
    name, _, arguments = signature.partition("(")
    prefix = f"{namespace}::" if namespace else ""
    all_rules = (_HAS_AMAX, *_FORMAT_RULES, *rules)

    def packed(t: Tensor, amax: Tensor, *others: Tensor, format: str, **options: Any) -> list[Tensor]:
        more = [other[None] if isinstance(other, Tensor) else other for other in others]
        made = pack(t[None], amax[None], *more, format=format, **options)
        own = FORMATS[format]
        return [part[0] for part in (*own.rows(made).values(), *own.scalars(made).values())]

    def rounded(t: Tensor, amax: Tensor, *others: Tensor, format: str, **options: Any) -> Tensor:
        more = [other[None] if isinstance(other, Tensor) else other for other in others]
        made = pack(t[None], amax[None], *more, format=format, **options)
        return straight_through(t, FORMATS[format].dequantize(made)[0].to(t.dtype))

    pack_name = "pack" if name == "quantize" else f"pack_{name}"
    pack_target = operator(
        f"{prefix}{pack_name}({arguments.rpartition('->')[0]}-> Tensor[]",
        run=packed,
        shape=lambda t, *rest, format, **options: [
            tensor_type(part.shape(tuple(t.shape)), part.dtype) for part in FORMATS[format].parts
        ],
        rules=all_rules,
    )
    target = operator(
        schema,
        run=run or rounded,
        shape=lambda t, *rest, **options: tensor_type(t.shape, t.dtype),
        rules=all_rules,
    )
    own = _OPERATORS[target]
    _OPERATORS[target] = replace(own, pack=pack, pack_target=pack_target)
    _OPERATORS[pack_target] = replace(_OPERATORS[pack_target], pack=pack)
    return target


def find(target: object) -> Operator | None:
    """The operator whose nodes have this target; None for torch's own and others'."""
    return _OPERATORS.get(target)


def function(target: object) -> Callable[..., Any]:
    """What computes a call: an operator's own `run`, through which gradients flow, or `target` itself."""
    known = _OPERATORS.get(target)
    return known.run if known else _WITH_GRADIENTS.get(target, cast(Callable[..., Any], target))


def _copy(t: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(t.dtype).expand_as(t).contiguous()


# What torch does not differentiate, and traces have, as it can be.
_WITH_GRADIENTS: dict[object, Callable[..., Any]] = {torch.ops.aten.copy.default: _copy}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(t: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `t`: a rounding counts as the identity (arXiv 1308.3432)."""
    if not torch.is_grad_enabled():
        return rounded
    return cast(Tensor, _StraightThrough.apply(t, rounded.detach()))  # type: ignore[no-untyped-call]


def is_rounding(node: Node) -> bool:
    """Whether a node stands for its first argument, rounded."""
    known = _OPERATORS.get(node.target)
    return known is not None and known.pack_target is not None


def is_statistic(node: Node) -> bool:
    """Whether a node is a statistic: of activations, what all calibration batches show of them."""
    known = _OPERATORS.get(node.target)
    return known is not None and known.fold is not None


def is_pack(node: Node) -> bool:
    """Whether a node packs a weight to be stored."""
    known = _OPERATORS.get(node.target)
    return known is not None and known.pack is not None and known.pack_target is None


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


def _is_by_expert(node: Node) -> bool:
    w, shape = node_at(node, 0), shape_at(node, 0) or ()
    return len(shape) >= 3 or (w.op == "call_function" and bool(shape) and not _is_weight(w))


def _is_weight(node: Node) -> bool:
    while (
        node.op == "call_function"
        and not is_statistic(node)
        and node.args
        and isinstance(node.args[0], (Node, list, tuple))
    ):
        node = nodes_at(node, 0)[0] if node.target in (STACK, CHOOSE) else node_at(node, 0)
    return node.op == "get_attr"


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
        (_is_by_expert, "expected a fused weight w [E, out, in], or a statistic or value [E, ...]"),
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
    return "scale" not in node.kwargs or node.kwargs["scale"] in (*format.scales, format.input_scale)


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


def _pack(t: Tensor, amax: Tensor, *, format: str, scale: str) -> Measured:
    return FORMATS[format].measured(t, amax, scale)


def _decided(
    t: Tensor, amax: Tensor, codes: Tensor, scales: Tensor | None = None, *, format: str
) -> Measured:
    return FORMATS[format].decided(t, amax, codes, scales)


def _amax(t: Tensor) -> Tensor:
    """float32 []: the largest magnitude, without a temporary of the size of t; -1 if t is empty, so that
    whatever a later batch shows is larger."""
    if not t.numel():
        return t.new_tensor(-1.0, dtype=torch.float32)
    low, high = torch.aminmax(t)
    return torch.maximum(high, -low).to(torch.float32)


def _first(amaxes: Sequence[Tensor]) -> Tensor:
    found = amaxes[-1]
    for amax in reversed(amaxes):
        found = torch.where(amax < 0, found, amax)  # what is NaN stays so, and is found
    return found


def _rows_of(x: Tensor) -> Tensor:
    return x.flatten(0, -2).to(torch.float32)


def _add_gram(total: Tensor, x: Tensor) -> None:
    rows = _rows_of(x)
    total.addmm_(rows.T, rows)


def _add_gram_blocks(total: Tensor, x: Tensor) -> None:
    blocks = _rows_of(x).unflatten(-1, (-1, BLOCK)).transpose(0, 1)
    total.baddbmm_(blocks.mT, blocks)


def _by_expert(x: Tensor, expert_ids: Tensor, experts: int) -> Iterator[Tensor]:
    """The rows of each expert, float32."""
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=experts)[:experts].tolist()
    yield from x[order[: sum(counts)]].to(torch.float32).split(counts)


def _add_expert_gram(total: Tensor, x: Tensor, expert_ids: Tensor, *, experts: int) -> None:
    for own, rows in zip(total, _by_expert(x, expert_ids, experts), strict=True):
        _add_gram(own, rows)


def _add_expert_gram_blocks(total: Tensor, x: Tensor, expert_ids: Tensor, *, experts: int) -> None:
    for own, rows in zip(total, _by_expert(x, expert_ids, experts), strict=True):
        _add_gram_blocks(own, rows)


def _halves(rows: Tensor) -> list[Tensor]:
    """The first three quarters of a batch's tokens, and the rest, which is held back."""
    return list(rows.tensor_split([-(-3 * len(rows) // 4)]))


def _add_split_gram(total: Tensor, x: Tensor, y: Tensor) -> None:
    for own, a, b in zip(total, _halves(_rows_of(x)), _halves(_rows_of(y)), strict=True):
        own.addmm_(a.T, b)


def _add_expert_split_gram(total: Tensor, x: Tensor, y: Tensor, expert_ids: Tensor, *, experts: int) -> None:
    of_x, of_y = _by_expert(x, expert_ids, experts), _by_expert(y, expert_ids, experts)
    for own, a, b in zip(total, of_x, of_y, strict=True):
        _add_split_gram(own, a, b)


def _expert_square_sum(x: Tensor, expert_ids: Tensor, *, experts: int) -> Tensor:
    return torch.stack([rows.square().sum(0) for rows in _by_expert(x, expert_ids, experts)])


def _vector(x: Tensor) -> Tensor:
    return tensor_type(x.shape[-1:], torch.float32)


def _gram_operator(
    schema: str, add: Callable[..., object], shape: Callable[..., tuple[int, ...]], rules: tuple[Rule, ...]
) -> Callable[..., Any]:
    """A statistic of so many float32 sums, to which `add` adds a batch's."""

    def run(x: Tensor, *args: Tensor, **options: int) -> Tensor:
        total = x.new_zeros(shape(x, *args, **options), dtype=torch.float32)
        add(total, x, *args, **options)
        return total

    return operator(
        schema,
        run=run,
        shape=lambda *args, **options: tensor_type(shape(*args, **options), torch.float32),
        rules=rules,
        fold=torch.add,
        add=add,
    )


_ROWS: Rule = (lambda n: len(shape_at(n, 0) or ()) >= 2, "expected rows x [..., K]")
_BLOCKS: Rule = (
    lambda n: (shape_at(n, 0) or (1,))[-1] % BLOCK == 0,
    f"expected rows of a multiple of {BLOCK}",
)
_IDS: Rule = (lambda n: len(shape_at(n, 1) or ()) == 1, "expected expert_ids, integers [T]")

# The largest magnitude of t, f32 []; -1 if no batch brought a value.
AMAX = operator("amax(Tensor t) -> Tensor", run=_amax, shape=_scalar, fold=torch.maximum)
# The largest of several amaxes: a group has one.
SYNC = operator(
    "sync(Tensor[] amaxes) -> Tensor",
    run=lambda amaxes: torch.stack(list(amaxes)).amax(0),
    shape=_scalar,
    rules=(
        (lambda n: bool(n.args[0]) and all(map(_is_amax, nodes_at(n, 0))), "expected amaxes, f32[] each"),
    ),
)
# The first amax that calibration data reached, else the last of them, which is a constant.
FIRST = operator(
    "first(Tensor[] amaxes) -> Tensor",
    run=_first,
    shape=_scalar,
    rules=(
        (lambda n: bool(n.args[0]) and all(map(_is_amax, nodes_at(n, 0))), "expected amaxes, f32[] each"),
    ),
)
# Statistics of rows x [..., K] over all tokens, float32: sum of x x^T [K, K]; its blocks of 16 on the
# diagonal [K / 16, 16, 16]; both for each expert over the tokens x [T, K] routed to it, [experts, ...]; the
# largest magnitude and the sum of squares of each column [K]; how many tokens each expert saw, int64
# [experts].
GRAM = _gram_operator("gram(Tensor x) -> Tensor", _add_gram, lambda x: (x.shape[-1], x.shape[-1]), (_ROWS,))
GRAM_BLOCKS = _gram_operator(
    "gram_blocks(Tensor x) -> Tensor",
    _add_gram_blocks,
    lambda x: (x.shape[-1] // BLOCK, BLOCK, BLOCK),
    (_ROWS, _BLOCKS),
)
EXPERT_GRAM = _gram_operator(
    "expert_gram(Tensor x, Tensor expert_ids, *, int experts) -> Tensor",
    _add_expert_gram,
    lambda x, ids, *, experts: (experts, x.shape[-1], x.shape[-1]),
    (_ROWS, _IDS),
)
EXPERT_GRAM_BLOCKS = _gram_operator(
    "expert_gram_blocks(Tensor x, Tensor expert_ids, *, int experts) -> Tensor",
    _add_expert_gram_blocks,
    lambda x, ids, *, experts: (experts, x.shape[-1] // BLOCK, BLOCK, BLOCK),
    (_ROWS, _BLOCKS, _IDS),
)
# The same of rows of two kinds, x [..., J] and y [..., K]: sum of x y^T over three of four tokens, and over
# the fourth, which is held back for judging: [2, J, K], and for each expert [experts, 2, J, K].
SPLIT_GRAM = _gram_operator(
    "split_gram(Tensor x, Tensor y) -> Tensor",
    _add_split_gram,
    lambda x, y: (2, x.shape[-1], y.shape[-1]),
    (_ROWS,),
)
EXPERT_SPLIT_GRAM = _gram_operator(
    "expert_split_gram(Tensor x, Tensor y, Tensor expert_ids, *, int experts) -> Tensor",
    _add_expert_split_gram,
    lambda x, y, ids, *, experts: (experts, 2, x.shape[-1], y.shape[-1]),
    (_ROWS,),
)
ABSMAX = operator(
    "absmax(Tensor x) -> Tensor",
    run=lambda x: _rows_of(x).abs().amax(0) if x.numel() else x.new_zeros(x.shape[-1], dtype=torch.float32),
    shape=_vector,
    rules=(_ROWS,),
    fold=torch.maximum,
)
SQUARE_SUM = operator(
    "square_sum(Tensor x) -> Tensor",
    run=lambda x: _rows_of(x).square().sum(0),
    shape=_vector,
    rules=(_ROWS,),
    fold=torch.add,
)
EXPERT_SQUARE_SUM = operator(
    "expert_square_sum(Tensor x, Tensor expert_ids, *, int experts) -> Tensor",
    run=_expert_square_sum,
    shape=lambda x, ids, *, experts: tensor_type((experts, x.shape[-1]), torch.float32),
    rules=(_ROWS, _IDS),
    fold=torch.add,
)
# How many rows x [..., K] has, int64 [].
TOKENS = operator(
    "tokens(Tensor x) -> Tensor",
    run=lambda x: x.new_tensor(x.shape[:-1].numel(), dtype=torch.int64),
    shape=lambda x: tensor_type((), torch.int64),
    fold=torch.add,
)
EXPERT_TOKENS = operator(
    "expert_tokens(Tensor expert_ids, *, int experts) -> Tensor",
    run=lambda ids, *, experts: torch.bincount(ids.flatten(), minlength=experts)[:experts],
    shape=lambda ids, *, experts: tensor_type((experts,), torch.int64),
    fold=torch.add,
)


# One of several values that stand for the same, by its place in the list: `which`, which data decides. All
# weights of a group, and all that they multiply, have one `which`.
CHOOSE = operator(
    "choose(Tensor[] values, Tensor which) -> Tensor",
    run=lambda values, which: values[int(which)],
    shape=lambda values, which: tensor_type(values[0].shape, values[0].dtype),
    rules=(
        (
            lambda n: len({(_shape(v), v.meta["val"].dtype) for v in nodes_at(n, 0)}) == 1,
            "expected values of one type",
        ),
        (lambda n: node_at(n, 1).meta["val"].dtype == torch.int64, "expected a place in the list, i64[]"),
        (lambda n: shape_at(n, 1) == (), "expected a place in the list, i64[]"),
    ),
)


# What t is in the model as it was, unrounded and not rewritten, for statistics that compare. With expert_ids,
# that tokens go to the experts to which they go now: t then is of the same tokens in the same rows.
ORIGINAL = operator(
    "original(Tensor(a) t, Tensor? expert_ids=None) -> Tensor(a)",
    run=lambda t, expert_ids=None: t,
    shape=lambda t, expert_ids=None: tensor_type(t.shape, t.dtype),
)


# Roundings, and weights that are not those of the source.


def _is_unrounded(node: Node) -> bool:
    w = node_at(node, 0)
    while w.op == "call_function" and w.args:
        if is_rounding(w):
            return False
        w = nodes_at(w, 0)[0] if w.target is STACK else node_at(w, 0)
    return True


# What remains of `t` in a format, given amax f32 []: its own shape and dtype, so that a graph with it
# simulates the deployed model. A weight's scales are chosen by one of the format's `scales`, those of a
# linear's input by its `input_scale`.
QUANTIZE = rounding(
    "quantize(Tensor t, Tensor amax, *, str format, str scale) -> Tensor",
    pack=_pack,
    run=lambda t, amax, *, format, scale: straight_through(
        t, FORMATS[format].fake_quantize(t.detach(), amax.detach(), scale)
    ),
)
# A weight as its codes and block scales say that a pass decided: each as `Format.parts` lists it, the scale
# of the tensor following from amax.
ROUNDED = rounding(
    "rounded(Tensor t, Tensor amax, Tensor codes, Tensor? scales=None, *, str format) -> Tensor",
    pack=_decided,
)
# The parts of a weight [out, in] in a format, as `Format.parts` lists them: of one that is rounded so, or so.
PACK = cast(Callable[..., Any], _OPERATORS[QUANTIZE].pack_target)
PACK_ROUNDED = cast(Callable[..., Any], _OPERATORS[ROUNDED].pack_target)
# A weight w, or a slice of one, for which the checkpoint holds `new`, of the same shape, in the dtype of w.
REWRITE = operator(
    "rewrite(Tensor w, Tensor new) -> Tensor",
    run=lambda w, new: new.to(w.dtype, copy=True),
    shape=lambda w, new: tensor_type(w.shape, w.dtype),
    rules=(
        (lambda n: shape_at(n, 0) == shape_at(n, 1), "a rewritten weight keeps its shape"),
        (
            _is_unrounded,
            "what is rounded already cannot be rewritten: expected a pass that rewrites to run before",
        ),
        (lambda n: node_at(n, 1).meta["val"].is_floating_point(), "expected a floating-point weight"),
    ),
)


# The checkpoint program: load, pack and store, which a writer interprets.


def _value(name: str, *, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    raise RuntimeError(
        f"fxq.value({name!r}) is calibrated elsewhere: run the program with an interpreter that has values"
    )


def _load(key: str, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError(
        f"fxq.load({key!r}) has no tensor of its own: run the program with an interpreter that has a source"
    )


def _join_rows(parts: Sequence[Tensor], *, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    out = parts[0].new_empty(list(shape))
    axis = row_axis(shape)
    for i, part in enumerate(parts):
        out[(slice(None),) * axis + (slice(*rows[3 * i : 3 * i + 3]),)] = part
    return out


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


# What calibration or a pass found, by name: a tensor of `Program.values`.
VALUE = operator(
    "value(str name, *, int[] shape=[], ScalarType dtype=float) -> Tensor",
    run=_value,
    shape=lambda name, *, shape=(), dtype=torch.float32: tensor_type(shape, dtype),
)
LOAD = operator(
    "load(str key, *, int[] shape, ScalarType dtype) -> Tensor",
    run=_load,
    shape=lambda key, *, shape, dtype: tensor_type(shape, dtype),
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
# A tensor of the checkpoint of which each part is rows: part i is range(*rows[3 * i : 3 * i + 3]) of it,
# along its second to last dimension, or its only one.
JOIN_ROWS = operator(
    "join_rows(Tensor[] parts, *, int[] rows, int[] shape) -> Tensor",
    run=_join_rows,
    shape=lambda parts, *, rows, shape: tensor_type(shape, parts[0].dtype),
    rules=(
        (
            lambda n: 3 * len(nodes_at(n, 0)) == len(_option(n, "rows")),
            "expected a start, an end and a step for each part",
        ),
    ),
)
