"""The writer: interprets a checkpoint program and streams its tensors into safetensors shards, whole or not
at all.

Sizes are known before any weight is read, so headers are written first and every tensor goes straight to its
place: memory is one batch of slices, not one shard.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq import dialect, nvfp4
from fxq.amaxes import amax_value
from fxq.cone import WeightCone
from fxq.errors import CheckpointError
from fxq.formats import modelopt
from fxq.nodes import int_at, node_at
from fxq.nvfp4 import Packed
from fxq.output import Shards, appearing, nbytes, write_json
from fxq.plan import plan as planned
from fxq.program import Program, WeightSource

FORMATS: dict[str, ModuleType] = {"modelopt": modelopt}
SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_REPLACED = (
    "config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


@dataclass
class Written:
    """What a write measured: per weight (parameter, expert or None) the squared error and energy of its
    rows."""

    errors: dict[tuple[str, int | None], tuple[float, float]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    bytes: int = 0
    source_bytes: int = 0
    weights: int = 0
    quantized_bytes: int = 0


def write(
    program: Program,
    source: WeightSource,
    config: Mapping[str, Any],
    side_files: Path | None,
    out: Path,
    *,
    format: str = "modelopt",
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    step: Callable[[], None] = lambda: None,
) -> Written:
    """Run the lowered program into the directory `out`, which appears complete or not at all.

    config: the source's config.json. side_files: a directory whose tokenizer, chat template and other files
    are copied as they are. Raises CheckpointError if `out` holds something, or if what would be written
    breaks the contract.
    """
    plan = planned(program, FORMATS[format])
    with appearing(out) as work:
        shards = Shards(work, plan.infos, shard_bytes)
        writer = _Writer(program, source, FORMATS[format], shards, device or torch.device("cpu"), step)
        writer.run()
        shards.finish()
        ours, nested = FORMATS[format].configs(
            config, plan.excluded, has_inputs=all(plan.linears.values()), kv_format=plan.kv_format
        )
        write_json(work / "config.json", ours)
        write_json(work / "hf_quant_config.json", nested)
        if side_files is not None:
            _copy_side_files(side_files, work)
    written = writer.written
    written.excluded = plan.excluded
    written.linears = tuple(key.removesuffix(".weight") for key in plan.linears)
    written.bytes = sum(nbytes(info) for info in plan.infos.values())
    written.source_bytes = sum(nbytes(info) for info in program.hub.tensors.values())
    names = (name for key in plan.linears for name in FORMATS[format].tensor_names(key).values())
    written.quantized_bytes = sum(nbytes(plan.infos[name]) for name in names if name in plan.infos)
    return written


class _Writer:
    """Interprets the program: weights of one source tensor are packed in one launch, scalars come from
    calibration."""

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        format: ModuleType,
        shards: Shards,
        device: torch.device,
        step: Callable[[], None],
    ) -> None:
        self.program, self.source, self.format, self.shards, self.step = program, source, format, shards, step
        self.cone = WeightCone(program, source, device)
        self.written = Written()
        self.scalars: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def run(self) -> None:
        stores: dict[Node, list[Node]] = {}
        for node in self.program.graph.nodes:
            if node.target in (dialect.STORE_LINEAR, dialect.STORE_ROWS):
                stores.setdefault(node.args[1], []).append(node)
            elif node.target is dialect.STORE_KV and node.args[1] is not None:
                amaxes = [amax_value(a, self.program.values) for a in node.args[1:]]
                self._put(self.format.kv_tensors(node.args[0], *amaxes))
            elif node.target is dialect.STORE:
                self.shards.put(node.args[0], self.source.read_hub(str(node.args[1].args[0])))
                self.step()
        packs: dict[Node, list[Node]] = {}
        for pack in stores:
            packs.setdefault(node_at(pack, 0), []).append(pack)
        for weights, values in self.cone.batches(packs):
            self._pack([packs[w][0] for w in weights], values, stores)

    def _pack(self, packs: list[Node], values: Tensor, stores: Mapping[Node, list[Node]]) -> None:
        amax = torch.stack([amax_value(node_at(p, 1), self.program.values) for p in packs]).to(values.device)
        scale = str(packs[0].kwargs["scale"])
        measured = nvfp4.quantize_measured(values, amax, scale)
        errors, energies = measured.error.tolist(), measured.energy.tolist()
        packed = Packed(measured.weight.cpu(), measured.scale.cpu(), measured.scale_2.cpu())
        for i, pack in enumerate(packs):
            self.written.errors[_weight_name(node_at(pack, 0))] = (errors[i], energies[i])
            self.written.weights += values[i].numel()
            for store in stores[pack]:
                rows = slice(store.kwargs["start"], store.kwargs["end"])
                self._store(store, Packed(packed.weight[i, rows], packed.scale[i, rows], packed.scale_2[i]))
                self.step()

    def _store(self, store: Node, packed: Packed) -> None:
        held = store.args[2]
        input_amax = amax_value(held, self.program.values) if isinstance(held, Node) else None
        if store.target is dialect.STORE_LINEAR:
            key = f"{store.args[0]}.weight"
            self._put(self.format.weight_tensors(key, packed))
            self._put(self.format.scalar_tensors(key, packed, input_amax))
            return
        key, options = str(store.args[0]), cast(dict[str, Any], store.kwargs)
        for name, block in self.format.weight_tensors(key, packed).items():
            _check_value(name, block)
            turned = block.T if options["transposed"] else block
            rows = range(len(turned)) if options["transposed"] else range(*options["rows"])
            self.shards.put_rows(name, turned, rows, expert=options["expert"], experts=options["experts"])
        scalars = self.format.scalar_tensors(key, packed, input_amax)
        if key not in self.scalars:
            self._put(scalars)
        for name, value in self.scalars.setdefault(key, scalars).items():
            if not torch.equal(value, scalars[name]):
                raise CheckpointError(
                    f"{name}: %{store.name} brings {float(scalars[name])}, another of its rows {float(value)}"
                )

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            _check_value(key, tensor)
            self.shards.put(key, tensor)


def _weight_name(w: Node) -> tuple[str, int | None]:
    """(parameter, expert or None) of a weight node."""
    expert = None
    while w.op != "get_attr":
        if w.target is dialect.SLICE:
            expert = int_at(w, 1)
        w = node_at(w, 0)
    return str(w.target), expert


def _check_value(key: str, tensor: Tensor) -> None:
    """Engines trust scales blindly: a zero, negative or NaN one of ours never leaves."""
    if not key.endswith(("_scale", "_scale_2")):
        return
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.view(torch.uint8)
        good = bool(((codes > 0) & (codes < 0x7F)).all())
    else:
        good = bool((torch.isfinite(tensor) & (tensor > 0)).all())
    if not good:
        raise CheckpointError(
            f"{key}: expected positive finite scales, found {tensor.flatten()[:4].float().tolist()}"
        )


def _copy_side_files(source: Path, out: Path) -> None:
    """Tokenizer, chat templates, generation config, custom code: everything that is neither weights nor
    replaced."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _REPLACED or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            if not any(f.name.endswith(_WEIGHTS) for f in path.rglob("*")):
                shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, out / path.name)
