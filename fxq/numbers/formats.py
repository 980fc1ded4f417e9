"""Number formats as values: all that graphs, passes and checkpoints ask of NVFP4 and FP8 is a field of them.

A new format is one more `Format` in `FORMATS` and the functions it names. Passes, verify rules, the JSON
schema of specs and the plan of a checkpoint follow; its names on disk stand in `fxq.checkpoint.formats`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.numbers import fp8, fp8_blocks, nvfp4

# Without any data an input amax of 448 puts the FP8 block scales mid-range: blocks up to 448 do not clip,
# blocks down to 0.016 keep full precision.
UNSEEN_INPUT_AMAX = 448.0


class Packed(Protocol):
    """A quantized weight, or many of one shape; each part of its format (`Format.parts`) is an attribute."""

    @property
    def weight(self) -> Tensor:
        """The codes, [..., rows, K / codes a byte]."""
        ...

    @property
    def scale(self) -> Tensor:
        """The block scales [..., rows, K / block], or where there are none the tensor's scale [...]."""
        ...

    def part(self, index: int, rows: slice) -> "Packed":
        """Some rows of one of the weights."""
        ...


class Measured(Packed, Protocol):
    """A quantized weight and what it lost: sum (w - w')**2 and sum w**2 over the last two dimensions,
    float64 [...]."""

    @property
    def error(self) -> Tensor: ...

    @property
    def energy(self) -> Tensor: ...


class Part(NamedTuple):
    """One tensor of a packed weight [..., rows, K]: [..., rows / tall, K / per], rounded up, or a number a
    tensor, [...], if `per` is None."""

    name: str
    dtype: torch.dtype
    per: int | None
    tall: int = 1

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape for weights of the given shape."""
        if self.per is None:
            return weight[:-2]
        *lead, rows, width = weight
        return (*lead, -(-rows // self.tall), -(-width // self.per))


@dataclass(frozen=True)
class Format:
    """A number format.

    name: how specs and graphs spell it. title: how messages do.
    parts: what a packed weight consists of: its codes, block scales if any, the scale of the tensor.
    block: how many weights along a row share a scale; None if a tensor has one scale alone.
    scales: how a weight's scales can be chosen, as `fxq.quantize` spells it; the last is of least error.
    inputs: what engines multiply such weights with: formats, and `none` for inputs as they are.
    input_scale: how the input of a linear is scaled, as `fxq.quantize` spells it.
    has_amaxes: whether a weight, and an input, has a scale that follows from its amax.
    caches: whether engines hold keys and values in it.
    magnitude: the bits of a byte of codes but their signs: all zero where codes stand for zeros.
    largest: the magnitude that a packed weight reaches if the scale of its tensor is 1.
    scale_of: amax f32 [...] -> the scale of a tensor, f32 [...]: `amax / largest`, rounded as the tools of
    engines do, and never zero.
    quantize, measured: (weights [..., rows, K], amax f32 [...], one of `scales`) -> Packed, Measured; they
    raise SourceError if a weight or an amax is infinite or NaN.
    decided: (weights, amax f32 [...], codes and block scales as `parts` lists them) -> Measured: the weights
    as codes that were decided elsewhere.
    dequantize: Packed -> f32 [..., rows, K].
    fake_quantize: (values, amax f32 [], one of `scales` or `input_scale`) -> what remains of them, same shape
    and dtype.
    reach: (block maxima f32 [n, blocks], tensor scales f32 [n]) -> the block scales that reach them, of the
    dtype of `Packed.scale`, whose bytes are in the order of their values; None without blocks, or without
    amaxes.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    block: int | None
    scales: tuple[str, ...]
    inputs: tuple[str, ...]
    input_scale: str
    caches: bool
    magnitude: int
    largest: float
    scale_of: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor, Tensor, str], Packed]
    measured: Callable[[Tensor, Tensor, str], Measured]
    decided: Callable[[Tensor, Tensor, Tensor, Tensor | None], Measured]
    dequantize: Callable[..., Tensor]
    fake_quantize: Callable[[Tensor, Tensor, str], Tensor]
    reach: Callable[[Tensor, Tensor], Tensor] | None = None
    has_amaxes: bool = True

    @property
    def bits(self) -> float:
        """The bits that a weight takes, its share of a block's scale included."""
        held = ((p.dtype.itemsize, p.per * p.tall) for p in self.parts if p.per is not None)
        return sum(8 * itemsize / numbers for itemsize, numbers in held)

    @property
    def operand_bits(self) -> float:
        """The bits of a number that is multiplied."""
        codes = self.parts[0]
        return 8 * codes.dtype.itemsize / (codes.per or 1)

    def rows(self, packed: Packed) -> dict[str, Tensor]:
        """The parts of a packed weight that have its rows, by name: codes and block scales."""
        return {p.name: getattr(packed, p.name) for p in self.parts if p.per is not None}

    def scalars(self, packed: Packed) -> dict[str, Tensor]:
        """The parts that are a number a tensor, by name."""
        return {p.name: getattr(packed, p.name) for p in self.parts if p.per is None}

    def holds(self, width: int) -> bool:
        """Whether rows of so many weights are whole blocks."""
        return self.block is None or width % self.block == 0


