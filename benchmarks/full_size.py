"""Trace and graph passes at full size: published shapes on fake tensors, no weight in memory.

    python benchmarks/full_size.py [qwen3-30b-a3b qwen3.5-35b-a3b deepseek-v3 kimi-k2] [--layers N ...]

Every pass of the spec runs, except that nothing is calibrated. With --layers, each model is cut to so many
layers, to show how the cost grows.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3_5MoeTextConfig, Qwen3MoeConfig

from fxq.graph.hub import TensorInfo
from fxq.graph.program import Program
from fxq.graph.structure.experts import is_expert
from fxq.passes import PASSES
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import is_weight_quantize
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import load
from fxq.sources.conversion import hub_of, own_names, revert
from fxq.trace.export import trace
from fxq.trace.fake_model import fake_model_of_config


def _qwen3(layers: int | None) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=layers or 48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    )


def _qwen3_5(layers: int | None) -> PreTrainedConfig:
    return Qwen3_5MoeTextConfig(num_hidden_layers=layers or 40)  # the defaults are Qwen3.5-35B-A3B's


def _deepseek(layers: int | None, **differences: Any) -> PreTrainedConfig:
    return DeepseekV3Config(
        **{"num_hidden_layers": layers or 61, **differences}
    )  # the defaults are DeepSeek-V3's


def _kimi(layers: int | None) -> PreTrainedConfig:
    return _deepseek(
        layers,
        vocab_size=163840,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )


MODELS: dict[str, Callable[[int | None], PreTrainedConfig]] = {
    "qwen3-30b-a3b": _qwen3,
    "qwen3.5-35b-a3b": _qwen3_5,
    "deepseek-v3": _deepseek,
    "kimi-k2": _kimi,
}


def measure(name: str, layers: int | None, spec: str, table: Table) -> None:
    config = MODELS[name](layers)
    start = time.perf_counter()
    fake = fake_model_of_config(config, torch.bfloat16)
    program = trace(fake)
    traced = time.perf_counter()
    state = {n: t.to("meta") for n, t in fake.model.state_dict().items()}
    held = revert(fake.model, {n: state[n] for n in own_names(fake.model)})
    infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in held.items()}
    program.hub = hub_of(fake.model, infos, name)
    named = time.perf_counter()
    experts = nodes = 0

    def after(step: Pass, program: Program, count: int) -> None:
        nonlocal experts, nodes
        if step.name != "lower":
            weights = [n for n in program.graph.nodes if is_weight_quantize(n)]
            experts = sum(1 for n in weights if is_expert(n.args[0]))
            nodes = len(program.graph.nodes)

    run_passes(load(spec, PASSES).passes, program, after=after)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.add_row(
        name,
        str(layers or "all"),
        f"{traced - start:.1f}",
        f"{named - traced:.1f}",
        f"{done - named:.1f}",
        f"{experts:,}",
        f"{nodes:,}",
        f"{len(program.graph.nodes):,}",
        f"{peak:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--layers", nargs="*", type=int, default=[])
    parser.add_argument("--spec", default="nvfp4_default_mse-fp8_cast_kv")
    arguments = parser.parse_args()
    table = Table(title=arguments.spec)
    for title in ("model", "layers", "trace s", "names s", "passes s", "expert quantize nodes", "nodes"):
        table.add_column(title, justify="left" if title == "model" else "right")
    table.add_column("program nodes", justify="right")
    table.add_column("peak RSS GiB", justify="right")
    for name in arguments.models or MODELS:
        for layers in arguments.layers or [None]:
            # A child each, so that a peak is its own.
            if os.fork() == 0:
                measure(name, layers, arguments.spec, table)
                Console(width=150).print(table)
                os._exit(0)
            os.wait()


if __name__ == "__main__":
    main()
