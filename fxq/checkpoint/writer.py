"""The writer: interprets a checkpoint program and streams its tensors into safetensors shards, whole or not
at all.

Sizes are known before any weight is read, so headers are written first and every tensor goes straight to its
place: memory is the batch of slices that is computed and, packed, the one before it; not one shard.
"""

import hashlib
import itertools
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq import gc_paused as collector
from fxq import heap
from fxq.checkpoint.background import Piece, WriteBehind
from fxq.checkpoint.formats import compressed_tensors, modelopt
from fxq.checkpoint.plan import Plan
from fxq.checkpoint.plan import plan as planned
from fxq.checkpoint.shards import Block, Shards, nbytes, pieces, write_json
from fxq.checkpoint.workdir import PART, Work, writing
from fxq.errors import CheckpointError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.numbers import kernels
from fxq.numbers.formats import FORMATS as NUMBERS
from fxq.numbers.formats import Format, Measured, Packed
from fxq.numbers.quality import STEPS, Traits, traits
from fxq.run.statistics import amax_of, amax_value, check_weight
from fxq.run.weights import WeightCone

FORMATS: dict[str, ModuleType] = {"modelopt": modelopt, "compressed-tensors": compressed_tensors}
SHARD_BYTES = 5_000_000_000
# Tensors that are carried through are read and written so many bytes at a time.
PIECE_BYTES = 4 << 20
# Threads that write: one keeps up with a CPU that packs.
WRITERS = {"cpu": 1, "cuda": 4}
# Batches that are packed at the same time: on a CPU two, so that no core waits for the end of one;
# and how many bytes of weights they may be, if they are not one.
PACKERS = {"cpu": 2, "cuda": 1}
PACKED_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_REPLACED = (
    "config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


@dataclass
class Written:
    """What was written, in names and bytes. traits: per weight (parameter, expert or None) its error, and
    what may explain it. not_finite: tensors carried through as they are that hold NaN or Inf. steps: blocks
    by where the search put their scales (`fxq.traits`)."""

    traits: dict[tuple[str, int | None], Traits] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    bytes: int = 0
    source_bytes: int = 0
    weights: int = 0
    quantized_bytes: int = 0
    packed_bytes: int = 0
    not_finite: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [0] * len(STEPS))

    def note(self, name: tuple[str, int | None], weights: int, own: Traits) -> None:
        """Count in one weight; its steps are only kept in the sum."""
        self.steps = [a + b for a, b in zip(self.steps, own.steps or [0] * len(STEPS), strict=True)]
        self.traits[name] = own._replace(steps=())
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
    step: Callable[[], None] = lambda: None,
    beside: Callable[[Path, Written], None] = lambda directory, written: None,
) -> Written:
    """Run the lowered program and turn the work directory into the output, complete.

    plan: what `plan` says of the program, which may be at rest. config: the source's config.json. side_files:
    a directory whose tokenizer, chat template and other files are copied as they are. beside: writes other
    files into the directory before it appears. What an interrupted run of the same program wrote is checked
    and kept. Raises CheckpointError if there is no room, or if what would be written breaks the contract.
    """
    format = FORMATS[program.format]
    shards = Shards(work.model, plan.infos, shard_bytes)
    with writing(work.out), closing(shards):
        work.clear(shards.names)
        work.check_space(sum(shards.sizes))
        shards.open()
        device = device or torch.device("cpu")
        heap.return_free_memory()  # what building the headers took
        with WriteBehind(shards, work.journal, _version(program, shards), WRITERS[device.type]) as behind:
            writer = _Writer(program, source, format, shards, behind, device, step)
            writer.run()
        shards.finish()
        if side_files is not None:
            _copy_side_files(side_files, work.model)
        for name, content in plan.config_files(format, config).items():
            write_json(work.model / (f"{name}{PART}" if name == "config.json" else name), content)
        written = _summed(writer.written, program, plan, format)
        beside(work.model, written)
        work.publish([*shards.names, "config.json"])
    return written


