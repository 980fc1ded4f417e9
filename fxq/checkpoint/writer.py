"""The writer: interprets a checkpoint program and streams its tensors into safetensors shards, whole or not
at all.

Sizes are known before any weight is read, so headers are written first and every tensor goes straight to its
place: memory is the batch of slices that is computed and, packed, the one before it; not one shard.
"""

import functools
import hashlib
import itertools
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
from fxq.checkpoint.computed import Computed, PackedWeights, Result, format_of, is_finite
from fxq.checkpoint.formats import compressed_tensors, modelopt
from fxq.checkpoint.plan import Plan
from fxq.checkpoint.plan import plan as planned
from fxq.checkpoint.shards import Block, Shards, parts, write_json
from fxq.checkpoint.workdir import PART, Found, Work, writing
from fxq.errors import CheckpointError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import statistics
from fxq.numbers.formats import Packed
from fxq.numbers.nvfp4 import BLOCK
from fxq.numbers.quality import STEPS, Quality
from fxq.run.weights import TensorExpressions
from fxq.run.work import MOVED, ROUNDED, Step, no_step, total

FORMATS: dict[str, ModuleType] = {"modelopt": modelopt, "compressed-tensors": compressed_tensors}
SHARD_BYTES = 5_000_000_000
# Tensors that are carried through are read and written so many bytes at a time.
PIECE_BYTES = 4 << 20
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
    what may explain it. inputs: quantized tensor -> the amax of what it multiplies. not_finite: tensors
    carried through as they are that hold NaN or Inf. steps: blocks by where the search put their scales
    (`fxq.numbers.quality`). cast, inexact: blocks of 16 that were cast from another format, and those of them
    that do not decode to what they were."""

    qualities: dict[tuple[str, int | None], Quality] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    bytes: int = 0
    source_bytes: int = 0
    weights: int = 0
    quantized_bytes: int = 0
    packed_bytes: int = 0
    inputs: dict[str, float] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [0] * len(STEPS))
    cast: int = 0
    inexact: int = 0

    def note(self, name: tuple[str, int | None], weights: int, own: Quality) -> None:
        """Count in one weight; its steps are only kept in the sum."""
        self.steps = [a + b for a, b in zip(self.steps, own.steps or [0] * len(STEPS), strict=True)]
        self.qualities[name] = own._replace(steps=())
        self.weights += weights
        if own.inexact is not None:
            self.cast, self.inexact = self.cast + weights // BLOCK, self.inexact + own.inexact


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
    batches: Sequence[Tensor] = (),
    keep: Callable[[Found], None] = lambda found: None,
    step: Step = no_step,
    beside: Callable[[Path, Written], None] = lambda directory, written: None,
) -> Written:
    """Run the lowered program and turn the work directory into the output, complete.

    plan: what `plan` says of the program. config: the source's config.json. side_files: a directory whose
    tokenizer, chat template and other files are copied as they are, but for those `replaced`: name -> content
    of a JSON file. batches: calibration batches int64 [B, S], for the statistics that are `program.pending`:
    they are found on the way, every weight is packed while it is there for them, and `keep` is given them.
    beside: writes other files into the directory before it appears. What an interrupted run of the same
    program wrote is checked and kept. Raises CheckpointError if there is no room, or if what would be written
    breaks the contract.
    """
    format = FORMATS[program.format]
    shards = Shards(work.model, plan.infos, shard_bytes)
    with writing(work.out), closing(shards):
        work.clear(shards.names)
        work.check_space(sum(shards.sizes))
        shards.open()
        device = device or torch.device("cpu")
        background = BackgroundWriter(shards, work.journal, _version(program, shards))
        writer = _Writer(program, source, format, shards, background.finished, device, batches, keep, step)
        background.write(writer.pieces(), device)
        shards.finish()
        if side_files is not None:
            _copy_side_files(side_files, work.model, replaced)
        for name, content in replaced.items():
            write_json(work.model / name, content)
        config = {**config, **_untied(program, config)}
        for name, content in plan.config_files(format, config).items():
            write_json(work.model / (f"{name}{PART}" if name == "config.json" else name), content)
        written = _summed(writer.finish(), program, plan, format)
        beside(work.model, written)
        work.publish([*shards.names, "config.json"])
    return written


def work(program: Program, batches: Sequence[Tensor]) -> int:
    """What `write` costs, as its `step` counts it."""
    done = 0
    for node in program.graph.nodes:
        if dialect.is_pack(node):
            done += _packing(node)
        elif node.target is dialect.STORE:
            done += MOVED * node_at(node, 1).meta["val"].numel()
    if program.pending is not None and program.calibrated is not None:
        graph, rounds = program.calibrated, program.pending == "quantized"
        done += total(graph, batches, statistics(graph), rounds=rounds)
    return done


def _packing(pack: Node) -> int:
    return int(ROUNDED * node_at(pack, 0).meta["val"].numel())


def _untied(program: Program, config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json must say if a head no longer shares its table with the embedding."""
    if not program.untied:
        return {}
    inner = {name: {**part, "tie_word_embeddings": False} for name, part in config.items() if _ties(part)}
    return {**inner, "tie_word_embeddings": False}


