"""What a checkpoint means, tensor by tensor, against what vLLM holds after it loaded the checkpoint.

The meaning comes from tests/reader.py, which shares no code with the writer; where vLLM merges tensors
(q/k/v, gate/up, the experts of a layer) and what it calls them is written here, after its documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import reference
from tests.oracle import TORCH_DTYPES
from tests.reader import SCALES, Checkpoint, read_checkpoint

# Linears whose rows vLLM puts one after the other -> the merged module.
MERGED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}
EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)")
# An expert's projection -> (stacked weight, place among its rows, of how many).
EXPERT_ROWS = {
    **dict.fromkeys(("gate_proj", "w1"), ("w13", 0, 2)),
    **dict.fromkeys(("up_proj", "w3"), ("w13", 1, 2)),
    **dict.fromkeys(("down_proj", "w2"), ("w2", 0, 1)),
}
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Difference:
    """A tensor that vLLM does not hold as the checkpoint means it, and how."""

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """compared: tensors of the checkpoint with a meaning of their own (a quantized weight with its scales is
    one); differences: those of them that vLLM holds otherwise."""

    compared: int
    differences: tuple[Difference, ...]

    @property
    def exact(self) -> int:
        return self.compared - len(self.differences)


def compare(directory: Path, loaded_file: Path) -> Comparison:
    """Every tensor of a checkpoint with the one that vLLM loaded from it, bit for bit.

    Left out: layers after the last (multi-token prediction), which vLLM loads with another model class.
    """
    checkpoint, loaded = read_checkpoint(directory), load_file(loaded_file)
    meanings = dict(_meanings(checkpoint))
    differences = []
    for name, meaning in meanings.items():
        reason = _difference(meaning, _held(name, meaning, checkpoint, loaded))
        if reason is not None:
            differences.append(Difference(name, reason))
    return Comparison(len(meanings), tuple(differences))


def _meanings(out: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Tensor -> its value: weights dequantized to bfloat16, scales as multipliers, others as stored."""
    depth = int((out.config or {})["num_hidden_layers"])
    nvfp4, fp8 = out.quantized_linears(), out.fp8_linears()
    taken = set[str]()
    for name in (*nvfp4, *fp8):
        taken |= {out.part(name, part) for part in ("weight", *SCALES)}
        yield f"{name}.weight", _nvfp4(out, name) if name in nvfp4 else _fp8(out, name)
        if out.part(name, "input_scale") in out.tensors:
            scale = torch.tensor(out.multiplier(name, "input_scale"))
            yield f"{name}.input_scale", _as_engines_hold(f"{name}.input_scale", scale, name in nvfp4)
    for name in out.tensors:
        layer = LAYER.search(name)
        if name not in taken and (layer is None or int(layer[1]) < depth):
            yield name, _as_engines_hold(name, _stored(out, name))


def _stored(out: Checkpoint, name: str) -> Tensor:
    data = torch.from_numpy(np.array(out.raw(name)).reshape(-1).view(np.uint8))
    return data.view(TORCH_DTYPES[out.tensors[name].dtype]).reshape(out.tensors[name].shape)


def _as_engines_hold(name: str, value: Tensor, nvfp4: bool = False) -> Tensor:
    """A KV scale in ModelOpt's place goes through a parameter of the model's dtype (in compressed-tensors' it
    does not); NVFP4 experts keep the inverse of their input scale, which their emulation multiplies by."""
    if name.endswith(("_proj.k_scale", "_proj.v_scale")):
        return value.to(torch.bfloat16)
    return 1 / value if nvfp4 and EXPERT.match(name) else value


def _nvfp4(out: Checkpoint, name: str) -> Tensor:
    """bfloat16 [N, K]: e2m1 * (block scale * weight_scale_2), each product rounded to float32."""
    weight, scale = (out.array(out.part(name, s)) for s in ("weight", "weight_scale"))
    step = reference.e4m3_decode(scale).astype(np.float32) * out.multiplier(name, "weight_scale_2")
    codes = reference.SIGNED_E2M1[reference.unpack(weight)].astype(np.float32)
    return torch.from_numpy(codes * np.repeat(step, reference.BLOCK, axis=1)).to(torch.bfloat16)


def _fp8(out: Checkpoint, name: str) -> Tensor:
    """bfloat16 [N, K]: e4m3 * weight_scale, the product rounded to float32."""
    codes = reference.e4m3_decode(out.array(f"{name}.weight")).astype(np.float32)
    return torch.from_numpy(codes * out.array(f"{name}.weight_scale")).to(torch.bfloat16)


def _held(name: str, meaning: Tensor, out: Checkpoint, loaded: Mapping[str, Tensor]) -> Tensor | None:
    """What vLLM holds in the place of a tensor of the checkpoint; None if it has no such place."""
    module, _, leaf = name.rpartition(".")
    owner, _, projection = module.rpartition(".")
    if projection == "kv_b_proj" and leaf == "weight":
        return _absorbed(owner, loaded)
    if leaf in ("k_scale", "v_scale"):
        attention = owner if projection in ("k_proj", "v_proj") else module
        return _first(loaded, f"{attention}.attn._{leaf}", f"{attention}.mla_attn.mla_attn._{leaf}")
    if (expert := EXPERT.fullmatch(module)) is not None:
        stack, place, of = EXPERT_ROWS[expert["projection"]]
        held = loaded.get(f"{expert['layer']}.routed_experts.{stack}_{leaf}")
        if held is None or leaf == "input_scale":
            return held
        return held[int(expert["index"])].chunk(of)[place]
    for members, merged in MERGED.items():
        if projection in members and (held := loaded.get(f"{owner}.{merged}.{leaf}")) is not None:
            if leaf == "input_scale":
                return held
            before = members[: members.index(projection)]
            start = sum(_rows(out, f"{owner}.{member}", leaf) for member in before)
            return held[start : start + len(meaning)]
    held = loaded.get(name)
    if held is not None and projection in ("embed_tokens", "lm_head"):
        return held[: len(meaning)]  # vLLM pads the vocabulary
    return held


def _rows(out: Checkpoint, module: str, leaf: str) -> int:
    part = out.part(module) if leaf == "weight" and out.part(module) in out.tensors else f"{module}.{leaf}"
    return out.tensors[part].shape[0]


def _absorbed(attention: str, loaded: Mapping[str, Tensor]) -> Tensor | None:
    """The expansion of a latent to keys and values, [heads * (key + value), latent], of which vLLM uses the
    two parts alone: it multiplies queries by the one and outputs by the other."""
    parts = [loaded.get(f"{attention}.mla_attn.mla_attn.{part}") for part in ("W_UK_T", "W_UV")]
    if parts[0] is None or parts[1] is None:
        return None
    return torch.cat([parts[0], parts[1].transpose(1, 2)], 1).flatten(0, 1)


def _first(loaded: Mapping[str, Tensor], *names: str) -> Tensor | None:
    return next((loaded[name] for name in names if name in loaded), None)


def _difference(meaning: Tensor, held: Tensor | None) -> str | None:
    """None if vLLM holds the very value, else what is wrong with it."""
    if held is None:
        return "vLLM has no such tensor"
    if held.numel() != meaning.numel():
        return f"expected the shape {list(meaning.shape)}, vLLM has {list(held.shape)}"
    expected, found = meaning.flatten().double(), held.flatten().double()
    if torch.equal(expected, found):
        return None
    count = int((expected != found).sum())
    largest = float((expected - found).abs().max())
    top = float(expected.abs().max())
    return f"{count} of {meaning.numel()} values differ, by up to {largest:.3g} of {top:.3g}"
