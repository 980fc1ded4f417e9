"""Arguments of fxq's functions, checked before anything is read."""

import numbers
import os
from typing import Any

from fxq.errors import SpecError


def check_counts(least: int = 1, **given: object) -> None:
    """SpecError unless all are integers from `least` on."""
    for name, value in given.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise SpecError(f"{name} is at least {least}, a whole number; found {_short(value)}")


def check_flags(**given: object) -> None:
    """SpecError unless all are True or False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise SpecError(f"{name}: expected True or False, found {_short(value)}")


def check_path(name: str, value: Any) -> None:
    """SpecError unless a value names a file or directory, or is None."""
    if value is not None and not (isinstance(value, (str, os.PathLike)) and str(value)):
        raise SpecError(f"{name}: expected a path, found {_short(value)}")


def check_callable(name: str, value: object) -> None:
    """SpecError unless a value can be called, or is None."""
    if value is not None and not callable(value):
        raise SpecError(f"{name}: expected a function or None, found {_short(value)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__
