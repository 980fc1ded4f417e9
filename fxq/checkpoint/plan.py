"""What a checkpoint program will write: every tensor, which are quantized, what engines must leave alone.

All of it follows from the program's types, so nothing is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch.fx import Node

from fxq.checkpoint.formats import Scheme
from fxq.errors import CheckpointError
from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.hub import TensorInfo
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.numbers.formats import FORMATS


@dataclass(frozen=True)
class Plan:
    """infos: every output tensor. linears: quantized tensor of the checkpoint -> its scheme. excluded:
    modules that are not quantized. kv_format: that of the cache, if any."""

    infos: dict[str, TensorInfo]
    linears: dict[str, Scheme]
    excluded: tuple[str, ...]
    kv_format: str | None

    def config_files(self, format: ModuleType, source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Name -> content of the files that declare the output; source: the model's own config.json."""
        files = format.config_files(source, self.linears, self.excluded, kv_format=self.kv_format)
        return cast(dict[str, dict[str, Any]], files)


def plan(program: Program, format: ModuleType) -> Plan:
    """The output of a lowered program in a format; CheckpointError if it would break the contract."""
    infos: dict[str, TensorInfo] = {}
    linears: dict[str, Scheme] = {}
    covers: dict[str, _Cover] = {}
    kv_formats: dict[str, None] = {}
    kept: dict[str, TensorInfo] = {}
    for node in program.graph.nodes:
        if node.target is dialect.STORE_ROWS:
            cover = covers.get(key := str(node.args[0]))
            if cover is not None:
                cover.add(node)
                continue
            covers[key] = _Cover(node)
        if node.target is dialect.STORE_KV:
            kv_formats[str(node.kwargs["format"])] = None
        linears |= _quantized(node)
        for name, info in _stored(node, format).items():
            if name in infos:
                raise CheckpointError(
                    f"{name}: two nodes of the program store it, the second is %{node.name}"
                )
            infos[name] = info
            if node.target is dialect.STORE:
                kept[name] = info
    for cover in covers.values():
        cover.check()
    excluded = sorted(_excluded(program, kept, linears))
    made = Plan(infos, linears, tuple(excluded), next(iter(kv_formats), None))
    made.config_files(format, {})  # what the format cannot declare fails here, before anything is read
    return made


def _stored(node: Node, format: ModuleType) -> dict[str, TensorInfo]:
    """The tensors that one store writes, or begins to."""
    options, infos = _options(node), dict[str, TensorInfo]()
    if node.target is dialect.STORE_LINEAR or node.target is dialect.STORE_ROWS:
        ((key, scheme),) = _quantized(node).items()
        shape = options.get("shape")
        if node.target is dialect.STORE_ROWS and any(p.tall > 1 for p in FORMATS[scheme.format].parts):
            title = FORMATS[scheme.format].title
            raise CheckpointError(f"{key}: it holds several weights, of which {title} has one scale; skip it")
        if shape is None:
            shape = options["end"] - options["start"], node_at(node_at(node, 1), 0).meta["val"].shape[-1]
        infos = format.weight_infos(key, shape, scheme, transposed=options.get("transposed", False))
    elif node.target is dialect.STORE_KV:
        infos = format.kv_infos(node.args[0], options["format"], calibrated=node.args[1] is not None)
    elif node.target is dialect.STORE:
        val = node_at(node, 1).meta["val"]
        infos = {str(node.args[0]): TensorInfo.of(tuple(val.shape), val.dtype)}
    return infos


def _quantized(node: Node) -> dict[str, Scheme]:
    """The quantized tensor that a store belongs to -> its scheme; {} for other nodes."""
    if node.target is dialect.STORE_LINEAR:
        return {f"{node.args[0]}.weight": _scheme(node)}
    return {str(node.args[0]): _scheme(node)} if node.target is dialect.STORE_ROWS else {}


def _scheme(store: Node) -> Scheme:
    scheme = Scheme(str(node_at(store, 1).kwargs["format"]), inputs=store.args[2] is not None)
    format = FORMATS[scheme.format]
    if not scheme.inputs and "none" not in format.inputs:
        raise CheckpointError(
            f"{store.args[0]}: its weights are {format.title}, its inputs not; engines know both or none"
        )
    return scheme


def _options(node: Node) -> dict[str, Any]:
    return cast(dict[str, Any], node.kwargs)


class _Cover:
    """Which rows of which expert of a tensor are stored; in the end all must be, once."""

    def __init__(self, node: Node) -> None:
        self.node, self.options = node, _options(node)
        *tall, width = self.options["shape"]
        experts = self.options["experts"]
        rows = width if self.options["transposed"] else math.prod(tall) // experts
        self.stored = torch.zeros(experts, rows, dtype=torch.bool)
        self.add(node)

    def add(self, node: Node) -> None:
        """Count in what `node` stores."""
        options, key = _options(node), node.args[0]
        for option in ("shape", "experts", "transposed"):
            if options[option] != self.options[option]:
                raise CheckpointError(
                    f"{key}: %{node.name} stores into {option} {options[option]}, "
                    f"%{self.node.name} into {self.options[option]}"
                )
        start, stop, step = options["rows"]
        place = self.stored[options["expert"], start:stop:step]
        if bool(place.any()):
            raise CheckpointError(f"{key}: %{node.name} stores rows that are stored already")
        place.fill_(True)

    def check(self) -> None:
        """CheckpointError if a row is missing."""
        if not bool(self.stored.all()):
            expert, row = (~self.stored).nonzero()[0].tolist()
            raise CheckpointError(f"{self.node.args[0]}: nothing stores row {row} of expert {expert}")


def _excluded(program: Program, kept: Mapping[str, TensorInfo], linears: Mapping[str, Scheme]) -> set[str]:
    """The modules that engines must not quantize: those of unquantized matrices, convolutions and tables, of
    whatever a matmul of the graph reads, and those without a tensor of their own."""
    own = {key.removesuffix(".weight") for key in linears}  # a head that was untied has a tensor of its own
    shared = (module for module in program.hub.modules if module not in own)
    modules = {module for module in shared if not _held(program, module) & linears.keys()}
    quantized = [key.removesuffix(".weight") for key in linears]
    read = _read_by_matmuls(program)
    for key, info in kept.items():
        if not info.dtype.is_floating_point or len(info.shape) < 2:
            continue
        if key.endswith(".weight"):
            modules.add(key.removesuffix(".weight"))
        elif (len(info.shape) >= 3 or key in read) and not key.endswith(".bias"):
            modules.add(key)
            # An engine's module holds all of an expert layer's tensors, and its name is what it compares.
            owner = key.rpartition(".")[0]
            if owner and not any(owner in name for name in quantized):
                modules.add(owner)
    return modules


def _held(program: Program, module: str) -> set[str]:
    """The tensors of the checkpoint that a module without any of its own shares with another."""
    stored = program.hub.stored.get(f"{module}.weight")
    return {key for keys in stored.keys for key in keys} if stored is not None else set()


def _read_by_matmuls(program: Program) -> set[str]:
    """Tensors of the checkpoint that matmuls of the graph read."""
    graph, stored = program.calibrated or program.graph, program.hub.stored
    names = {str(matmul.parameter.target) for matmul in weight_matmuls(graph)}
    return {key for name in names if name in stored for keys in stored[name].keys for key in keys}
