"""Loads checkpoints into vLLM on this CPU and writes what it holds; runs in the engines' own environment.

Each line of standard input is a request, each line of standard output its answer (JSON): {"checkpoint": DIR,
"out": FILE} -> {"tensors": N}: every tensor of the loaded model goes into the safetensors FILE under vLLM's
own names, quantized weights dequantized by vLLM's code; {"checkpoint": DIR, "prompt": [ids], "tokens": N} ->
{"tokens": [ids]}: greedy generation. {"error": TEXT} if vLLM raises.

Config, name mapping, weight loader and post-processing are vLLM's. Only kernels are stood in for: NVFP4
linears by vLLM's own emulation, which it registers for GPUs alone; FP8 linears by its plain torch kernel,
which leaves weights in their layout; experts by nothing: they are loaded and cannot run.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import vllm.model_executor.kernels.linear as linear_kernels
import vllm.model_executor.layers.utils as layer_utils
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import (
    EmulationNvFp4LinearKernel,
    PerTensorTorchFP8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as compressed_experts,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as compressed_linears,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.model_loader import get_model
from vllm.platforms import PlatformEnum

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 2,
    "dtype": "bfloat16",
}


def stand_in_for_kernels() -> None:
    """Vendor kernels need a GPU: their place is taken, what is loaded stays as vLLM prepares it."""
    linear_kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [EmulationNvFp4LinearKernel]
    linear_kernels._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [PerTensorTorchFP8ScaledMMLinearKernel]
    for module in (modelopt, compressed_linears):
        module.init_nvfp4_linear_kernel = _linear_kernel
    for module in (modelopt, compressed_experts):
        module.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.EMULATION, object)
    modelopt.ModelOptNvFp4FusedMoE._build_moe_kernel = lambda self, layer: None
    compressed_experts.make_nvfp4_moe_kernel = lambda **_: _NoKernel()


def _linear_kernel(use_a16: bool = False) -> EmulationNvFp4LinearKernel:
    """vLLM has a kernel for W4A16 only where Marlin runs."""
    kind = WeightOnlyKernel if use_a16 else EmulationNvFp4LinearKernel
    return kind(linear_kernels.NvFp4LinearLayerConfig())


class WeightOnlyKernel(EmulationNvFp4LinearKernel):  # type: ignore[misc]
    """The emulation without its quantization of inputs."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = _nvfp4(layer.weight, layer.weight_scale, layer.weight_global_scale)
        return nn.functional.linear(x, weight.to(x.dtype), bias)


class _NoKernel:
    """Experts are loaded, not run."""

    def __init__(self) -> None:
        self.fused_experts = self

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


def load(checkpoint: str) -> nn.Module:
    """The model as an engine with one worker holds it."""
    config = EngineArgs(model=checkpoint, **OPTIONS).create_engine_config()
    with set_current_vllm_config(config), unpacked():
        return get_model(vllm_config=config)


@contextmanager
def unpacked() -> Iterator[None]:
    """Leaves unquantized weights as they were loaded, instead of in the layout of the CPU's kernels."""
    pack = layer_utils.dispatch_cpu_unquantized_gemm
    layer_utils.dispatch_cpu_unquantized_gemm = lambda *args, **kwargs: None
    try:
        yield
    finally:
        layer_utils.dispatch_cpu_unquantized_gemm = pack


def be_the_only_worker() -> None:
    """The process groups that an engine's worker makes before it loads anything."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """vLLM's name -> tensor: parameters and buffers; for NVFP4 the dequantized weight and the input scale."""
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for prefix, module in model.named_modules():
        own = _dequantized(module)
        found |= {f"{prefix}.{name}": tensor for name, tensor in own.items()}
        if own:
            taken |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
    stored = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {name: tensor for name, tensor in stored.items() if name not in taken and name not in found}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _dequantized(module: Any) -> dict[str, Tensor]:
    """What the tensors of a quantized module stand for; {} for any other module."""
    if hasattr(module, "w13_weight_scale"):
        return _experts(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype == torch.float8_e4m3fn:
        # Held as [in, out].
        return {"weight": _fp8(weight.t(), module.weight_scale), "input_scale": module.input_scale}
    if weight is None or not hasattr(module, "weight_global_scale"):
        return {}
    values = {"weight": _nvfp4(weight, module.weight_scale, module.weight_global_scale)}
    if hasattr(module, "input_global_scale"):
        values["input_scale"] = module.input_global_scale
    return values


def _experts(module: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name in ("w13", "w2"):
        parts = [getattr(module, f"{name}_{part}") for part in ("weight", "weight_scale", "weight_scale_2")]
        values[f"{name}_weight"] = _nvfp4(*parts)
        values[f"{name}_input_scale"] = getattr(module, f"{name}_input_scale")
    return values


def _fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.to(torch.float32) * scale).to(torch.bfloat16)


def _nvfp4(weight: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    return dequantize_to_dtype(weight.data, scale.data, scale_2.data, torch.bfloat16, 16, swizzle=False)


def generate(checkpoint: str, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation by the whole engine."""
    engine = LLM(checkpoint, **OPTIONS)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (result,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return list(result.outputs[0].token_ids)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request done; errors of the engine are its answer."""
    try:
        if "prompt" in request:
            return {"tokens": generate(request["checkpoint"], request["prompt"], request["tokens"])}
        tensors = tensors_of(load(request["checkpoint"]))
        save_file(tensors, request["out"])
        return {"tensors": len(tensors)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until standard input ends; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None
    stand_in_for_kernels()
    be_the_only_worker()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
