"""The fxq dialect: the few operators that passes add to an aten graph, registered with torch.library.

Each has an eager implementation, so that every intermediate graph runs, and a shape rule, so that it verifies
without a dispatch. `store` operators exist only in the lowered checkpoint program, which a writer interprets.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxq.numbers import fp8, nvfp4
from fxq.trace import opaque_calls as leaves

FORMATS = ("nvfp4", "fp8")
SCALES = ("max", "mse", "dynamic", "static")
# How each format scales the input of a linear.
INPUT_SCALES = {"nvfp4": "dynamic", "fp8": "static"}

_LIB = torch.library.Library("fxq", "DEF")
_LIB.define("expert_linear(Tensor x, Tensor w, Tensor expert_ids) -> Tensor")
_LIB.define("slice(Tensor(a) w, int e) -> Tensor(a)")
_LIB.define("amax(Tensor t) -> Tensor")
_LIB.define("sync(Tensor[] amaxes) -> Tensor")
_LIB.define("quantize(Tensor t, Tensor amax, *, str format, str scale) -> Tensor")
_LIB.define("stack(Tensor[] slices) -> Tensor")
_LIB.define("value(str name) -> Tensor")
_LIB.define("load(str key, *, int[] shape, ScalarType dtype) -> Tensor")
_LIB.define("pack_nvfp4(Tensor w, Tensor amax, *, str scale) -> Tensor[]")
_LIB.define("pack_fp8(Tensor w, Tensor amax) -> Tensor[]")
_LIB.define("store_linear(str name, Tensor[] packed, Tensor? input_amax, *, int start, int end) -> ()")
_LIB.define(
    "store_rows(str key, Tensor[] packed, Tensor? input_amax, *, int start, int end, int[] rows, "
    "int[] shape, int expert, int experts, bool transposed) -> ()"
)
_LIB.define("store_kv(str attention, Tensor? k_amax, Tensor? v_amax, *, str format) -> ()")
_LIB.define("store(str key, Tensor t) -> ()")
_LIB.define("leaf(str function, Tensor[] tensors, SymInt[] sizes, *, str arguments) -> Tensor[]")


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


def _quantize(t: Tensor, amax: Tensor, *, format: str, scale: str) -> Tensor:
    """Fake-quantize: `t` rounded to what the format can hold given amax f32 [], same shape and dtype.

    nvfp4 weights ([out, in]) choose block scales once ("max" or "mse"); "dynamic" is what a kernel does to
    a linear's input. fp8 has one scale a tensor, amax / 448; that of a linear's input is called "static".
    """
    if format == "fp8":
        return fp8.fake_quantize(t, amax)
    if scale == "dynamic":
        return nvfp4.fake_quantize_activation(t, amax)
    return nvfp4.dequantize(nvfp4.quantize_weight(t, amax, scale)).to(t.dtype)


def _pack_nvfp4(w: Tensor, amax: Tensor, *, scale: str) -> list[Tensor]:
    packed = nvfp4.quantize_weight(w, amax, scale)
    return [packed.weight, packed.scale, packed.scale_2]


def _pack_fp8(w: Tensor, amax: Tensor) -> list[Tensor]:
    packed = fp8.quantize_weight(w, amax)
    return [packed.weight, packed.scale]


def _value(name: str) -> Tensor:
    raise RuntimeError(
        f"fxq.value({name!r}) is calibrated elsewhere: run the program with an interpreter that has values"
    )


def _load(key: str, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError(
        f"fxq.load({key!r}) has no tensor of its own: run the program with an interpreter that has a source"
    )


def _store(*args: object, **kwargs: object) -> None:
    """Nothing to do outside a writer."""


_EAGER: dict[str, Callable[..., object]] = {
    "expert_linear": _expert_linear,
    "slice": lambda w, e: w.select(0, e),
    "amax": lambda t: t.abs().amax().to(torch.float32),
    "sync": lambda amaxes: torch.stack(list(amaxes)).amax(0),
    "quantize": _quantize,
    "stack": lambda slices: torch.stack(list(slices)),
    "value": _value,
    "load": _load,
    "pack_nvfp4": _pack_nvfp4,
    "pack_fp8": _pack_fp8,
    "store_linear": _store,
    "store_rows": _store,
    "store_kv": _store,
    "store": _store,
    "leaf": lambda function, tensors, sizes, *, arguments: leaves.run(function, tensors, sizes, arguments),
}


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _scalar() -> Tensor:
    return _meta((), torch.float32)


SHAPES: dict[str, Callable[..., object]] = {
    "expert_linear": lambda x, w, expert_ids: _meta((x.shape[0], w.shape[1]), x.dtype),
    "slice": lambda w, e: _meta(w.shape[1:], w.dtype),
    "amax": lambda t: _scalar(),
    "sync": lambda amaxes: _scalar(),
    "quantize": lambda t, amax, *, format, scale: _meta(t.shape, t.dtype),
    "stack": lambda slices: _meta((len(slices), *slices[0].shape), slices[0].dtype),
    "value": lambda name: _scalar(),
    "load": lambda key, *, shape, dtype: _meta(shape, dtype),
    "pack_nvfp4": lambda w, amax, *, scale: [
        _meta((*w.shape[:-1], w.shape[-1] // 2), torch.uint8),
        _meta((*w.shape[:-1], w.shape[-1] // nvfp4.BLOCK), torch.float8_e4m3fn),
        _meta(w.shape[:-2], torch.float32),
    ],
    "pack_fp8": lambda w, amax: [_meta(w.shape, torch.float8_e4m3fn), _meta(w.shape[:-2], torch.float32)],
    "store_linear": lambda *args, **kwargs: None,
    "store_rows": lambda *args, **kwargs: None,
    "store_kv": lambda *args, **kwargs: None,
    "store": lambda *args, **kwargs: None,
    "leaf": lambda function, tensors, sizes, *, arguments: leaves.shapes(function, tensors, sizes, arguments),
}

for _name, _function in _EAGER.items():
    _LIB.impl(
        _name, _function, "BackendSelect" if _name in ("load", "value") else "CompositeExplicitAutograd"
    )
    if not _name.startswith(("store", "load", "value")):
        _LIB.impl(_name, SHAPES[_name], "Meta")

EXPERT_LINEAR = torch.ops.fxq.expert_linear.default
SLICE = torch.ops.fxq.slice.default
AMAX = torch.ops.fxq.amax.default
SYNC = torch.ops.fxq.sync.default
QUANTIZE = torch.ops.fxq.quantize.default
STACK = torch.ops.fxq.stack.default
VALUE = torch.ops.fxq.value.default
LOAD = torch.ops.fxq.load.default
PACK_NVFP4 = torch.ops.fxq.pack_nvfp4.default
PACK_FP8 = torch.ops.fxq.pack_fp8.default
PACKS = frozenset({PACK_NVFP4, PACK_FP8})
STORE_LINEAR = torch.ops.fxq.store_linear.default
# A weight that shares a tensor of the checkpoint with others: rows [start, end) of `packed` become rows
# range(*rows) of expert `expert` of the tensor `key`. That tensor has `shape` before packing, seen as
# [experts, out, in], or as [experts, in, out] if `transposed`; all that is stored into it has one amax.
STORE_ROWS = torch.ops.fxq.store_rows.default
STORE_KV = torch.ops.fxq.store_kv.default
STORE = torch.ops.fxq.store.default
LEAF = torch.ops.fxq.leaf.default
STORES = frozenset({STORE_LINEAR, STORE_ROWS, STORE_KV, STORE})
