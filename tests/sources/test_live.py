"""Live models are read alike wherever their parameters lie, and stay as they are."""

from __future__ import annotations

import copy
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxq
from fxq.checkpoint import writer as checkpoint
from fxq.model import open_model
from fxq.sources import Directory, Live
from fxq.sources.parameters import Parameters
from tests.families import EXPERTS, Zoo, load, zoo

__all__ = ["zoo"]

FAMILIES = ["qwen3_moe", "llama_tied"]
SPEC = "nvfp4_weight_only"

Offload = Callable[[str], PreTrainedModel]


def _loaded_offloaded(zoo: Zoo, folder: Path) -> Offload:
    """Layer 1 on disk (transformers' own loading), the rest in memory."""

    def load_(family: str) -> PreTrainedModel:
        parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        return load(zoo(family), device_map=parts | rest, offload_folder=folder)

    return load_


def _to_memory(zoo: Zoo, folder: Path) -> Offload:
    def load_(family: str) -> PreTrainedModel:
        accelerate = pytest.importorskip("accelerate")
        model: PreTrainedModel = accelerate.cpu_offload(load(zoo(family)), execution_device="cpu")
        return model

    return load_


def _to_disk(zoo: Zoo, folder: Path) -> Offload:
    def load_(family: str) -> PreTrainedModel:
        accelerate = pytest.importorskip("accelerate")
        model: PreTrainedModel = accelerate.disk_offload(load(zoo(family)), folder, execution_device="cpu")
        return model

    return load_


@pytest.fixture(params=[_loaded_offloaded, _to_memory, _to_disk])
def offloaded(request: pytest.FixtureRequest, zoo: Zoo, tmp_path: Path) -> Offload:
    """Loads a family with parameters that are not in the model."""
    pytest.importorskip("accelerate")
    kind: Callable[[Zoo, Path], Offload] = request.param
    return kind(zoo, tmp_path / "offloaded")


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _shard(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)  # type: ignore[return-value]


