"""The writer: interprets a checkpoint program and streams its tensors into safetensors shards, whole or not
at all.

Sizes are known before any weight is read, so headers are written first and every tensor goes straight to its
place: memory is the batch of slices that is computed and, packed, the one before it; not one shard.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.checkpoint.background import BackgroundWriter, Piece
from fxq.checkpoint.formats import compressed_tensors, modelopt
from fxq.checkpoint.plan import Plan
from fxq.checkpoint.plan import plan as planned
from fxq.checkpoint.shards import Block, Shards, parts, write_json
from fxq.checkpoint.workdir import PART, Work, writing
from fxq.errors import CheckpointError, SourceError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.numbers.formats import FORMATS as NUMBERS
from fxq.numbers.formats import Format, Measured, Packed
from fxq.numbers.quality import STEPS, Quality, qualities
from fxq.run.loader import on_host
from fxq.run.simulate import amax_value
from fxq.run.stages import AT_ONCE, stage
from fxq.run.statistics import amax_of, check_weight
from fxq.run.weights import WeightExpressions

FORMATS: dict[str, ModuleType] = {"modelopt": modelopt, "compressed-tensors": compressed_tensors}
SHARD_BYTES = 5_000_000_000
# Tensors that are carried through are read and written so many bytes at a time.
PIECE_BYTES = 4 << 20
# Batches that are packed at the same time: on a CPU two, so that no core waits for the end of one.
PACKERS = {"cpu": 2, "cuda": 1}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_REPLACED = (
    "config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "fxq-report",
)


@dataclass
class Written:
    """What was written, in names and bytes. qualities: per weight (parameter, expert or None) its error, and
    what may explain it. not_finite: tensors carried through as they are that hold NaN or Inf. steps: blocks
    by where the search put their scales (`fxq.numbers.quality`)."""

    qualities: dict[tuple[str, int | None], Quality] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    bytes: int = 0
    source_bytes: int = 0
    weights: int = 0
    quantized_bytes: int = 0
    packed_bytes: int = 0
    not_finite: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [0] * len(STEPS))

    def note(self, name: tuple[str, int | None], weights: int, own: Quality) -> None:
        """Count in one weight; its steps are only kept in the sum."""
        self.steps = [a + b for a, b in zip(self.steps, own.steps or [0] * len(STEPS), strict=True)]
        self.qualities[name] = own._replace(steps=())
        self.weights += weights


def plan(program: Program) -> Plan:
    """What `write` will write of a lowered program; CheckpointError if it would break the contract."""
    return planned(program, FORMATS[program.format])


def write(
    program: Program,
    plan: Plan,
    source: WeightSource,
    config: Mapping[str, Any],
    side_files: Path | None,
    work: Work,
    *,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    replaced: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    step: Callable[[], None] = lambda: None,
    beside: Callable[[Path, Written], None] = lambda directory, written: None,
) -> Written:
    """Run the lowered program and turn the work directory into the output, complete.

    plan: what `plan` says of the program. config: the source's config.json. side_files: a directory whose
    tokenizer, chat template and other files are copied as they are, but for those `replaced`: name -> content
    of a JSON file. beside: writes other files into the directory before it appears. What an interrupted run
    of the same program wrote is checked and kept. Raises CheckpointError if there is no room, or if what
    would be written breaks the contract.
    """
    format = FORMATS[program.format]
    shards = Shards(work.model, plan.infos, shard_bytes)
    with writing(work.out), closing(shards):
        work.clear(shards.names)
        work.check_space(sum(shards.sizes))
        shards.open()
        device = device or torch.device("cpu")
        background = BackgroundWriter(shards, work.journal, _version(program, shards))
        writer = _Writer(program, source, format, shards, background.finished, device, step)
        background.write(writer.pieces(), device)
        shards.finish()
        if side_files is not None:
            _copy_side_files(side_files, work.model, replaced)
        for name, content in replaced.items():
            write_json(work.model / name, content)
        for name, content in plan.config_files(format, config).items():
            write_json(work.model / (f"{name}{PART}" if name == "config.json" else name), content)
        written = _summed(writer.finish(), program, plan, format)
        beside(work.model, written)
        work.publish([*shards.names, "config.json"])
    return written


def _summed(written: Written, program: Program, plan: Plan, format: ModuleType) -> Written:
    """With the names and sizes of all that was written."""
    written.excluded = plan.excluded
    written.linears = tuple(key.removesuffix(".weight") for key in plan.linears)
    written.bytes = sum(info.nbytes for info in plan.infos.values())
    written.source_bytes = sum(info.nbytes for info in program.hub.tensors.values())
    for key in plan.linears:
        names = [name for name in format.tensor_names(key).values() if name in plan.infos]
        written.quantized_bytes += sum(plan.infos[name].nbytes for name in names)
        written.packed_bytes += plan.infos[names[0]].nbytes  # the packed weight; its scales follow
    return written


def _version(program: Program, shards: Shards) -> str:
    """What every piece depends on, besides the source: where tensors lie, how they are cut, and what data
    showed (what was bootstrapped follows from that)."""
    digest = hashlib.blake2b(f"{shards.version} {PIECE_BYTES}".encode(), digest_size=16)
    for name in sorted(program.values.keys() - program.bootstrapped):
        digest.update(json.dumps([name, float(program.values[name])]).encode())
    return digest.hexdigest()


class _Writer:
    """Interprets the program: weights of one source tensor are packed in one launch, scalars come from
    calibration. A weight with its scales, a cache's scales and a part of an untouched tensor are a piece
    each."""

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        format: ModuleType,
        shards: Shards,
        finished: Mapping[str, Any],
        device: torch.device,
        step: Callable[[], None],
    ) -> None:
        self.program, self.source, self.format, self.shards, self.step = program, source, format, shards, step
        self.finished, self.device = finished, device
        self.weights = WeightExpressions(program, source, device)
        self.written = Written()
        self.scalars: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        """All that is not finished, weights packed while others are read."""
        nodes = self.program.graph.nodes
        for node in nodes:
            if node.target is dialect.STORE_KV and node.args[1] is not None:
                yield from self._cache(node)
        copies = self._copies([node for node in nodes if node.target is dialect.STORE])
        packs = [node for node in nodes if node.target is dialect.PACK and not self._is_packed(node)]
        threads = PACKERS[self.device.type]
        packed = stage(
            self._packed,
            self.weights.batches((node_at(pack, 0) for pack in packs), alike=_pack_options),
            threads=threads,
            ahead=threads * AT_ONCE[self.device.type],
            size=lambda batch: batch[1].nbytes,
        )
        with closing(packed):
            for batch in packed:
                yield from self._packed_pieces(*batch)
                if self.source.concurrent:  # else nothing is read beside the next weights
                    yield from itertools.islice(copies, 1)  # while others are packed
        yield from copies

    def finish(self) -> Written:
        """What was written, in one order, whatever was written when."""
        found = self.written.qualities
        self.written.qualities = dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)))
        return self.written

    def _cache(self, store: Node) -> Iterator[Piece]:
        amaxes = [amax_value(node_at(store, i), self.program.values) for i in (1, 2)]
        name = f"{store.args[0]} cache"
        if name not in self.finished:
            tensors = self.format.kv_tensors(store.args[0], *amaxes, store.kwargs["format"])
            yield Piece(name, self._whole(tensors))

    def _copies(self, stores: Sequence[Node]) -> Iterator[Piece]:
        """Tensors that are carried through as they are, a part at a time."""
        for store in stores:
            key, hub_key, finite = str(store.args[0]), str(node_at(store, 1).args[0]), True
            for part in parts(self.shards.infos[key], PIECE_BYTES):
                start = part.start if part else 0
                name = f"{key} from {start}"
                if name not in self.finished:
                    values = self.source.read_hub(hub_key, part)
                    is_finite = _is_finite(values)
                    yield Piece(name, [self.shards.part(key, start, values)], is_finite)
                else:
                    is_finite = self.finished[name]
                finite = finite and is_finite
            if not finite:
                self.written.not_finite.append(key)
            self.step()

    def _is_packed(self, pack: Node) -> bool:
        """Whether an interrupted run wrote all of it."""
        note = self.finished.get(_piece_name(pack))
        if note is None:
            return False
        self._note(pack, Quality.of(note))
        for _ in pack.users:
            self.step()
        return True

    def _note(self, pack: Node, own: Quality) -> None:
        self.written.note(_weight_name(node_at(pack, 0)), node_at(pack, 0).meta["val"].numel(), own)

    def _packed(self, batch: tuple[list[Node], Tensor]) -> tuple[list[Node], Tensor, Measured]:
        """(pack nodes, weights [n, out, in], those packed, on the device)."""
        weights, values = batch
        packs = [_pack_of(w) for w in weights]
        amax = torch.zeros(len(packs), device=values.device)
        for later in (False, True):
            lot = [i for i, pack in enumerate(packs) if self._is_later(node_at(pack, 1)) is later]
            if lot and later:
                amax[lot] = amax_of(values, lot)
            elif lot:
                known = [amax_value(node_at(packs[i], 1), self.program.values) for i in lot]
                amax[lot] = torch.stack(known).to(amax.device)
        try:
            return packs, values, _quantized(packs[0], values, amax)
        except SourceError:
            for w, own in zip(weights, values, strict=True):
                check_weight(self.program.hub, w, own)
            raise

    def _is_later(self, amax: Node) -> bool:
        return amax.target is dialect.VALUE and self.program.is_later(str(amax.args[0]))

    def _packed_pieces(self, packs: list[Node], values: Tensor, measured: Measured) -> Iterator[Piece]:
        """A piece for each weight of a batch that is packed."""
        _check_scales(packs, measured.scale)
        packed, format = _in_host_memory(measured), _format(packs[0])
        for i, (pack, own) in enumerate(zip(packs, qualities(values, measured, format), strict=True)):
            blocks: list[Block] = []
            zeros: list[str] = []
            for store in pack.users:
                rows = slice(store.kwargs["start"], store.kwargs["end"])
                part = packed.part(i, rows)
                if _is_zero(part.weight, format.magnitude) and bool(values[i, rows].any()):
                    zeros.append(str(store.args[0]))
                blocks += self._blocks(store, part)
                self.step()
            own = own._replace(zeros=tuple(zeros))
            self._note(pack, own)
            yield Piece(_piece_name(pack), blocks, own)

    def _blocks(self, store: Node, packed: Packed) -> list[Block]:
        """What one store writes."""
        held, format = store.args[2], str(node_at(store, 1).kwargs["format"])
        input_amax = amax_value(held, self.program.values) if isinstance(held, Node) else None
        if store.target is dialect.STORE_LINEAR:
            key = f"{store.args[0]}.weight"
            tensors = self.format.weight_tensors(key, packed, format)
            return self._whole({**tensors, **self.format.scalar_tensors(key, packed, format, input_amax)})
        key, options = str(store.args[0]), cast(dict[str, Any], store.kwargs)
        blocks = []
        for name, block in self.format.weight_tensors(key, packed, format).items():
            turned = block.T if options["transposed"] else block
            rows = range(len(turned)) if options["transposed"] else range(*options["rows"])
            blocks.append(
                self.shards.rows(name, turned, rows, expert=options["expert"], experts=options["experts"])
            )
        scalars = self.format.scalar_tensors(key, packed, format, input_amax)
        for name, value in self.scalars.setdefault(key, scalars).items():
            if not torch.equal(value, scalars[name]):
                raise CheckpointError(
                    f"{name}: %{store.name} brings {float(scalars[name])}, another of its rows {float(value)}"
                )
        return blocks + self._whole({n: value for n, value in scalars.items() if self.shards.left(n)})

    def _whole(self, tensors: Mapping[str, Tensor]) -> list[Block]:
        for key, tensor in tensors.items():
            _check_scalar(key, tensor)
        return [self.shards.whole(key, tensor) for key, tensor in tensors.items()]


def _pack_of(weight: Node) -> Node:
    return next(user for user in weight.users if user.target is dialect.PACK)


def _pack_options(weight: Node) -> object:
    """How a weight is packed: many that are packed alike are one launch."""
    return tuple(sorted(_pack_of(weight).kwargs.items()))


def _piece_name(pack: Node) -> str:
    """What a packed weight becomes: it is the first there."""
    store = next(iter(pack.users))
    if store.target is dialect.STORE_LINEAR:
        return f"{store.args[0]}.weight"
    return f"{store.args[0]} expert {store.kwargs['expert']} rows {store.kwargs['rows']}"


def _quantized(pack: Node, values: Tensor, amax: Tensor) -> Measured:
    """What a pack node computes, of many weights at once."""
    return _format(pack).measured(values, amax, str(pack.kwargs["scale"]))


def _format(pack: Node) -> Format:
    return NUMBERS[str(pack.kwargs["format"])]


def _in_host_memory(packed: Any) -> Measured:
    """A packed weight, a dataclass of tensors, with each of them on the CPU."""
    tensors = {f.name: on_host(getattr(packed, f.name)) for f in dataclasses.fields(packed)}
    return cast(Measured, dataclasses.replace(packed, **tensors))


def _weight_name(w: Node) -> tuple[str, int | None]:
    """(parameter, expert or None) of a weight node."""
    expert = None
    while w.op != "get_attr":
        if w.target is dialect.SLICE:
            expert = int_at(w, 1)
        w = node_at(w, 0)
    return str(w.target), expert


def _is_zero(weight: Tensor, magnitude: int) -> bool:
    """Whether packed codes [rows, .] stand for zeros alone, of either sign; one look at most weights.

    magnitude: the bits of a byte of codes but their signs.
    """
    codes = weight.view(torch.uint8)
    return not any(bool((part & magnitude).any()) for part in (codes[:1], codes))


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point() or values.dtype.itemsize < 2 or not values.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def _check_scales(packs: Sequence[Node], scale: Tensor) -> None:
    """Engines trust scales blindly: a zero, negative or NaN one of ours never leaves. scale: [n, ...]."""
    codes, most = scale, float(torch.finfo(scale.dtype).max)
    if scale.dtype == torch.float8_e4m3fn:
        codes, most = scale.view(torch.uint8), 0x7E  # positive codes are in the order of their values
    rows = codes.reshape(len(codes), -1).cpu().numpy()  # torch would share the work with threads that pack
    good = (rows.min(1) > 0) & (rows.max(1) <= most)
    if not good.all():
        bad = int(good.argmin())
        found = scale[bad].flatten()[:4].float().tolist()
        raise CheckpointError(f"{_piece_name(packs[bad])}: expected positive finite scales, found {found}")


def _check_scalar(key: str, tensor: Tensor) -> None:
    """The same of a tensor's one scale."""
    if tensor.dtype == torch.float32 and tensor.numel() == 1 and not 0 < float(tensor) < math.inf:
        raise CheckpointError(f"{key}: expected a positive finite scale, found {float(tensor)}")


def _copy_side_files(source: Path, out: Path, replaced: Container[str]) -> None:
    """Tokenizer, chat templates, generation config, custom code: everything that is neither weights nor
    replaced."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _REPLACED or path.name.endswith(_WEIGHTS):
            continue
        if path.name in replaced:
            continue
        if path.is_dir():
            if not any(f.name.endswith(_WEIGHTS) for f in path.rglob("*")):
                shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, out / path.name)
