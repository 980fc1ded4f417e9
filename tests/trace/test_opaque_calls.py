"""Scans over the sequence are traced as one call of the very function the model runs, and nothing that
quantization must see is hidden in them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import fxq
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.graph.structure.views import is_opaque_call
from fxq.model import open_model
from fxq.run.simulate import simulation
from fxq.trace.opaque_calls import function, is_module, opaque, run

HERE = sys.modules[__name__]
Calls = list[tuple[int, ...]]
CALLS: Calls = []


def running_sum(x: Tensor, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """x [B, S, D] -> sums over the sequence [B, S, D], the last of them [B, D]."""
    state = torch.full_like(x[:, 0], start)
    sums = []
    for t in range(x.shape[1]):
        state = state + x[:, t]
        sums.append(state)
    if x.device.type == "cpu":
        CALLS.append(tuple(x.shape))
    return torch.stack(sums, 1), state


def by_blocks(x: Tensor, chunk_size: int = 4) -> Tensor:
    """No loop, but it says that it works in chunks."""
    return torch.nn.functional.pad(x, (0, 0, 0, chunk_size))[:, : x.shape[1]] * 2


def torch_chunk_gated_delta_rule(x: Tensor) -> Tensor:
    """Called like a scan, and none."""
    return x * 3


def with_weights(x: Tensor, w: Tensor) -> Tensor:
    """A recurrence through a matrix."""
    state = torch.zeros_like(x[:, 0])
    for t in range(3):
        state = torch.tanh(state @ w + x[:, t])
    return x + state[:, None]


def every_other(x: Tensor) -> Tensor:
    """Its result's size is none of its inputs'."""
    picked = [x[:, 0] * 2]
    for _ in range(2):
        picked.append(picked[-1] + 1)
    return torch.cat([x[:, : x.shape[1] // 2], torch.stack(picked, 1)], 1)


ORIGINALS = {
    f.__name__: f
    for f in (running_sum, by_blocks, torch_chunk_gated_delta_rule, with_weights, every_other, Tensor.sum)
}


class Layer(nn.Module):
    """Calls whatever it is given with its input and its weights."""

    def __init__(self, call: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(8, 8) / 8)
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class Asks(nn.Module):
    """Decides by the data."""

    def __init__(self, *stack: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(*stack, 16, 16) / 8)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x @ self.w
        return x - 1


def current(name: str) -> Callable[..., Any]:
    """The function of this file as its callers find it now."""
    found: Callable[..., Any] = getattr(HERE, name)
    return found


def exported(layer: nn.Module, **options: Any) -> ExportedProgram:
    """The layer traced on [3, 17, 8] with scans as"""
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with torch.no_grad(), opaque(layer, **options):
        return torch.export.export(layer, (torch.randn(3, 17, 8),), dynamic_shapes=shapes, strict=False)


def called(graph: Graph) -> list[str]:
    return [str(node.args[0]) for node in graph.nodes if is_opaque_call(node)]


def test_a_scan_is_known_by_its_loop_or_its_chunks_and_never_by_its_name() -> None:
    layer = Layer(lambda self, x: x)
    with opaque(layer):
        replaced = {name for name, f in ORIGINALS.items() if name != "sum" and current(name) is not f}
        assert replaced == {"running_sum", "by_blocks", "with_weights", "every_other"}
        assert Tensor.sum is ORIGINALS["sum"], "functions of other files are left alone"
    assert all(current(name) is f for name, f in ORIGINALS.items() if name != "sum")


@pytest.mark.parametrize("size", [(3, 17, 8), (1, 1, 8), (2, 40, 8)])
def test_an_opaque_call_has_its_inputs_sizes_and_runs_the_model_s_own_function(
    size: tuple[int, ...],
) -> None:
    layer = Layer(
        lambda self, x: torch.cat([running_sum(x)[0] + by_blocks(x), running_sum(x, 1.5)[1][:, None]], 1)
    )
    program = exported(layer)
    names = called(program.graph)
    assert names == [f"{__name__}:{name}" for name in ("running_sum", "by_blocks", "running_sum")]
    assert function(names[0]) is ORIGINALS["running_sum"]
    x = torch.randn(size)
    CALLS.clear()
    found = program.module()(x)
    assert len(CALLS) == 2
    assert set(CALLS) == {size}
    assert torch.equal(found, layer(x))


def test_a_function_that_is_given_a_matrix_of_weights_is_not_hidden() -> None:
    assert called(exported(Layer(lambda self, x: with_weights(x, self.matrix))).graph) == []
    vectors = exported(Layer(lambda self, x: running_sum(x + self.vector)[0]))
    assert called(vectors.graph) == [f"{__name__}:running_sum"]


def test_a_result_whose_size_is_no_input_s_is_traced_into() -> None:
    layer = Layer(lambda self, x: every_other(x))
    program = exported(layer)
    assert called(program.graph) == []
    x = torch.randn(3, 17, 8)
    assert torch.equal(program.module()(x), layer(x))


def test_a_scan_named_transparent_is_traced_into() -> None:
    layer = Layer(lambda self, x: by_blocks(x))
    assert called(exported(layer, but={f"{__name__}:by_blocks"}).graph) == []


def test_patches_are_undone_after_a_failure() -> None:
    asks = Asks()
    layer = nn.Sequential(asks)

    def fail() -> None:
        with opaque(layer, classes={Asks}):
            assert "forward" in vars(asks)
            assert current("running_sum") is not ORIGINALS["running_sum"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(asks)
    assert all(current(name) is f for name, f in ORIGINALS.items() if name != "sum")


def test_an_unknown_opaque_call_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"fxq\.opaque\('elsewhere:scan'\)"):
        run("elsewhere:scan", [], [], "{}")


def test_other_threads_run_the_model_s_own_functions_while_one_traces() -> None:
    x = torch.randn(2, 5, 8)
    results: list[Any] = []

    def elsewhere() -> None:
        try:
            results.append((current("running_sum")(x)[0], mine(torch.ones(2, 16))))
        except Exception as error:
            results.append(error)

    def during(self: Layer, y: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return running_sum(y)[0]

    mine, layer = Asks(), Layer(during)
    layer.asks = Asks()
    wanted = running_sum(x)[0], mine(torch.ones(2, 16))
    program = exported(layer, classes={Asks})
    assert called(program.graph) == [f"{__name__}:running_sum"]
    assert results
    for found in results:
        assert not isinstance(found, Exception), found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Toy(PreTrainedModel):
    """A causal language model around one module."""

    config_class = LlamaConfig
    make: Callable[[], nn.Module]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(32, 16)
        self.inner = type(self).make()
        self.head = nn.Linear(16, 32, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.inner(self.embed(input_ids))))


class Recurrent(nn.Module):
    """Hands a view of its matrix to a scan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(16, 16) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return with_weights(x, self.w.t())


