"""Symbolic sizes of an export graph: their example values, and which of them only the data knows."""

from collections.abc import Mapping
from typing import Any

import torch


def backed(size: torch.SymInt) -> Mapping[Any, Any]:
    """Symbols that stand for sizes of the model's inputs -> their example values."""
    environment: Any = size.node.shape_env
    if hasattr(environment, "backed_var_to_val"):
        return environment.backed_var_to_val
    return environment.var_to_val  # its name before torch 2.12


def data_symbols(size: object) -> list[Any]:
    """The symbols in a size that stand for data, not for the sizes of the inputs."""
    if not isinstance(size, torch.SymInt):
        return []
    return [s for s in size.node.expr.free_symbols if s not in backed(size)]


def examples(sizes: list[Any]) -> dict[Any, int]:
    """All symbols in some sizes that have an example value -> that value."""
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    return {
        s: int(backed(size)[s]) for size in symbolic for s in size.node.expr.free_symbols if s in backed(size)
    }


def size_at(size: Any, at: Mapping[Any, int]) -> int:
    """A size with its symbols at given values."""
    return int(size.node.expr.subs(dict(at))) if isinstance(size, torch.SymInt) else int(size)
