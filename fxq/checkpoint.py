"""The writer: interprets a checkpoint program and streams its tensors into safetensors shards, whole or not
at all.

Sizes are known before any weight is read, so headers are written first and every tensor goes straight to its
place: memory is one batch of slices, not one shard.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.fx import Node

from fxq import dialect, nvfp4
from fxq.errors import CheckpointError
from fxq.formats import modelopt
from fxq.interpret import WeightCone, amax_value
from fxq.nodes import int_at, node_at
from fxq.nvfp4 import Packed
from fxq.program import Program, TensorInfo, WeightSource

FORMATS: dict[str, ModuleType] = {"modelopt": modelopt}
SHARD_BYTES = 5_000_000_000
_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
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
    with _appearing(out) as work:
        shards = _Shards(work, plan.infos, shard_bytes)
        writer = _Writer(program, source, FORMATS[format], shards, device or torch.device("cpu"), step)
        writer.run()
        shards.finish()
        ours, nested = FORMATS[format].configs(
            config, plan.excluded, has_inputs=plan.has_inputs, kv_format=plan.kv_format
        )
        _write_json(work / "config.json", ours)
        _write_json(work / "hf_quant_config.json", nested)
        if side_files is not None:
            _copy_side_files(side_files, work)
    written = writer.written
    written.excluded, written.linears = plan.excluded, plan.linears
    written.bytes = sum(_nbytes(info) for info in plan.infos.values())
    written.source_bytes = sum(_nbytes(info) for info in program.hub.tensors.values())
    written.quantized_bytes = sum(
        _nbytes(info) for name, info in plan.infos.items() if name.rpartition(".")[0] in set(plan.linears)
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
        shards: "_Shards",
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


class _Shards:
    """Safetensors files whose headers are written before their data."""

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        self.directory, self.infos = directory, infos
        groups = _split(infos, shard_bytes)
        total = len(groups)
        self.names = [
            f"model-{i + 1:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"
            for i in range(total)
        ]
        self.place: dict[str, tuple[int, int]] = {}
        self.files: list[BinaryIO] = []
        for index, keys in enumerate(groups):
            self.files.append(self._start(index, keys))
        self.left = set(infos)

    def _start(self, index: int, keys: list[str]) -> BinaryIO:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # Wide types first, so that every tensor is aligned.
        offset = 0
        for key in sorted(keys, key=lambda k: (-self.infos[k].dtype.itemsize, k)):
            info, size = self.infos[key], _nbytes(self.infos[key])
            header[key] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + size],
            }
            self.place[key] = (index, offset)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self.directory / self.names[index]).open("w+b")
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        self.place.update({k: (index, self.place[k][1] + start) for k in keys})
        return file

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor where the header says it is."""
        info = self.infos[key]
        if TensorInfo(tuple(tensor.shape), tensor.dtype) != info or key not in self.left:
            raise CheckpointError(f"{key}: expected {info} once, found {tuple(tensor.shape)} {tensor.dtype}")
        index, offset = self.place[key]
        self.files[index].seek(offset)
        self.files[index].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.left.discard(key)

    def finish(self) -> None:
        """Flush to the disk and write the index; CheckpointError if a promised tensor never came."""
        if self.left:
            raise CheckpointError(
                f"{sorted(self.left)[0]}: planned but never written ({len(self.left)} such tensors)"
            )
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if len(self.names) > 1:
            weight_map = {key: self.names[self.place[key][0]] for key in self.infos}
            total = sum(_nbytes(info) for info in self.infos.values())
            _write_json(
                self.directory / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )


def _split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors, each module's together, filling shards of about `shard_bytes`."""
    groups: list[list[str]] = [[]]
    size, module = 0, ""
    for key in sorted(infos, key=_natural):
        same = key.rpartition(".")[0] == module
        if groups[-1] and not same and size + _nbytes(infos[key]) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size, module = size + _nbytes(infos[key]), key.rpartition(".")[0]
    return groups


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _nbytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A work directory beside `out` that becomes `out` when the block succeeds and vanishes when it fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write there: {error.strerror}") from error
    try:
        yield work
        _sync_directory(work)
        os.chmod(work, 0o777 & ~_umask())
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        os.rename(work, out)
        _sync_directory(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


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
