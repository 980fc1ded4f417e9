"""A model in memory, wherever its parameters lie, read through its state dict under the hub's names."""

import dataclasses
from collections import defaultdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxq.errors import SourceError
from fxq.program import Hub, TensorInfo, row_axis
from fxq.sources.conversion import hub_of, own_names, revert
from fxq.sources.directory import Directory


class Live:
    """A model in memory, read through its state dict; `origin`, the directory it came from, supplies the
    hub's names and what the model ignores."""

    def __init__(self, model: PreTrainedModel, origin: Directory | None = None) -> None:
        self.model, self.origin = model, origin
        self.state = {name: t.detach() for name, t in model.state_dict().items()}
        for name, tensor in self.state.items():
            if tensor.device.type == "meta":
                raise SourceError(
                    f"{name}: its values are not in memory (device meta); load the model without offloading"
                )
        if origin is None:
            reverted = revert(model, {name: self.state[name].to("meta") for name in own_names(model)})
            infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in reverted.items()}
            self.hub = hub_of(model, infos, type(model).__name__)
        else:
            origin.attach(model)
            self.hub = self._in_own_dtypes(origin.hub)
        self._where = _places(self.hub)

    def _in_own_dtypes(self, hub: Hub) -> Hub:
        """The directory's tensors, in the dtypes that the parameters have in memory."""
        tensors = dict(hub.tensors)
        for name, stored in hub.stored.items():
            for key in (key for keys in stored.keys for key in keys):
                tensors[key] = TensorInfo(tensors[key].shape, self.state[name].dtype)
        return dataclasses.replace(hub, tensors=tensors)

    def read(self, name: str) -> Tensor:
        if name not in self.state:
            raise SourceError(f"{name}: the model's state dict has no such tensor")
        return self.state[name].cpu()

    def read_expert(self, name: str, expert: int) -> Tensor:
        return self.state[name][expert].cpu()

    def read_hub(self, key: str) -> Tensor:
        places = self._where.get(key, ())
        if not places:
            if self.origin is None:
                raise SourceError(f"{key}: no parameter of the model makes this tensor")
            return self.origin.read_hub(key)
        if any(self.hub.stored[name].convert is not None for name, _, _ in places):
            names = dict.fromkeys(name for name, _, _ in places)
            return revert(self.model, {name: self.state[name] for name in names})[key].cpu()
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
        held = self.state[name] if expert is None else self.state[name][expert]
        held = held.mT if stored.transposed else held
        if len(stored.parts) == 1:
            return held
        lengths = [len(p.rows) for p in stored.parts]
        return held.split(lengths, row_axis(held.shape))[part]


def _places(hub: Hub) -> dict[str, list[tuple[str, int, int | None]]]:
    """Tensor of the checkpoint -> (parameter, part of it, expert) of all that lies there."""
    places: dict[str, list[tuple[str, int, int | None]]] = defaultdict(list)
    for name, stored in hub.stored.items():
        for number, part in enumerate(stored.parts):
            for expert, key in enumerate(part.keys):
                places[key].append((name, number, expert if stored.stacked else None))
    return places