def toy(inner: Callable[[], nn.Module]) -> PreTrainedModel:
    kind = type("Toy", (Toy,), {"make": staticmethod(inner), "__module__": __name__})
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
    }
    model: PreTrainedModel = kind(LlamaConfig(**sizes))
    return model.eval()


def equal_to_eager(model: PreTrainedModel) -> Program:
    traced = open_model(model)
    for size in ((1, 5), (3, 17), (2, 30)):
        ids = torch.randint(0, 32, size)
        (found,) = simulation(traced.program, traced.source, torch.device("cpu")).run_batches([ids])
        with torch.no_grad():
            assert torch.equal(found, model(input_ids=ids).logits)
    return traced.program


def test_a_scan_that_is_given_a_view_of_a_matrix_is_traced_into() -> None:
    program = equal_to_eager(toy(Recurrent))
    assert called(program.graph) == []
    assert "inner.w" in {str(matmul.parameter.target) for matmul in weight_matmuls(program.graph)}


def test_a_module_that_asks_for_data_becomes_one_call() -> None:
    program = equal_to_eager(toy(Asks))
    assert called(program.graph) == ["module:inner"]
    assert is_module("module:inner")
    assert {str(m.parameter.target) for m in weight_matmuls(program.graph)} == {"head.weight"}


def test_a_module_that_asks_for_data_is_refused_if_it_holds_a_stack_of_matrices() -> None:
    with pytest.raises(fxq.TraceError, match=r"inner \(Asks\), test_opaque_calls\.py:\d+: "):
        _ = open_model(toy(lambda: Asks(2))).program
    assert all(current(name) is f for name, f in ORIGINALS.items() if name != "sum")