def _ties(part: object) -> bool:
    return isinstance(part, Mapping) and bool(part.get("tie_word_embeddings"))


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
    """What every piece depends on, besides what decides the run: where tensors lie, how they are cut, and
    what calibration found before it began to write."""
    digest = hashlib.blake2b(f"{shards.version} {PIECE_BYTES}".encode(), digest_size=16)
    for name in sorted(program.values) if not program.is_deferred else ():
        value = program.values[name].contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Writer:
    """Runs the program: weights of one source tensor are packed in one launch, statistics come from
    calibration. A weight with its scales, a scale that is known later, a cache's scales and a part of an
    untouched tensor are a piece each."""

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        format: ModuleType,
        shards: Shards,
        finished: Mapping[str, Any],
        device: torch.device,
        batches: Sequence[Tensor],
        keep: Callable[[Found], None],
        step: Step,
    ) -> None:
        self.program, self.source, self.format, self.shards, self.step = program, source, format, shards, step
        self.finished, self.device, self.batches, self.keep = finished, device, batches, keep
        self.written = Written()
        self.scalars: dict[str, dict[str, Tensor]] = {}
        self.unfinished: frozenset[Node] = frozenset()  # those that no interrupted run wrote
        self.uncopied: dict[str, Node] = {}  # tensor of the source -> store that is yet to be made

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        """All that is not finished, weights packed while others are read."""
        nodes = self.program.graph.nodes
        stores = [node for node in nodes if node.target is dialect.STORE]
        loads = [(n, node_at(n, 1)) for n in stores if node_at(n, 1).target is dialect.LOAD]
        self.uncopied |= {str(load.args[0]): store for store, load in loads}
        copies = self._copies()
        left = [node for node in nodes if dialect.is_pack(node) and not self._is_packed(node)]
        left += [n for n in stores if node_at(n, 1).target is not dialect.LOAD and not self._is_stored(n)]
        self.unfinished = frozenset(left)
        computed = Computed(
            self.program,
            self.source,
            self.device,
            left,
            self.uncopied,
            self.batches,
            lambda: self.keep(self.program.found()),
            self.step,
        )
        with closing(computed.results()) as results:
            for result in itertools.chain.from_iterable(results):
                yield from self._pieces_of(result)
                # While calibration is under way it may read them too, and some sources read in order alone.
                if self.program.pending is None and self.source.concurrent:
                    yield from itertools.islice(copies, 1)
        yield from self._scales(self.program.known_values())
        yield from copies

    def _pieces_of(self, result: Result) -> Iterator[Piece]:
        if isinstance(result, PackedWeights):
            yield from self._packed_pieces(result)
        elif node_at(result.store, 1).target is dialect.LOAD:
            yield from self._copied(result.store, functools.partial(_rows, result.value), result.is_finite)
        else:
            key = str(result.store.args[0])
            self.step(MOVED * result.value.numel())
            yield Piece(f"{key} rewritten", self._whole({key: result.value}))

    def _is_stored(self, store: Node) -> bool:
        """Whether an interrupted run wrote a rewritten tensor."""
        done = f"{store.args[0]} rewritten" in self.finished
        if done:
            self.step(MOVED * node_at(store, 1).meta["val"].numel())
        return done

    def _scales(self, values: Mapping[str, Tensor]) -> Iterator[Piece]:
        """The scales of inputs and caches."""
        tensors: dict[str, Tensor] = {}
        scalars = TensorExpressions({}, values, torch.device("cpu"))
        for store in self.program.graph.nodes:
            if store.target is dialect.STORE_KV:
                amaxes = [None if a is None else scalars.one(a) for a in store.args[1:]]
                tensors |= self.format.kv_tensors(store.args[0], *amaxes, store.kwargs["format"])
            elif store.target in (dialect.STORE_LINEAR, dialect.STORE_ROWS) and store.args[2] is not None:
                format = format_of(node_at(store, 1))
                if format.has_amaxes:
                    amax = scalars.one(node_at(store, 2))
                    tensors |= self.format.input_tensors(_key(store), format.name, amax)
                    self.written.inputs[_key(store)] = float(amax)
        name = "scales of inputs and caches"
        if tensors and name not in self.finished:
            yield Piece(name, self._whole(tensors))

    def _copies(self) -> Iterator[Piece]:
        """Tensors that are carried through as they are."""
        while self.uncopied:
            key = next(iter(self.uncopied))
            yield from self._copied(self.uncopied.pop(key), functools.partial(self.source.read_hub, key))

    def finish(self) -> Written:
        """What was written, in one order, whatever was written when."""
        found = self.written.qualities
        self.written.not_finite.sort()
        self.written.qualities = dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)))
        return self.written

    def _copied(
        self, store: Node, read: Callable[[range | None], Tensor], known_finite: bool = False
    ) -> Iterator[Piece]:
        """A tensor of the source, a part at a time; one that is not finite is noted."""
        key, finite = str(store.args[0]), True
        info = self.shards.infos[key]
        for part in parts(info, PIECE_BYTES):
            start = part.start if part else 0
            name = f"{key} from {start}"
            if name not in self.finished:
                values = read(part)
                good = known_finite or is_finite(values)
                yield Piece(name, [self.shards.part(key, start, values)], good)
            else:
                good = self.finished[name]
            finite = finite and good
            rows = info.shape[:1] if part is None else (len(part),)
            self.step(MOVED * math.prod((*rows, *info.shape[1:])))
        if not finite:
            self.written.not_finite.append(key)

    def _is_packed(self, pack: Node) -> bool:
        """Whether an interrupted run wrote all of it."""
        note = self.finished.get(_piece_name(pack))
        if note is None:
            return False
        self._note(pack, Quality.of(note))
        self.step(_packing(pack))
        return True

    def _note(self, pack: Node, own: Quality) -> None:
        self.written.note(_weight_name(node_at(pack, 0)), node_at(pack, 0).meta["val"].numel(), own)

    def _packed_pieces(self, weights: PackedWeights) -> Iterator[Piece]:
        """A piece for each weight of a batch that is packed."""
        _check_scales(weights.packs, weights.packed.scale)
        magnitude = format_of(weights.packs[0]).magnitude
        for i, (pack, own) in enumerate(zip(weights.packs, weights.qualities, strict=True)):
            if pack not in self.unfinished:  # an interrupted run wrote it
                continue
            blocks: list[Block] = []
            zeros: list[str] = []
            for store in pack.users:
                rows = slice(store.kwargs["start"], store.kwargs["end"])
                part = weights.packed.part(i, rows)
                is_zero = not weights.filled[i][cast(int, rows.start)] and _is_zero(part.weight, magnitude)
                if is_zero and bool(weights.values[i, rows].any()):
                    zeros.append(str(store.args[0]))
                blocks += self._blocks(store, part)
            self.step(_packing(pack))
            own = own._replace(zeros=tuple(zeros))
            self._note(pack, own)
            yield Piece(_piece_name(pack), blocks, own)

    def _blocks(self, store: Node, packed: Packed) -> list[Block]:
        """What one store writes."""
        key, format = _key(store), str(node_at(store, 1).kwargs["format"])
        tensors = self.format.weight_tensors(key, packed, format)
        scalars = self.format.scalar_tensors(key, packed, format)
        if store.target is dialect.STORE_LINEAR:
            return self._whole({**tensors, **scalars})
        options, blocks = cast(dict[str, Any], store.kwargs), []
        for name, block in tensors.items():
            turned = block.T if options["transposed"] else block
            rows = range(len(turned)) if options["transposed"] else range(*options["rows"])
            blocks.append(
                self.shards.rows(name, turned, rows, expert=options["expert"], experts=options["experts"])
            )
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


def _key(store: Node) -> str:
    """The tensor that a quantized weight belongs to."""
    return f"{store.args[0]}.weight" if store.target is dialect.STORE_LINEAR else str(store.args[0])


def _piece_name(pack: Node) -> str:
    """What a packed weight becomes: it is the first there."""
    store = next(iter(pack.users))
    if store.target is dialect.STORE_LINEAR:
        return f"{store.args[0]}.weight"
    return f"{store.args[0]} expert {store.kwargs['expert']} rows {store.kwargs['rows']}"


def _weight_name(w: Node) -> tuple[str, int | None]:
    """(parameter, expert or None) of a weight node."""
    expert = None
    while w.op != "get_attr":
        if w.target is dialect.SLICE:
            expert = int_at(w, 1)
        w = node_at(w, 0)
    return str(w.target), expert


def _is_zero(weight: Tensor, magnitude: int) -> bool:
    """Whether packed codes [rows, .] stand for zeros alone, of either sign; magnitude: the bits of a byte of
    codes but their signs."""
    return not bool((weight.view(torch.uint8) & magnitude).any())


def _rows(tensor: Tensor, part: range | None) -> Tensor:
    return tensor if part is None else tensor[part.start : part.stop]


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
