"""Parameters of a live model, one at a time, wherever they lie: on the CPU, on a GPU, offloaded by accelerate
to memory or disk, or sharded over ranks as DTensors (FSDP2)."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxq.errors import SourceError
from fxq.graph.hub import TensorInfo


class Parameters(Mapping[str, TensorInfo]):
    """The state dict of a model by name: shapes and dtypes at hand, values when read. The model stays as it
    is. SourceError names a tensor that cannot be read.

    A DTensor is gathered by all its ranks, so each rank must read the same tensors in the same order. What
    had to be gathered or fetched is kept until another is, so that reading it expert by expert costs it once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            _check_plain(name, parameter, model)
        self._maps = {name: _weights_map(model, name) for name, t in self._held.items() if t.is_meta}
        self._lock = threading.Lock()
        self._fetched: tuple[str, Tensor] = ("", torch.empty(0))

    def __getitem__(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self._held[name].shape), self._held[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def read(self, name: str) -> Tensor:
        """The whole tensor, on whatever device it lies or was gathered to; not to be written to."""
        if name not in self._held:
            raise SourceError(f"{name}: the model's state dict has no such tensor")
        held = self._held[name]
        if name not in self._maps and not isinstance(held, DTensor):
            return held
        with self._lock:
            if self._fetched[0] != name:
                self._fetched = ("", torch.empty(0))
                self._fetched = (name, self._fetch(name))
            return self._fetched[1]

    @torch.no_grad()
    def _fetch(self, name: str) -> Tensor:
        held = self._held[name]
        try:
            if isinstance(held, DTensor):
                found = held.full_tensor()
            else:
                weights_map, key = self._maps[name]
                found = weights_map[key].detach()
        except Exception as error:  # whatever a process group, a disk or an offload index raises
            reason = (str(error).splitlines() or [""])[0][:200]
            raise SourceError(f"{name}: cannot be read: {type(error).__name__}: {reason}") from error
        if found.is_meta or TensorInfo(tuple(found.shape), found.dtype) != self[name]:
            raise SourceError(
                f"{name}: expected {list(held.shape)} {held.dtype}, found {list(found.shape)} {found.dtype} "
                f"on {found.device} where it is offloaded to"
            )
        return found


def _check_plain(name: str, parameter: Tensor, model: nn.Module) -> None:
    kind = type(parameter.data)
    if kind not in (Tensor, DTensor) or (parameter.dtype.itemsize == 1 and parameter.dtype != torch.bool):
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        raise SourceError(
            f"{name}: {owner} holds it as {kind.__name__} of {parameter.dtype}: it is quantized already; fxq "
            "reads parameters of 16 bits or more"
        )


def _weights_map(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor], str]:
    """Where accelerate keeps a tensor that it took out of the model: (map, name there)."""
    owner, _, key = name.rpartition(".")
    while True:
        for hook in _hooks(model.get_submodule(owner)):
            weights_map = getattr(hook, "weights_map", None)
            if weights_map is not None:
                return weights_map, key
        if not owner:
            raise SourceError(
                f"{name}: its values are not in memory (device meta), and no offloading hook of accelerate "
                "knows where they are"
            )
        owner, _, last = owner.rpartition(".")
        key = f"{last}.{key}"


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate put on a module, those inside a SequentialHook too."""
    found: list[Any] = [getattr(module, "_hf_hook", None)]
    while found:
        hook = found.pop(0)
        if hook is not None:
            yield hook
            found += getattr(hook, "hooks", ())
