"""Tensors of every quantized linear: all there, of the right dtype and shape, with scales (`weight_scale`,
`weight_scale_2`, `input_scale`, whatever their names are in the checkpoint) that are positive and finite."""

import math
from collections.abc import Iterator
from statistics import median

import numpy as np

from fxq.audit import decoding
from fxq.audit.checkpoint import COMPRESSED, Checkpoint, Kind, Linear, packed_axis
from fxq.audit.findings import Finding
from fxq.audit.store import FLOATS, Entry

# Beyond what a good search gives: the max recipe puts 1 code in 16 at the top, heavy tails fewer.
SATURATED = 0.5
# Blocks from which on a common value of all their scales says something.
MANY = 64
# A global scale is amax / 2688, its inverse 2688 / amax: they meet at 1 for an amax of 2688.
TURNING_POINT = 2688
# The largest float16: beyond it lies no massive activation, which trained models have here and there.
ORDINARY = 65504
# Rows and columns of a block of FP8.
BLOCK = 128
# MLA's expansion of the cached latent, by the name that engines look for.
ABSORBED = "kv_b_proj"
# Algorithm -> whether its inputs have a stored scale; engines find that of the others while serving.
_INPUTS = {
    "NVFP4": True,
    "FP8": True,
    "NVFP4_AWQ": True,
    "W4A16_NVFP4": False,
    "FP8_PER_CHANNEL_PER_TOKEN": False,
    "FP8_PB_WO": False,
    "FP8_BLOCK_SCALES": False,
    "MXFP8": False,
}
# Under amax / 2688 the largest block scale of a group is 448, or a few steps less if it was searched for. So
# far below it small blocks lose their precision.
_LOW = 8.0


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Each quantized linear, and tensors that look quantized but belong to none."""
    if not checkpoint.linears:
        yield Finding(
            "none-quantized", str(checkpoint.store.path.name), "expected quantized linears, found none"
        )
    tops: dict[float, tuple[float, str]] = {}
    for linear in checkpoint.linears.values():
        yield from _FORMS[linear.kind](checkpoint, linear)
        _note_top(checkpoint, linear, tops)
        yield from _extras(checkpoint, linear)
        if linear.name.rpartition(".")[2] == ABSORBED and linear.parts["input"] in checkpoint.store.entries:
            yield Finding("latent-quantized", linear.name, f"{linear.kind} with a quantized input")
    for value, (top, name) in tops.items():
        if 0 < top <= _LOW:
            found = f"the largest block scale under a global scale of {value:g} is {top:g}"
            yield Finding("scale-range", name, f"expected about 448, {found}")
    for role in ("global", "input"):
        yield from _conventions(checkpoint, role)
    yield from _unknown(checkpoint)


def _note_top(checkpoint: Checkpoint, linear: Linear, tops: dict[float, tuple[float, str]]) -> None:
    """Add the largest block scale of a linear to those that have its global scale: siblings, most often."""
    store, name = checkpoint.store, linear.parts["scale"]
    value = store.scalar(linear.parts["global"]) if linear.kind is Kind.NVFP4 else None
    entry = store.entries.get(name)
    if value is None or entry is None or entry.dtype != "F8_E4M3" or not entry.size:
        return
    largest = max(int(store.raw(name, *rows).max()) for rows in store.chunks(name))
    top = float(decoding.E4M3[min(largest, 0x7E)])
    if top > tops.get(value, (0.0, ""))[0]:
        tops[value] = (top, name)


def _nvfp4(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    entries, parts = checkpoint.store.entries, linear.parts
    weight, scale = entries.get(parts["weight"]), entries.get(parts["scale"])
    yield from _missing(linear, checkpoint, ("weight", "scale", "global"))
    yield from _scalar(checkpoint, linear, "global")
    yield from _input(checkpoint, linear)
    wrong = list(_typed(parts["weight"], weight, "U8")) + list(_typed(parts["scale"], scale, "F8_E4M3"))
    yield from wrong
    if weight is None or wrong:
        return
    yield from _shapes(checkpoint, linear, weight, scale)
    if scale is not None:
        yield from _values(checkpoint, linear)


def _shapes(checkpoint: Checkpoint, linear: Linear, weight: Entry, scale: Entry | None) -> Iterator[Finding]:
    name = linear.parts["weight"]
    if len(weight.shape) not in (2, 3) or weight.size == 0:
        yield Finding("tensor-shape", name, f"expected [N, K/2] or stacked experts, found {weight}")
        return
    axis = packed_axis(weight, scale) if scale is not None else -1
    if axis is None:
        expected = [*weight.shape[:-1], weight.shape[-1] // 8]
        whole = weight.shape[-1] % 8 == 0
        wanted = f"expected {expected}" if whole else f"K = {2 * weight.shape[-1]} is no multiple of 16"
        yield Finding(
            "tensor-shape",
            linear.parts["scale"],
            f"{wanted} for packed weights {list(weight.shape)}, found {scale}",
        )
    elif weight.shape[axis] % 8:
        yield Finding("tensor-shape", name, f"K = {2 * weight.shape[axis]} is no multiple of 16")
    bias = checkpoint.store.entries.get(f"{linear.name}.bias")
    if bias is not None and len(weight.shape) == 2 and bias.shape != weight.shape[:1] and not linear.fused:
        yield Finding("tensor-shape", f"{linear.name}.bias", f"expected [{weight.shape[0]}], found {bias}")


def _values(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """One read of the block scales, and of the packed codes."""
    store, name = checkpoint.store, linear.parts["scale"]
    histogram = np.zeros(256, dtype=np.int64)
    for start, stop in store.chunks(name):
        histogram += np.bincount(store.raw(name, start, stop).ravel(), minlength=256)
    kinds = {
        "zero": histogram[0] + histogram[128],
        "NaN": histogram[127] + histogram[255],
        "negative": histogram[129:255].sum(),
    }
    if bad := [f"{int(count)} {kind}" for kind, count in kinds.items() if count]:
        yield Finding("scale-value", name, f"expected positive finite scales, found {', '.join(bad)}")
    elif histogram.sum() >= MANY and histogram[0x7E] == histogram.sum():
        yield Finding("scales-saturated", name, f"all {histogram.sum()} block scales are 448")
    weight = store.entries[linear.parts["weight"]]
    top, any_set = 0, False
    for start, stop in store.chunks(linear.parts["weight"]):
        packed = store.raw(linear.parts["weight"], start, stop)
        top += decoding.saturated(packed)
        any_set = any_set or bool((packed & 0x77).any())
    if not any_set:
        yield Finding("weights-zero", linear.parts["weight"], f"all {2 * weight.size} codes are zero")
    elif top > SATURATED * 2 * weight.size and weight.size >= MANY * decoding.BLOCK:
        share = top / (2 * weight.size)
        yield Finding("codes-saturated", linear.parts["weight"], f"{share:.0%} of the codes are 6 or -6")


def _fp8(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """W8A8: one float scale a tensor, or one an output row."""
    store, parts = checkpoint.store, linear.parts
    yield from _missing(linear, checkpoint, ("weight", "scale"))
    weight, scale = store.entries.get(parts["weight"]), store.entries.get(parts["scale"])
    if weight is None or scale is None:
        return
    rows = weight.shape[0] if weight.shape else 0
    if scale.dtype not in FLOATS:
        yield Finding("tensor-dtype", parts["scale"], f"expected a float, found {scale}")
    elif scale.shape not in ((), (1,), (rows,), (rows, 1)):
        yield Finding("tensor-shape", parts["scale"], f"expected [] or [{rows}], found {scale}")
    else:
        yield from _positive(checkpoint, parts["scale"])
    dynamic = checkpoint.declared.format == COMPRESSED or scale.size > 1
    if parts["input"] in store.entries or not dynamic:
        yield from _input(checkpoint, linear)
    yield from _finite_codes(checkpoint, linear)


def _finite_codes(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    store, name = checkpoint.store, linear.parts["weight"]
    for start, stop in store.chunks(name):
        if bool((store.raw(name, start, stop) & 0x7F == 0x7F).any()):
            yield Finding("scale-value", name, "expected finite FP8 weights, found NaN")
            return


def _fp8_blocks(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """A float32 scale for 128 x 128; vLLM and SGLang find those of the inputs."""
    store, scale = checkpoint.store, checkpoint.store.entries[linear.parts["scale"]]
    weight = store.entries[linear.parts["weight"]]
    yield from _typed(linear.parts["scale"], scale, "F32")
    if len(weight.shape) not in (2, 3):
        yield Finding("tensor-shape", linear.parts["weight"], f"expected a matrix, found {weight}")
        return
    *lead, rows, columns = weight.shape
    grid = [*lead, -(-rows // BLOCK), -(-columns // BLOCK)]
    if linear.parts["scale"].endswith(".weight_scale") and checkpoint.declared.format != COMPRESSED:
        grid = [grid[0], 1, grid[1], 1] if not lead else grid  # as vLLM's parameter is
    if columns % BLOCK:
        yield Finding("tensor-shape", linear.parts["weight"], f"K = {columns} is no multiple of {BLOCK}")
    elif list(scale.shape) != grid:
        yield Finding("tensor-shape", linear.parts["scale"], f"expected {grid} for {weight}, found {scale}")
    elif scale.dtype in FLOATS:
        yield from _positive(checkpoint, linear.parts["scale"])
    yield from _input(checkpoint, linear)
    yield from _finite_codes(checkpoint, linear)


def _mxfp8(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """A power of two in a byte for 32 numbers of a row."""
    store, name = checkpoint.store, linear.parts["scale"]
    weight, scale = store.entries[linear.parts["weight"]], store.entries[name]
    expected = [*weight.shape[:-1], weight.shape[-1] // 32] if weight.shape else []
    if not expected or weight.shape[-1] % 32:
        yield Finding("tensor-shape", linear.parts["weight"], f"K is no multiple of 32: {weight}")
    elif list(scale.shape) != expected:
        yield Finding("tensor-shape", name, f"expected {expected} for {weight}, found {scale}")
    for start, stop in store.chunks(name):
        if bool((store.raw(name, start, stop) == 255).any()):
            yield Finding("scale-value", name, "expected powers of two, found NaN")
            break
    yield from _input(checkpoint, linear)
    yield from _finite_codes(checkpoint, linear)


def _missing(linear: Linear, checkpoint: Checkpoint, roles: tuple[str, ...]) -> Iterator[Finding]:
    for role in roles:
        if linear.parts[role] not in checkpoint.store.entries:
            yield Finding(
                "part-missing", linear.parts[role], f"expected with a {linear.kind} linear, found none"
            )


def _input(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """The scale of the input: there if the declared algorithm quantizes inputs, else not."""
    name, algorithm = linear.parts["input"], checkpoint.declared.algorithm_of(linear)
    wanted = _INPUTS.get(algorithm or "")
    there = name in checkpoint.store.entries
    if checkpoint.declared.format == COMPRESSED and algorithm == "MIXED_PRECISION":
        wanted = None
    if wanted is True and not there:
        yield Finding("input-scale-missing", name, f"expected with {algorithm}, found none")
    elif wanted is False and there:
        yield Finding("part-extra", name, f"expected none with {algorithm}, found one")
    elif there:
        yield from _scalar(checkpoint, linear, "input")


def _scalar(checkpoint: Checkpoint, linear: Linear, role: str) -> Iterator[Finding]:
    """F32, one element, positive and finite."""
    store, name = checkpoint.store, linear.parts[role]
    entry = store.entries.get(name)
    if entry is None:
        return
    if entry.dtype != "F32":
        yield Finding("tensor-dtype", name, f"expected F32, found {entry}")
        return
    if entry.shape not in ((), (1,)):
        yield Finding("tensor-shape", name, f"expected one element, found {entry}")
        return
    yield from _positive(checkpoint, name)


def _conventions(checkpoint: Checkpoint, role: str) -> Iterator[Finding]:
    """Whether the global scales of a role are the multipliers or divisors that the format wants: the median
    tells, as a trained model has massive activations whose scales alone look like inverses."""
    divisor = checkpoint.declared.format == COMPRESSED
    amaxes: dict[str, float] = {}
    for linear in checkpoint.linears.values():
        name = linear.parts.get(role, "")
        entry = checkpoint.store.entries.get(name)
        if linear.kind is not Kind.NVFP4 or entry is None or (entry.dtype, entry.size) != ("F32", 1):
            continue
        value = checkpoint.store.scalar(name) or math.nan
        if math.isfinite(value) and value > 0:
            amaxes[name] = 2688 / value if divisor else 2688 * value
    if not amaxes:
        return
    typical = median(amaxes.values())
    ordinary = TURNING_POINT if role == "global" or typical > TURNING_POINT else ORDINARY
    what = "a divisor" if divisor else "a multiplier"
    for name, amax in amaxes.items():
        if amax > ordinary:
            yield Finding(
                "scale-reciprocal",
                name,
                f"expected {what}; found an amax of {amax:g}, the median of its kind is {typical:g}",
            )
        elif amax > TURNING_POINT:
            yield Finding("input-outlier", name, f"an amax of {amax:g}, the median is {typical:g}")


def _positive(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    values = checkpoint.store.values(name).ravel()
    if not bool((np.isfinite(values) & (values > 0)).all()):
        yield Finding("scale-value", name, f"expected positive finite values, found {values[:4].tolist()}")


def _typed(name: str, entry: Entry | None, dtype: str) -> Iterator[Finding]:
    if entry is not None and entry.dtype != dtype:
        yield Finding("tensor-dtype", name, f"expected {dtype}, found {entry}")


def _extras(checkpoint: Checkpoint, linear: Linear) -> Iterator[Finding]:
    """Scales of other schemes beside a quantized linear's own."""
    others = ["pre_quant_scale", "weight_scale_inv", "weight_zero_point", "input_zero_point"]
    if linear.parts["weight"].endswith("weight_packed"):
        others += ["weight", "weight_scale_2", "input_scale"]
    for suffix in others if linear.kind is Kind.NVFP4 else ():
        name = f"{linear.name}.{suffix}"
        awq = suffix == "pre_quant_scale" and checkpoint.declared.algorithm == "NVFP4_AWQ"
        if name in checkpoint.store.entries and not awq and not linear.fused:
            yield Finding("part-extra", name, f"no part of an NVFP4 linear of {checkpoint.declared.format}")


def _unknown(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Packed or scaled data outside any quantized linear."""
    parts, entries = checkpoint.parts, checkpoint.store.entries
    for name, entry in entries.items():
        if name in parts:
            continue
        module, _, suffix = name.rpartition(".")
        if (
            suffix in ("input_scale", "weight_scale", "input_global_scale")
            and module not in checkpoint.linears
        ):
            yield Finding("part-extra", name, "belongs to no quantized linear")
        elif entry.dtype == "F8_E4M3" and f"{name}_scale_inv" in entries:
            yield Finding("fp8-leftover", name, f"found {entry} with weight_scale_inv")
        elif entry.dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8") and suffix not in _NAMED_ELSEWHERE:
            yield Finding("tensor-unknown", name, f"found {entry}, and no scales that go with it")


_NAMED_ELSEWHERE = ("weight_scale_2", "weight_global_scale", "weight_zero_point", "input_zero_point")
_FORMS = {
    Kind.NVFP4: _nvfp4,
    Kind.FP8: _fp8,
    Kind.FP8_ROWS: _fp8,
    Kind.FP8_BLOCKS: _fp8_blocks,
    Kind.MXFP8: _mxfp8,
}
