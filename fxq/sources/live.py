"""Live model as a source: its parameters in memory, seen under the hub's names."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxq.errors import SourceError
from fxq.graph.hub import Hub, TensorInfo, row_axis
from fxq.sources.conversion import hub_of, own_names, revert
from fxq.sources.directory import Directory
from fxq.sources.parameters import Parameters

# Whose hooks change where a module computes, not what; functools: a partial of theirs.
_LIBRARIES = ("torch", "transformers", "transformers_modules", "accelerate", "functools")


class Live:
    """A live model, left as it is.

    origin: the directory that it came from, which supplies the hub's names and what the model ignores; not if
    the model has other shapes by now (embeddings were resized, say), which makes it one of its own.
    fake: the same class and config on fake tensors, whose names and ties count where wrapping the model
    (FSDP, offloading) hid them; the model itself by default. Raises SourceError with its name for a
    parameter that cannot be read.
    """

    concurrent = False  # the ranks of a sharded model must gather its parameters in one order

    def __init__(
        self, model: PreTrainedModel, origin: Directory | None = None, fake: PreTrainedModel | None = None
    ) -> None:
        _check_not_quantized(model)
        self.parameters, self._fake = Parameters(model), fake or model
        if fake is not None:
            _name_alike(fake, model)
            _check_shapes(self.parameters, fake)
        meta = {name: _meta(self.parameters[name]) for name in own_names(self._fake)}
        infos = {key: TensorInfo.of(tuple(t.shape), t.dtype) for key, t in revert(self._fake, meta).items()}
        self.origin = None if origin is None or _reshaped(infos, origin) else origin
        if self.origin is None:
            self.hub = hub_of(self._fake, infos, type(self._fake).__name__)
        else:
            self.origin.attach(self._fake)
            self.hub = self._in_own_dtypes(self.origin.hub)
        self._where = _places(self.hub)
        self._read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return self._read + (self.origin.bytes_read if self.origin is not None else 0)

    def _in_own_dtypes(self, hub: Hub) -> Hub:
        """The directory's tensors, in the dtypes that the parameters have in memory."""
        tensors = dict(hub.tensors)
        for name, stored in hub.stored.items():
            for key in (key for keys in stored.keys for key in keys):
                tensors[key] = TensorInfo(tensors[key].shape, self.parameters[name].dtype)
        return dataclasses.replace(hub, tensors=tensors, encodings={})

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        value = self.parameters.read(name)
        self._read += value.nbytes
        return value.cpu() if out is None else out.copy_(value)

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        value = self.parameters.read(name)[expert]
        self._read += value.nbytes
        return value.cpu() if out is None else out.copy_(value)

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        if not self._where.get(key) and self.origin is not None:
            return self.origin.read_hub(key, part)
        whole = self._made(key)
        wanted = whole if part is None else whole[part.start : part.stop]
        self._read += wanted.nbytes
        return wanted

    def _made(self, key: str) -> Tensor:
        """A tensor of the checkpoint, out of the parameters that lie there."""
        places = self._where.get(key, ())
        if not places:
            raise SourceError(f"{key}: no parameter of the model makes this tensor")
        if any(self.hub.stored[name].convert is not None for name, _, _ in places):
            names = dict.fromkeys(name for name, _, _ in places)
            return revert(self._fake, {name: self.parameters.read(name) for name in names})[key].cpu()
        info = self.hub.tensors[key]
        axis = row_axis(info.shape)
        out = torch.empty(info.shape, dtype=info.dtype)
        for name, part, expert in places:
            rows = self.hub.stored[name].parts[part].rows
            piece = self._piece(name, part, expert).to(info.dtype)
            if piece.shape == info.shape:
                return piece.cpu()
            out[(slice(None),) * axis + (slice(rows.start, rows.stop, rows.step),)] = piece.cpu()
        return out

    def _piece(self, name: str, part: int, expert: int | None) -> Tensor:
        """The rows of a parameter (or of one expert of it) that a part of it holds."""
        stored = self.hub.stored[name]
        held = self.parameters.read(name) if expert is None else self.parameters.read(name)[expert]
        held = held.mT if stored.transposed else held
        if len(stored.parts) == 1:
            return held
        lengths = [len(p.rows) for p in stored.parts]
        return held.split(lengths, row_axis(held.shape))[part]


def _reshaped(infos: Mapping[str, TensorInfo], origin: Directory) -> bool:
    """Whether tensors of a model have other sizes than in its directory, which may hold them transposed."""
    return any(sorted(origin.infos.get(key, info).shape) != sorted(info.shape) for key, info in infos.items())


def called_otherwise(model: PreTrainedModel) -> list[str]:
    """Modules that compute something else than their class says: another forward or hooks were put on them,
    by code outside of torch, transformers and accelerate (which move tensors)."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks += [vars(module)["forward"]] if "forward" in vars(module) else []
        if any(str(getattr(h, "__module__", "")).partition(".")[0] not in _LIBRARIES for h in hooks):
            found.append(name or type(model).__name__)
    return found


def _check_not_quantized(model: PreTrainedModel) -> None:
    stated = getattr(model.config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and stated is None:
        stated = getattr(quantizer, "quantization_config", quantizer)
    if stated is not None:
        known = stated if isinstance(stated, dict) else vars(stated)
        method = known.get("quant_method", type(stated).__name__)
        raise SourceError(
            f"{type(model).__name__}: this live model is quantized by {getattr(method, 'value', method)}; "
            "fxq reads unquantized live models: dequantize it, or give its directory if that is fp8"
        )


def _name_alike(fake: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let the fake be saved under the names that the model was loaded from; those of a decoded FP8
    checkpoint would have it encoded again."""
    used = getattr(model, "_weight_conversions", None)
    operations = [op for c in used or () for op in getattr(c, "operations", ())]
    if used is not None and not any(type(op).__module__.endswith("finegrained_fp8") for op in operations):
        fake._weight_conversions = used


def _check_shapes(parameters: Parameters, fake: PreTrainedModel) -> None:
    for name, tensor in fake.state_dict().items():
        found = parameters[name].shape if name in parameters else None
        if found != tuple(tensor.shape):
            raise SourceError(
                f"{name}: the model's config makes it {list(tensor.shape)}, the model holds "
                f"{list(found) if found is not None else 'none'}; is it one rank's part of it, or resized?"
            )


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _places(hub: Hub) -> dict[str, list[tuple[str, int, int | None]]]:
    """Tensor of the checkpoint -> (parameter, part of it, expert) of all that lies there."""
    places: dict[str, list[tuple[str, int, int | None]]] = defaultdict(list)
    for name, stored in hub.stored.items():
        for number, part in enumerate(stored.parts):
            for expert, key in enumerate(part.keys):
                places[key].append((name, number, expert if stored.stacked else None))
    return places
