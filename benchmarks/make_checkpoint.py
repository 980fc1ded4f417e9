"""A checkpoint of a given architecture with random weights, written tensor by tensor under its hub's names.

    python benchmarks/make_checkpoint.py DIR --model qwen3-30b-a3b --layers 4
    python benchmarks/make_checkpoint.py DIR --config config.json --set num_hidden_layers=8

Matrices hold Gaussian values (cut from one pool at a random place, so that writing takes the disk's time),
vectors ones. Also written: calib.jsonl, samples of random token ids.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from full_size import MODELS
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from fxq.sources.conversion import own_names, revert
from fxq.trace.fake_model import fake_model_of_config

SHARD_BYTES = 1 << 30
_POOL = 1 << 24


def write(directory: Path, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Write the checkpoint; returns its size in bytes."""
    directory.mkdir(parents=True)
    fake = fake_model_of_config(config, dtype)
    config.architectures = [type(fake.model).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)
    state = {name: tensor.to("meta") for name, tensor in fake.model.state_dict().items()}
    held = revert(fake.model, {name: state[name] for name in own_names(fake.model)})
    shards = list(_shards(held))
    places: dict[str, str] = {}
    draw = _Draw(dtype)
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: draw(held[key]) for key in keys}, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, name)
    size = sum(t.nbytes for t in held.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _shards(held: dict[str, Tensor]) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, tensor in held.items():
        if keys and size + tensor.nbytes > SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys


class _Draw:
    """Random tensors: any stretch of a pool of Gaussian values, repeated where a tensor is larger."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        pool = torch.randn(_POOL, generator=self.generator) * 0.02
        self.pool = torch.cat([pool, pool]).to(dtype)

    def __call__(self, like: Tensor) -> Tensor:
        if like.dim() < 2:
            return torch.ones(like.shape, dtype=like.dtype)
        out = torch.empty(like.shape, dtype=like.dtype)
        for piece in out.view(-1).split(_POOL):
            start = int(torch.randint(_POOL, (1,), generator=self.generator))
            piece.copy_(self.pool[start : start + piece.numel()])
        return out


def write_calibration(path: Path, vocabulary: int, samples: int, length: int) -> None:
    """JSON lines of random token ids."""
    generator = torch.Generator().manual_seed(1)
    with path.open("w") as file:
        for _ in range(samples):
            ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=list(MODELS), help="a published shape")
    parser.add_argument("--config", type=Path, help="or a config.json")
    parser.add_argument("--layers", type=int, help="so many layers of --model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.config is None):
        parser.error("give --model or --config")
    if arguments.model is not None:
        config = MODELS[arguments.model](arguments.layers)
    else:
        config = AutoConfig.from_pretrained(arguments.config)
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        setattr(config, key, yaml.safe_load(value))
    size = write(arguments.directory, config, getattr(torch, arguments.dtype))
    vocabulary = config.get_text_config().vocab_size
    write_calibration(arguments.directory / "calib.jsonl", vocabulary, arguments.samples, arguments.seq_len)
    print(f"{arguments.directory}: {size / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    main()