def _state(model: nn.Module) -> dict[str, tuple[int, str, Tensor | None]]:
    """Identity, kind and values of everything a model holds, and of its modules' attributes."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        name: (
            id(t),
            f"{type(t)} {t.device} {t.dtype} {t.requires_grad}",
            None if t.is_meta else t.detach().clone(),
        )
        for name, t in held.items()
    }


def _unchanged(model: nn.Module, before: dict[str, tuple[int, str, Tensor | None]]) -> None:
    after = _state(model)
    assert after.keys() == before.keys()
    for name, (identity, kind, values) in before.items():
        assert after[name][:2] == (identity, kind), name
        found = after[name][2]
        assert (values is None) == (found is None)
        if isinstance(values, DTensor) and isinstance(found, DTensor):
            assert torch.equal(values.to_local(), found.to_local())
        elif values is not None and found is not None:
            assert torch.equal(values, found)


def _reads_as(live: Live, directory: Directory) -> None:
    assert set(live.hub.stored) == set(directory.hub.stored)
    assert set(live.hub.tensors) == set(directory.hub.tensors) - set(directory.hub.extra)
    for key in live.hub.tensors:
        assert torch.equal(live.read_hub(key), directory.read_hub(key)), key
    for name, stored in directory.hub.stored.items():
        assert torch.equal(live.read(name), directory.read(name)), name
        if stored.stacked:
            for expert in range(EXPERTS):
                assert torch.equal(live.read_expert(name, expert), directory.read_expert(name, expert))


def _same_output(one: Path, other: Path) -> None:
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_parameters_are_read(family: str, offloaded: Offload, zoo: Zoo) -> None:
    model = offloaded(family)
    assert any(p.is_meta for p in model.parameters())
    before = _state(model)
    directory = Directory(zoo(family))
    opened = open_model(model)
    directory.attach(opened.fake.model)
    _reads_as(Live(model, None, opened.fake.model), directory)
    _reads_as(opened.source, directory)  # type: ignore[arg-type]
    _unchanged(model, before)


@pytest.mark.slow
def test_an_offloaded_model_compiles_like_its_directory(offloaded: Offload, zoo: Zoo, tmp_path: Path) -> None:
    model = offloaded("llama_tied")
    before = _state(model)
    fxq.compile(model, SPEC, out=tmp_path / "live")
    fxq.compile(zoo("llama_tied"), SPEC, out=tmp_path / "directory")
    _same_output(tmp_path / "live", tmp_path / "directory")
    _unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_parameters_are_gathered(family: str, world: None, zoo: Zoo) -> None:
    model = _shard(load(zoo(family)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    before = _state(model)
    directory, opened = Directory(zoo(family)), open_model(model)
    directory.attach(opened.fake.model)
    _reads_as(opened.source, directory)  # type: ignore[arg-type]
    _reads_as(Live(model, None, opened.fake.model), directory)
    _unchanged(model, before)


@pytest.mark.slow
def test_a_sharded_model_compiles_like_its_directory(world: None, zoo: Zoo, tmp_path: Path) -> None:
    fxq.compile(_shard(load(zoo("llama_tied"))), SPEC, out=tmp_path / "live")
    fxq.compile(zoo("llama_tied"), SPEC, out=tmp_path / "directory")
    _same_output(tmp_path / "live", tmp_path / "directory")


def test_a_sharded_model_from_nowhere_is_named_by_its_own_class(
    world: None, zoo: Zoo, tmp_path: Path
) -> None:
    model = load(zoo("qwen3_moe"))
    model.config._name_or_path = ""
    model.config.architectures = None
    opened = open_model(_shard(model))
    assert opened.config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert set(opened.source.hub.tensors) == set(Directory(zoo("qwen3_moe")).infos)


def test_a_fused_parameter_is_gathered_once_for_all_its_experts(
    world: None, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(_shard(load(zoo("qwen3_moe"))), None, load(zoo("qwen3_moe")))
    gathered: list[DTensor] = []
    plain = DTensor.full_tensor

    def full_tensor(self: DTensor) -> Tensor:
        gathered.append(self)
        return plain(self)

    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    for expert in range(EXPERTS):
        live.read_expert("model.layers.0.mlp.experts.down_proj", expert)
    assert len(gathered) == 1


class Broken(dict[str, Tensor]):
    """An offload map whose disk is gone."""

    def __getitem__(self, key: str) -> Tensor:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("weights", "word"),
    [({}, "KeyError"), (Broken(), "Input/output error"), ({"weight": torch.zeros(3)}, r"\[3\]")],
)
def test_an_offloaded_parameter_that_cannot_be_read_is_named(weights: dict[str, Tensor], word: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False, device="meta"))
    hooks = [SimpleNamespace(), SimpleNamespace(weights_map=weights)]
    object.__setattr__(model[0], "_hf_hook", SimpleNamespace(hooks=hooks))
    parameters = Parameters(model)
    with pytest.raises(fxq.SourceError, match=rf"^0\.weight: .*{word}"):
        parameters.read("0.weight")


def test_a_gathering_that_fails_is_named(world: None, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = Parameters(_shard(load(zoo("llama"))))

    def fail(self: DTensor) -> Tensor:
        raise RuntimeError("a rank is gone")

    monkeypatch.setattr(DTensor, "full_tensor", fail)
    with pytest.raises(fxq.SourceError, match=r"^model\.norm\.weight: .*a rank is gone"):
        parameters.read("model.norm.weight")


def test_a_part_of_a_parameter_is_not_taken_for_all_of_it(zoo: Zoo) -> None:
    model, other = load(zoo("llama")), load(zoo("llama"))
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 64).bfloat16())
    with pytest.raises(fxq.SourceError, match=r"layers\.1\.mlp\.up_proj\.weight.*\[96, 64\].*\[48, 64\]"):
        Live(model, None, other)


def test_a_quantized_live_model_is_refused_by_method(zoo: Zoo) -> None:
    model = load(zoo("llama"))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(fxq.SourceError, match=r"LlamaForCausalLM.*quantized by bitsandbytes"):
        fxq.compile(model, SPEC)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_parameter_is_refused_by_name(dtype: torch.dtype, zoo: Zoo) -> None:
    model = load(zoo("llama"))
    packed = nn.Parameter(torch.zeros(96, 64).to(dtype), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(fxq.SourceError, match=r"layers\.1\.mlp\.up_proj\.weight: Linear.*quantized"):
        fxq.compile(model, SPEC)


def test_a_model_decoded_from_fp8_while_loading_is_read_as_it_is(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tests.sources.test_encodings_fp8 import fp8_copy

    path = fp8_copy(zoo("qwen3_moe"), tmp_path / "fp8", (16, 16))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    live, directory = open_model(model).source, Directory(path)
    assert isinstance(live, Live)
    directory.attach(load(zoo("qwen3_moe")))
    _reads_as(live, directory)
    model.config._name_or_path = ""
    assert set(open_model(model).source.hub.tensors) == set(directory.infos)


def test_a_model_of_several_dtypes_keeps_them(zoo: Zoo) -> None:
    model = copy.deepcopy(load(zoo("llama")))
    model.model.norm.float()
    opened = open_model(model)
    assert opened.source.read("model.norm.weight").dtype == torch.float32
    assert opened.source.hub.tensors["model.norm.weight"].dtype == torch.float32


def _two_ranks(rank: int, port: int, path: Path, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    fxq.compile(_shard(load(path)), SPEC, out=out / str(rank))
    dist.destroy_process_group()


def test_parameters_are_read_one_at_a_time_and_in_one_order(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of a sharded model is a collective: ranks must come to them in the same order."""
    plain, inside = Parameters.read, threading.Lock()
    orders: list[list[str]] = []

    def read(self: Parameters, name: str) -> Tensor:
        assert inside.acquire(blocking=False), f"{name} is read beside another"
        try:
            time.sleep(random.random() / 500)
            orders[-1].append(name)
            return plain(self, name)
        finally:
            inside.release()

    monkeypatch.setattr(Parameters, "read", read)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1024)
    for run in range(2):
        orders.append([])
        fxq.compile(load(zoo("qwen3_moe")), SPEC, out=tmp_path / str(run))
    assert len(orders[0]) > 40
    assert orders[0] == orders[1]


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(zoo: Zoo, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_two_ranks, (port, zoo("qwen3_moe"), tmp_path), nprocs=2)
    fxq.compile(zoo("qwen3_moe"), SPEC, out=tmp_path / "directory")
    for rank in range(2):
        _same_output(tmp_path / str(rank), tmp_path / "directory")
