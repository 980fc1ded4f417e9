"""A trace that copies modules equals the full trace, and only modules that compute the same are copied."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from transformers import GPT2Config, PreTrainedConfig

from fxq.graph import text
from fxq.graph.program import Program
from fxq.trace import export as tracing
from fxq.trace.fake_model import FakeModel, fake_model_of_config, to_fake
from fxq.trace.repeated_layers import RepeatedLayers
from tests import tiny

WIDTH = 8
LENGTHS = (1, 2, 9, 17, 19, 20, 21, 29, 30, 31, 64, 200)


class Spy(RepeatedLayers):
    """Remembers the last one made."""

    last: Spy

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Spy.last = self


@pytest.fixture(autouse=True)
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "RepeatedLayers", Spy)


def copied() -> list[str]:
    """Modules that the last trace copied."""
    calls = Spy.last.calls
    return [call.module for i, call in enumerate(calls) if call.first != i and not call.closes]


class Toy(nn.Module):
    """Embeds, runs what it is given, and ends in a sum; `run(toy, x)` says how the layers are called."""

    def __init__(self, layers: list[nn.Module], run: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.run = run

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        if self.run is not None:
            x = self.run(self, x)
        else:
            for layer in self.layers:
                x = layer(x)
        return SimpleNamespace(logits=x)


class Layer(nn.Module):
    """x -> x + act(linear(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def fake_of(toy: nn.Module) -> FakeModel:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(toy, mode)
    return FakeModel(toy, SimpleNamespace(model_type="toy"), mode, {})  # type: ignore[arg-type]


def same_as_in_full(make: Callable[[], FakeModel]) -> Program:
    """The program of a trace that copies, after checking that a full trace gives the same."""
    program, full = tracing.trace(make()), tracing.trace(make(), repeats=False)
    assert _dump(program.graph) == _dump(full.graph)
    assert list(program.constants) == list(full.constants)
    for name, value in full.constants.items():
        assert torch.equal(program.constants[name], value), name
    accepted = [[p.accepts(2, length) is None for length in LENGTHS] for p in (program, full)]
    assert accepted[0] == accepted[1]
    return program


def _dump(graph: Graph) -> str:
    """A graph as text, nodes numbered: a full trace makes, and drops, some that take up names."""
    numbers: dict[str, str] = {}
    return re.sub(r"%\w+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), text.dump(graph))


def layers(*options: Any, kind: Any) -> Callable[[], FakeModel]:
    return lambda: fake_of(Toy([kind(option) for option in options]))


def test_layers_that_compute_the_same_are_traced_once() -> None:
    program = same_as_in_full(lambda: fake_of(Toy([Layer() for _ in range(4)])))
    assert copied() == ["layers.1", "layers.2", "layers.3"]
    weights = [n.target for n in program.graph.nodes if n.op == "get_attr"]
    assert weights == [
        "embed.weight",
        *(f"layers.{i}.linear.{w}" for i in range(4) for w in ("weight", "bias")),
    ]


class Scaled(Layer):
    """Its constant is its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_a_constant_tells_layers_apart() -> None:
    same_as_in_full(layers(0.5, 0.25, 0.5, 0.25, kind=Scaled))
    assert copied() == ["layers.2", "layers.3"]


def test_a_trace_leaves_the_model_as_it_was() -> None:
    fake = fake_of(Toy([Layer() for _ in range(4)]))
    before = dict(fake.model.named_parameters())
    program = tracing.trace(fake)
    after = dict(fake.model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not any("forward" in vars(module) for module in fake.model.modules())
    assert {str(n.target) for n in program.graph.nodes if n.op == "get_attr"} == set(before)


def test_layers_that_all_differ_are_traced_in_full() -> None:
    same_as_in_full(layers(*(1 / n for n in range(1, 13)), 0.5, kind=Scaled))
    assert copied() == ["layers.12"]


def test_weights_that_are_read_past_their_layer_are_found() -> None:
    def run(toy: Any, x: Tensor) -> Tensor:
        for layer in toy.layers:
            x = layer(x)
        return x @ toy.layers[2].linear.weight

    program = same_as_in_full(lambda: fake_of(Toy([Layer() for _ in range(4)], run)))
    assert "layers.2.linear.weight" in {n.target for n in program.graph.nodes}


def test_a_buffer_of_a_repeated_layer_is_its_own() -> None:
    class Shifted(Layer):
        shift: Tensor

        def __init__(self, shift: float) -> None:
            super().__init__()
            self.register_buffer("shift", torch.full((WIDTH,), shift))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    program = same_as_in_full(layers(1.0, 2.0, 3.0, kind=Shifted))
    assert copied() == ["layers.1", "layers.2"]
    assert "layers.2.shift" in {n.target for n in program.graph.nodes}


class Asking(Layer):
    """Shorter than its window, it is like any other."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[1] < self.window else x[:, -self.window :])


def test_what_a_copied_layer_asks_about_sizes_guards_the_trace() -> None:
    program = same_as_in_full(layers(30, 20, kind=Asking))
    assert copied() == ["layers.1"]
    assert program.accepts(2, 19) is None
    assert program.accepts(2, 21) is not None


class WithTable(Layer):
    """Adds python numbers, as a tensor."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor(self.numbers)


def test_tensors_written_in_python_tell_layers_apart_by_value() -> None:
    one, two = [1.0] * WIDTH, [2.0] * WIDTH
    program = same_as_in_full(layers(one, two, one, two, kind=WithTable))
    assert copied() == ["layers.2", "layers.3"]
    assert len(program.constants) == 2


class Remembering(Layer):
    """Keeps its result for the next one."""

    def __init__(self, memory: dict[str, Tensor]) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) + self.memory.get("last", 0)
        self.memory["last"] = y * 2
        return y


def test_tensors_passed_on_behind_the_arguments_make_a_full_trace() -> None:
    def make() -> FakeModel:
        memory: dict[str, Tensor] = {}

        def run(toy: Toy, x: Tensor) -> Tensor:
            memory.clear()
            for layer in toy.layers:
                x = layer(x)
            return x

        return fake_of(Toy([Remembering(memory) for _ in range(4)], run))

    program = same_as_in_full(make)
    assert sum(n.target is torch.ops.aten.mul.Tensor for n in program.graph.nodes) == 3


class Counting(Layer):
    """Counts how often it ran."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.count = start

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


def test_a_module_that_keeps_state_is_not_copied_and_runs_once() -> None:
    same_as_in_full(layers(1, 1, kind=Counting))
    assert copied() == []


class InPlace(Layer):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_a_module_that_changes_its_input_is_not_copied() -> None:
    def run(toy: Toy, x: Tensor) -> Tensor:
        return toy.layers[1](x) + toy.layers[0](x) + x

    same_as_in_full(lambda: fake_of(Toy([InPlace(), InPlace()], run)))
    assert copied() == []


class Filling(nn.Module):
    """Leaves a tensor in the dictionary that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["x"] = shared.get("x", x) + 1
        y: Tensor = self.layer(x)
        return y + shared["x"]


def test_a_module_that_fills_an_argument_is_not_copied() -> None:
    def run(toy: Toy, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in toy.layers:
            x = layer(x, shared)
        return x

    same_as_in_full(lambda: fake_of(Toy([Filling(), Filling(), Filling()], run)))
    assert copied() == []


class Two(nn.Module):
    """Blocks within blocks, and a result that is what came in."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = Layer(), Layer(), scale

    def forward(self, x: Tensor, also: Tensor) -> tuple[Tensor, Tensor, int]:
        return self.second(self.first(x)) * self.scale, also, 3


def _pairs(toy: Toy, x: Tensor) -> Tensor:
    also = x * 3
    for layer in toy.layers:
        x, also, number = layer(x, also)
        x = x * number
    return x + also


def test_copies_within_copies() -> None:
    same_as_in_full(lambda: fake_of(Toy([Two(0.5), Two(0.25), Two(0.5)], _pairs)))
    assert copied() == ["layers.0.second", "layers.1.first", "layers.1.second", "layers.2"]


def test_one_layer_called_again_is_its_own_copy() -> None:
    def run(toy: Toy, x: Tensor) -> Tensor:
        for _ in range(3):
            x = toy.layers[0](x)
        return toy.layers[1](x)

    program = same_as_in_full(lambda: fake_of(Toy([Layer(), Layer()], run)))
    assert copied() == ["layers.0", "layers.0", "layers.1"]
    assert len([n for n in program.graph.nodes if n.op == "get_attr"]) == 1 + 4


def test_shared_weights_stay_shared() -> None:
    def make() -> FakeModel:
        toy = Toy([Layer() for _ in range(4)])
        toy.layers[2].linear.weight = toy.layers[0].linear.weight  # type: ignore[union-attr]
        return fake_of(toy)

    program = same_as_in_full(make)
    assert copied() == ["layers.1", "layers.2", "layers.3"]
    weights = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert "layers.2.linear.bias" in weights
    assert "layers.2.linear.weight" not in weights


def test_layers_without_a_repeat_trace_as_ever() -> None:
    same_as_in_full(lambda: fake_of(Toy([Layer()])))
    assert copied() == []


def _family(name: str) -> tiny.Family:
    return next(family for family in tiny.families() if family.name == name)


def _gpt2(**options: Any) -> PreTrainedConfig:
    return GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=64, **options)


@pytest.mark.slow
def test_layers_scaled_by_their_number_are_told_apart() -> None:
    def make(**options: Any) -> Callable[[], FakeModel]:
        return lambda: fake_model_of_config(_gpt2(**options), torch.bfloat16)

    same_as_in_full(make())
    assert copied() == ["transformer.h.1", "transformer.h.2"]
    same_as_in_full(make(scale_attn_by_inverse_layer_idx=True, attn_implementation="eager"))


# Layers differ: dense and sparse, windows, scans, shared blocks, keys and values of others, encoders.
KINDS = (
    "llama",
    "deepseek_v3",
    "qwen3_moe",
    "qwen3_next",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "llama4_text",
    "gpt_oss",
    "mamba",
    "mamba2",
    "jamba",
    "zamba",
    "zamba2",
    "nemotron_h",
    "lfm2_moe",
    "falcon_h1",
    "minimax",
    "phimoe",
    "pegasus",
    "mllama/MllamaForConditionalGeneration",
    "qwen3_5_moe/Qwen3_5MoeForConditionalGeneration",
)
# gemma3n's layers leave keys and values in a dictionary that all are given, so they may be traced in full;
# the tiny configs of the others hold one layer a kind.
NOTHING_COPIED = ("gemma3n_text", "lfm2_moe", "nemotron_h")
SLOW = (
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "mllama/MllamaForConditionalGeneration",
)  # the others are long


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.long) for name in KINDS],
)
def test_copies_equal_the_full_trace(name: str) -> None:
    family = _family(name)
    config = tiny.tiny_config(family, repeat=2)
    config.architectures = [family.architecture]
    same_as_in_full(lambda: fake_model_of_config(config, torch.bfloat16))
    assert copied() or name in NOTHING_COPIED