def _summed(written: Written, program: Program, plan: Plan, format: ModuleType) -> Written:
    """With the names and sizes of all that was written."""
    written.excluded = plan.excluded
    written.linears = tuple(key.removesuffix(".weight") for key in plan.linears)
    written.bytes = sum(nbytes(info) for info in plan.infos.values())
    written.source_bytes = sum(nbytes(info) for info in program.hub.tensors.values())
    for key in plan.linears:
        names = [name for name in format.tensor_names(key).values() if name in plan.infos]
        written.quantized_bytes += sum(nbytes(plan.infos[name]) for name in names)
        written.packed_bytes += nbytes(plan.infos[names[0]])  # the packed weight; its scales follow
    return written


def _version(program: Program, shards: Shards) -> str:
    """What the bytes of every piece depend on, besides the source: where tensors lie, and what data showed
    (what was bootstrapped follows from that)."""
    digest = hashlib.blake2b(shards.version.encode(), digest_size=16)
    for name in sorted(program.values.keys() - program.bootstrapped):
        digest.update(json.dumps([name, float(program.values[name])]).encode())
    return digest.hexdigest()


class _Writer:
    """Interprets the program: weights of one source tensor are packed in one launch, scalars come from
    calibration. A weight with its scales, a cache's scales and an untouched tensor are a piece each."""

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        format: ModuleType,
        shards: Shards,
        behind: WriteBehind,
        device: torch.device,
        step: Callable[[], None],
    ) -> None:
        self.program, self.source, self.format, self.shards, self.step = program, source, format, shards, step
        self.behind = behind
        self.cone = WeightCone(program, source, device)
        self.written = Written()
        self.scalars: dict[str, dict[str, Tensor]] = {}
        self.to_copy: deque[tuple[str, str]] = deque()  # name in the output, in the source

    @torch.no_grad()
    def run(self) -> None:
        packing: deque[tuple[list[Node], Tensor, Future[Measured]]] = deque()
        most, limit = PACKERS[self.cone.device.type], PACKED_BYTES[self.cone.device.type]
        copies = self._copies()
        kernels.implementation(torch.empty(0, device=self.cone.device))  # its imports are not to be swept
        with collector.sweeping() as sweep, ThreadPoolExecutor(most, thread_name_prefix="fxq-pack") as packer:
            for weights, values in self.cone.batches(self._to_pack(sweep)):
                packs = [_pack_of(w) for w in weights]
                packing.append((packs, values, packer.submit(self._packed, packs, values)))
                del weights, values, packs  # before the next are asked for
                while len(packing) > most or sum(held.nbytes for _, held, _ in packing) > limit:
                    self._keep(*packing.popleft())
                if self.source.concurrent:  # else nothing is read beside the next weights
                    next(copies, None)  # while others are packed
            while packing:
                self._keep(*packing.popleft())
            deque(itertools.chain(copies, self._copies()), maxlen=0)
        found = self.written.traits  # in one order, whatever was written when
        self.written.traits = dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)))

    def _to_pack(self, sweep: Callable[[], object]) -> Iterator[list[Node]]:
        """The weights that are to be packed, a part of the program at a time; tensors that are to be copied
        are noted. A part's nodes are a cycle, which is gone after a sweep."""
        for graph in self.program.parts():
            sweep()
            weights: list[Node] = []
            for node in graph.nodes:
                if node.target is dialect.PACK:
                    if not self._is_packed(node):
                        weights.append(node_at(node, 0))
                elif node.target is dialect.STORE_KV and node.args[1] is not None:
                    self._store_kv(node)
                elif node.target is dialect.STORE:
                    self.to_copy.append((str(node.args[0]), str(node.args[1].args[0])))
            yield weights

    def _store_kv(self, store: Node) -> None:
        amaxes = [amax_value(node_at(store, i), self.program.values) for i in (1, 2)]
        name = f"{store.args[0]} cache"
        if name not in self.behind.finished:
            self.behind.put(
                [
                    Piece(
                        name,
                        self._whole(self.format.kv_tensors(store.args[0], *amaxes, store.kwargs["format"])),
                    )
                ]
            )

    def _copies(self) -> Iterator[None]:
        """Carry tensors through as they are, a piece at a time."""
        while self.to_copy:
            key, hub_key = self.to_copy.popleft()
            finite = self.behind.finished.get(key)
            if finite is None:
                finite = True
                for part in pieces(self.shards.infos[key], PIECE_BYTES):
                    values = self.source.read_hub(hub_key, part)
                    finite = finite and _is_finite(values)
                    block = self.shards.piece(key, part.start if part else 0, values)
                    self.behind.put([Piece(key, [block], finite, last=self.shards.left(key) == 0)])
                    yield
            if not finite:
                self.written.not_finite.append(key)
            self.step()

    def _is_packed(self, pack: Node) -> bool:
        """Whether an interrupted run wrote all of it."""
        note = self.behind.finished.get(_piece_name(pack))
        if note is None:
            return False
        self._note(pack, Traits.of(note))
        for _ in pack.users:
            self.step()
        return True

    def _note(self, pack: Node, own: Traits) -> None:
        self.written.note(_weight_name(node_at(pack, 0)), node_at(pack, 0).meta["val"].numel(), own)

    def _packed(self, packs: list[Node], values: Tensor) -> Measured:
        """A batch of weights packed, on the device."""
        amax = torch.zeros(len(packs), device=values.device)
        for later in (False, True):
            lot = [i for i, pack in enumerate(packs) if self._is_later(node_at(pack, 1)) is later]
            if lot and later:
                amax[lot] = amax_of(values, lot)
            elif lot:
                known = [amax_value(node_at(packs[i], 1), self.program.values) for i in lot]
                amax[lot] = torch.stack(known).to(amax.device)
        if not bool(amax.isfinite().all()):
            for pack, value in zip(packs, amax, strict=True):
                check_weight(node_at(pack, 0), value)
        return _quantized(packs[0], values, amax)

    def _is_later(self, amax: Node) -> bool:
        return amax.target is dialect.VALUE and self.program.is_later(str(amax.args[0]))

    def _keep(self, packs: list[Node], values: Tensor, packing: Future[Measured]) -> None:
        """Look at a batch that is packed, and have it written."""
        measured = packing.result()
        _check_scales(packs, measured.scale)
        packed = measured.cpu()
        batch = []
        for i, (pack, own) in enumerate(zip(packs, traits(values, measured, _format(packs[0])), strict=True)):
            blocks: list[Block] = []
            zeros: list[str] = []
            for store in pack.users:
                rows = slice(store.kwargs["start"], store.kwargs["end"])
                part = packed.part(i, rows)
                if _is_zero(part.weight) and bool(values[i, rows].any()):
                    zeros.append(str(store.args[0]))
                blocks += self._blocks(store, part)
                self.step()
            own = own._replace(zeros=tuple(zeros))
            self._note(pack, own)
            batch.append(Piece(_piece_name(pack), blocks, own))
        self.cone.release(values)
        self.behind.put(batch)

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


def _weight_name(w: Node) -> tuple[str, int | None]:
    """(parameter, expert or None) of a weight node."""
    expert = None
    while w.op != "get_attr":
        if w.target is dialect.SLICE:
            expert = int_at(w, 1)
        w = node_at(w, 0)
    return str(w.target), expert


def _is_zero(weight: Tensor) -> bool:
    """Whether packed codes [rows, .] stand for zeros alone, of either sign; one look at most weights."""
    codes, magnitude = weight.view(torch.uint8), 0x77 if weight.dtype == torch.uint8 else 0x7F
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
