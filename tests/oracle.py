"""What a quantized checkpoint means to transformers: its dequantized bf16 twin, and perplexity on CPU."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.reader import CONFIG, INDEX, KV_SCALES, QUANT_CONFIG, SCALES, Checkpoint, read_checkpoint

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


def dequantized_model(out_dir: Path | str, work_dir: Path | str, **options: Any) -> Path:
    """Write `work_dir`: `out_dir` with each quantized linear or fused parameter in bf16 under its hub name.

    Scales (KV too), quantization_config and hf_quant_config.json are left out, other tensors and files
    copied, so `AutoModelForCausalLM.from_pretrained(work_dir)` loads it. Shards keep their names; one is in
    memory at a time. Raises FileExistsError if `work_dir` exists.
    """
    out, work = read_checkpoint(out_dir), Path(work_dir)
    work.mkdir(parents=True)
    quantized = set(out.quantized_linears())
    dropped = {out.part(name, scale) for name in quantized for scale in SCALES}
    weights = {out.part(name): name for name in quantized}
    turned = _held_transposed(out.path, **options)
    dropped |= {name for name in out.tensors if name.endswith(tuple(f".{scale}" for scale in KV_SCALES))}
    names: dict[str, list[str]] = defaultdict(list)
    for name, entry in out.tensors.items():
        if name not in dropped:
            names[entry.shard].append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for shard, members in names.items():
        tensors = {name: _tensor(out, name, weights.get(name)) for name in members}
        tensors |= {name: tensors[name].T.contiguous() for name in members if name in turned & weights.keys()}
        save_file(tensors, work / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, shard)
        total += sum(t.nbytes for t in tensors.values())
    if out.index is not None:
        _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = {key: value for key, value in (out.config or {}).items() if key != "quantization_config"}
    _write_json(work / CONFIG, config)
    for file in out.path.iterdir():
        written = file.suffix == ".safetensors" or file.name in (INDEX, CONFIG, QUANT_CONFIG)
        if file.is_file() and not written:
            shutil.copyfile(file, work / file.name)
    return work


def _held_transposed(path: Path, **options: Any) -> set[str]:
    """Weights that transformers keeps as [in, out]."""
    config = AutoConfig.from_pretrained(path, **options)
    config.quantization_config = None
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config, **options).named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, Conv1D)}


def perplexity(
    model_dir: Path | str, token_lists: Iterable[Sequence[int]], window: int = 512, **options: Any
) -> float:
    """exp of the mean negative log likelihood (nats) over all predicted tokens, of a bf16 model on CPU.

    Each list is cut into consecutive windows of at most `window` tokens, run one at a time; in a window every
    token but the first is predicted from those before it. Logits are taken to float32 before the softmax.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, local_files_only=True, **options
    )
    total, count = 0.0, 0
    with torch.inference_mode():
        for tokens in token_lists:
            for start in range(0, len(tokens), window):
                ids = torch.tensor([list(tokens[start : start + window])])
                if ids.shape[1] < 2:
                    continue
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                total += float(losses.double().sum())
                count += losses.numel()
    if count == 0:
        raise ValueError("expected a sequence of two tokens or more, found none")
    return math.exp(total / count)


def _tensor(out: Checkpoint, name: str, quantized: str | None) -> torch.Tensor:
    """The tensor `name` as stored; for the weight of `quantized` its dequantized values in bf16."""
    if quantized is not None:
        return torch.from_numpy(np.ascontiguousarray(out.dequantize(quantized))).to(torch.bfloat16)
    entry = out.tensors[name]
    data = torch.from_numpy(np.array(out.raw(name)).reshape(-1).view(np.uint8))
    return data.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