NVFP4 = Format(
    name="nvfp4",
    title="NVFP4",
    parts=(
        Part("weight", torch.uint8, 2),
        Part("scale", torch.float8_e4m3fn, nvfp4.BLOCK),
        Part("scale_2", torch.float32, None),
    ),
    block=nvfp4.BLOCK,
    scales=("max", "mse"),
    inputs=("nvfp4", "none"),
    input_scale="dynamic",
    caches=False,
    magnitude=0x77,
    largest=nvfp4.E2M1_MAX * nvfp4.E4M3_MAX,
    scale_of=nvfp4.global_scale,
    quantize=nvfp4.quantize_weight,
    measured=nvfp4.quantize_measured,
    decided=nvfp4.decided,
    dequantize=nvfp4.dequantize,
    fake_quantize=nvfp4.fake_quantize,
    reach=nvfp4.reaching_scales,
)
FP8 = Format(
    name="fp8",
    title="FP8",
    parts=(Part("weight", torch.float8_e4m3fn, 1), Part("scale", torch.float32, None)),
    block=None,
    scales=("max",),
    inputs=("fp8",),
    input_scale="static",
    caches=True,
    magnitude=0x7F,
    largest=nvfp4.E4M3_MAX,
    scale_of=fp8.scale_of,
    quantize=fp8.quantize_weight,
    measured=fp8.quantize_measured,
    decided=fp8.decided,
    dequantize=fp8.dequantize,
    fake_quantize=fp8.fake_quantize,
)
FP8_BLOCKS = Format(
    name="fp8_blocks",
    title="FP8 in blocks",
    parts=(
        Part("weight", torch.float8_e4m3fn, 1),
        Part("scale", torch.float32, fp8_blocks.BLOCK, fp8_blocks.BLOCK),
    ),
    block=fp8_blocks.BLOCK,
    scales=("max",),
    inputs=("fp8_blocks",),
    input_scale="dynamic",
    caches=False,
    magnitude=0x7F,
    largest=nvfp4.E4M3_MAX,
    scale_of=fp8.scale_of,
    quantize=fp8_blocks.quantize_weight,
    measured=fp8_blocks.quantize_measured,
    decided=fp8_blocks.decided,
    dequantize=fp8_blocks.dequantize,
    fake_quantize=fp8_blocks.fake_quantize,
    has_amaxes=False,
)
FORMATS: Mapping[str, Format] = {format.name: format for format in (NVFP4, FP8, FP8_BLOCKS)}

if TYPE_CHECKING:
    WeightFormat = str
    InputFormat = str
    CacheFormat = str
else:  # the types of a pass's options: what they list, specs take and their JSON schema shows
    WeightFormat = Literal[tuple(FORMATS)]
    InputFormat = Literal[(*FORMATS, "none")]
    CacheFormat = Literal[tuple(format.name for format in FORMATS.values() if format.caches)]


def check_pair(weights: str, inputs: str, where: str) -> None:
    """SpecError for weights and inputs of formats that no engine multiplies; `where` names the pass."""
    if inputs not in FORMATS[weights].inputs:
        known = [f"{f.name} with {' or '.join(f.inputs)}" for f in FORMATS.values()]
        raise SpecError(
            f"{where}: weights: {weights} and inputs: {inputs} do not go together; "
            f"engines know {', and '.join(known)}"
        )
