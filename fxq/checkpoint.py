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
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq import dialect, nvfp4
from fxq.errors import CheckpointError
from fxq.formats import modelopt
from fxq.interpret import WeightCone, amax_value
from fxq.nodes import int_at, node_at
from fxq.nvfp4 import Packed
from fxq.output import Shards, appearing, nbytes, write_json
from fxq.program import Program, TensorInfo, WeightSource

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


@dataclass(frozen=True)
class _Plan:
    """Every output tensor, known from the program's types alone."""

    infos: dict[str, TensorInfo]
    linears: tuple[str, ...]
    excluded: tuple[str, ...]
    has_inputs: bool
    kv_format: str | None


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
    plan = _plan(program, FORMATS[format])
    with appearing(out) as work:
        shards = Shards(work, plan.infos, shard_bytes)
        writer = _Writer(program, source, FORMATS[format], shards, device or torch.device("cpu"), step)
        writer.run()
        shards.finish()
        ours, nested = FORMATS[format].configs(
            config, plan.excluded, has_inputs=plan.has_inputs, kv_format=plan.kv_format
        )
        write_json(work / "config.json", ours)
        write_json(work / "hf_quant_config.json", nested)
        if side_files is not None:
            _copy_side_files(side_files, work)
    written = writer.written
    written.excluded, written.linears = plan.excluded, plan.linears
    written.bytes = sum(nbytes(info) for info in plan.infos.values())
    written.source_bytes = sum(nbytes(info) for info in program.hub.tensors.values())
    written.quantized_bytes = sum(
        nbytes(info) for name, info in plan.infos.items() if name.rpartition(".")[0] in set(plan.linears)
    )
    return written


def _plan(program: Program, format: ModuleType) -> _Plan:
    infos: dict[str, TensorInfo] = {}
    linears: dict[str, bool] = {}
    kv_formats: set[str] = set()
    for node in program.graph.nodes:
        new: dict[str, TensorInfo] = {}
        if node.target is dialect.STORE_LINEAR:
            name, packed, amax = node.args
            rows, width = node.kwargs["end"] - node.kwargs["start"], packed.meta["val"][0].shape[-1] * 2
            linears[name] = amax is not None
            new = format.linear_infos(name, rows, width, has_input=amax is not None)
        elif node.target is dialect.STORE_KV:
            kv_formats.add(node.kwargs["format"])
            if node.args[1] is not None:
                new = format.kv_infos(node.args[0])
        elif node.target is dialect.STORE:
            val = node.args[1].meta["val"]
            new = {node.args[0]: TensorInfo(tuple(val.shape), val.dtype)}
        for key in new:
            if key in infos:
                raise CheckpointError(f"{key}: two nodes of the program store it, the second is %{node.name}")
        infos.update(new)
    if len(set(linears.values())) > 1:
        with_input = next(n for n, has in linears.items() if has)
        without = next(n for n, has in linears.items() if not has)
        raise CheckpointError(
            f"{with_input} has quantized inputs and {without} has not: one checkpoint declares one "
            "algorithm; "
            "give quantize-linears and quantize-experts the same `inputs`"
        )
    matrices = [k for k, i in infos.items() if k.endswith(".weight") and len(i.shape) >= 2]
    unquantized = {k.removesuffix(".weight") for k in matrices} - set(linears)
    excluded = sorted(unquantized | set(program.hub.modules))
    return _Plan(infos, tuple(linears), tuple(excluded), all(linears.values()), next(iter(kv_formats), None))


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

    @torch.no_grad()
    def run(self) -> None:
        stores: dict[Node, list[Node]] = {}
        for node in self.program.graph.nodes:
            if node.target is dialect.STORE_LINEAR:
                stores.setdefault(node.args[1], []).append(node)
            elif node.target is dialect.STORE_KV and node.args[1] is not None:
                amaxes = [amax_value(a, self.program.values) for a in node.args[1:]]
                self._emit(self.format.kv_tensors(node.args[0], *amaxes))
            elif node.target is dialect.STORE:
                self._emit({node.args[0]: self.source.read_hub(str(node.args[1].args[0]))})
                self.step()
        packs: dict[Node, list[Node]] = {}
        for pack in stores:
            packs.setdefault(node_at(pack, 0), []).append(pack)
        for weights, values in self.cone.batches(packs):
            self._pack([packs[w][0] for w in weights], values, stores)

    def _pack(self, packs: list[Node], values: Tensor, stores: Mapping[Node, list[Node]]) -> None:
        amax = torch.stack([amax_value(node_at(p, 1), self.program.values) for p in packs]).to(values.device)
        scale = str(packs[0].kwargs["scale"])
        packed = nvfp4.quantize_weight(values, amax, scale)
        errors, energies = (t.tolist() for t in nvfp4.squared_error(values, packed))
        packed = Packed(packed.weight.cpu(), packed.scale.cpu(), packed.scale_2.cpu())
        for i, pack in enumerate(packs):
            self.written.errors[_weight_name(node_at(pack, 0))] = (errors[i], energies[i])
            self.written.weights += values[i].numel()
            for store in stores[pack]:
                rows = slice(store.kwargs["start"], store.kwargs["end"])
                part = Packed(packed.weight[i, rows], packed.scale[i, rows], packed.scale_2[i])
                held = store.args[2]
                input_amax = amax_value(held, self.program.values) if isinstance(held, Node) else None
                self._emit(self.format.linear_tensors(str(store.args[0]), part, input_amax))
                self.step()

    def _emit(self, tensors: Mapping[str, Tensor]) -> None:
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
    """Engines trust scales blindly: a zero, negative or NaN one never leaves."""
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
