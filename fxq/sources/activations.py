"""Activations of a quantized checkpoint: how engines quantize what its weights multiply, and what they cache.

Scales are read from the tensors; the configs say whether inputs are quantized at all, and what the cache is.
What would run otherwise than fxq simulates is refused by name, or noted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxq.errors import and_more
from fxq.graph.hub import TensorInfo
from fxq.sources.encoded_weight import EncodedWeight
from fxq.sources.encodings import Encoding, Stated, not_read

_CACHE_SCALES = ("k_scale", "v_scale")
_WEIGHT_ONLY = "W4A16_NVFP4"


@dataclass(frozen=True)
class InputScale:
    """The tensor that holds the scale of a linear's input, None if engines find it while serving;
    `is_divisor` if that is 1 / input_scale."""

    key: str | None
    format: str
    is_divisor: bool = False


@dataclass(frozen=True)
class Activations:
    """How engines quantize what the weights of a checkpoint multiply, and what they cache.

    inputs: weight as the hub calls it -> the scale of its input. fp8_cache: whether the KV cache is FP8.
    cache_scales: the tensors that hold its scales. notes: what is declared and cannot be followed.
    """

    inputs: Mapping[str, InputScale]
    fp8_cache: bool
    cache_scales: tuple[str, ...]
    notes: tuple[str, ...] = ()


def activations_of(encoding: Encoding, raw: Mapping[str, TensorInfo], where: Path) -> Activations | None:
    """What a ModelOpt or compressed-tensors checkpoint says of its activations; None of another.
    SourceError if that cannot be followed."""
    stated, weights = encoding.stated, encoding.weights
    if stated is None or not (stated.method.startswith("modelopt") or stated.method == "compressed-tensors"):
        return None
    weight_only = _WeightOnly(stated)
    inputs = {name: scale for name, scale in _inputs(weights, raw) if not weight_only(name)}
    caches = tuple(name for name in raw if name.rpartition(".")[2] in _CACHE_SCALES)
    notes = tuple(_notes(weights, inputs, weight_only, stated))
    return Activations(inputs, _fp8_cache(stated, where), caches, notes)


class _WeightOnly:
    """Whether the configs give a weight inputs that stay as they are."""

    def __init__(self, stated: Stated) -> None:
        settings, groups = stated.settings, stated.groups
        self.algorithm, self.layers = str(settings.get("quant_algo")).upper(), dict[str, str]()
        if stated.method == "compressed-tensors":
            fours = [g for g in groups if (g.get("weights") or {}).get("num_bits") == 4]
            plain = bool(fours) and all(g.get("input_activations") is None for g in fours)
            self.algorithm = _WEIGHT_ONLY if plain and len(fours) == len(groups) else "NVFP4"
            return
        if self.algorithm == "NVFP4" and groups and all(g.get("input_activations") is None for g in groups):
            self.algorithm = _WEIGHT_ONLY
        listed = settings.get("quantized_layers")
        for name, layer in listed.items() if isinstance(listed, dict) else ():
            if isinstance(layer, dict):
                self.layers[str(name)] = str(layer.get("quant_algo")).upper()

    def __call__(self, weight: str) -> bool:
        parts = weight.removesuffix(".weight").split(".")
        around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self.layers[m] for m in around if m in self.layers), self.algorithm) == _WEIGHT_ONLY


def _fp8_cache(stated: Stated, where: Path) -> bool:
    """Whether the KV cache is FP8 with a fixed scale; SourceError if it is quantized otherwise."""
    found: Any = stated.settings.get("kv_cache_scheme", stated.settings.get("kv_cache_quant_algo"))
    if found is None:
        return False
    if isinstance(found, dict):
        fits = found.get("num_bits") == 8 and found.get("type") == "float" and not found.get("dynamic")
    else:
        fits = str(found).upper() == "FP8"
    if not fits:
        raise not_read(stated.key, f"a KV cache of {found}", where)
    return True


def _inputs(
    weights: Mapping[str, EncodedWeight], raw: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, InputScale]]:
    """Weight -> the scale of its input, of those that have one."""
    for name, weight in weights.items():
        module = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        is_divisor = weight.tensor_scale is not None and weight.tensor_scale.is_divisor
        key = f"{module}input_{'global_' if is_divisor else ''}scale"
        if weight.title == "FP8_BLOCKS":
            yield name, InputScale(None, "fp8_blocks")
        elif weight.title in ("NVFP4", "FP8") and key in raw:
            yield name, InputScale(key, weight.title.lower(), is_divisor)


def _notes(
    weights: Mapping[str, EncodedWeight],
    inputs: Mapping[str, InputScale],
    weight_only: _WeightOnly,
    stated: Stated,
) -> Iterator[str]:
    """Where engines do to inputs what is not simulated."""
    compressed = any(group.get("input_activations") is None for group in stated.groups)
    bare = [name for name in weights if name not in inputs and not weight_only(name)]
    fours = [name for name in bare if weights[name].title == "NVFP4" and not compressed]
    if fours:
        yield (
            f"{and_more(fours)}: no input scale, although 4-bit inputs are declared; simulated "
            "without, but engines take whatever memory holds (fxq verify)"
        )
    if eights := [name for name in bare if weights[name].title == "FP8"]:
        yield (
            f"{and_more(eights)}: FP8 without an input scale; engines quantize its input token by "
            "token, which is not simulated"
        )
