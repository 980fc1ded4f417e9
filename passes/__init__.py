"""The passes, one file each, and the table by which specs find them; third parties add to it."""

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from fxq.errors import SpecError, choices
from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.passes.calibrate_max import CalibrateMax
from fxq.passes.calibrate_mse import CalibrateMse
from fxq.passes.fuse_experts import FuseExperts
from fxq.passes.lower import Lower
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_kv import QuantizeKv
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.passes.sync_groups import SyncGroups
from fxq.pipeline.base import Pass

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        FuseExperts,
        QuantizeLinears,
        QuantizeExperts,
        QuantizeKv,
        SyncGroups,
        CalibrateMax,
        CalibrateBootstrap,
        CalibrateMse,
        Lower,
    )
}
GROUP = "fxq.passes"


def table(more: Iterable[str | Path | type[Pass]] = ()) -> dict[str, type[Pass]]:
    """Every pass by the name that specs use: those here, those of installed packages that declare an entry
    point in the group `fxq.passes`, and `more`: classes, or Python files (`--passes FILE.py`), whose code
    runs and each of whose passes counts.

    Raises SpecError if one cannot be loaded, is no pass, or has a name that another has.
    """
    found, origin = dict(PASSES), dict.fromkeys(PASSES, "fxq")
    for where, cls in [*_installed(), *(item for given in more for item in _given(given))]:
        _check(where, cls)
        if found.setdefault(cls.name, cls) is not cls:
            raise SpecError(
                f"{where}: a pass called {cls.name!r} is known already, from {origin[cls.name]}; "
                f"expected a name other than {choices(found)}"
            )
        origin.setdefault(cls.name, where)
    return found


def _installed() -> Iterator[tuple[str, Any]]:
    for point in importlib.metadata.entry_points(group=GROUP):
        where = f"{point.dist.name if point.dist else 'an installed package'}: {point.value}"
        try:
            yield where, point.load()
        except Exception as error:  # whatever its code raises
            raise SpecError(f"{where}: cannot load this pass: {type(error).__name__}: {error}") from error


def _given(given: str | Path | type[Pass]) -> Iterator[tuple[str, Any]]:
    if inspect.isclass(given):
        yield f"{given.__module__}.{given.__qualname__}", given
        return
    path = Path(given)
    if path.suffix != ".py":
        raise SpecError(f"{path}: expected a Python file with passes, a .py")
    module = _loaded(path)
    own = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Pass) and cls.__module__ == module.__name__
    ]
    if not own:
        raise SpecError(f"{path}: expected a class that subclasses fxq.pipeline.base.Pass, found none")
    yield from ((str(path), cls) for cls in own)


def _loaded(path: Path) -> Any:
    """The module of a file, run once a process under its own name, as `import` would."""
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    name = path.stem if known is None else f"fxq_passes_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever its code raises; FileNotFoundError among them
        del sys.modules[name]
        raise SpecError(f"{path}: cannot load passes: {type(error).__name__}: {error}") from error
    return module


def _check(where: str, cls: Any) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, Pass)):
        raise SpecError(f"{where}: expected a class that subclasses fxq.pipeline.base.Pass, found {cls!r}")
    if not isinstance(getattr(cls, "name", None), str):
        raise SpecError(f'{where}: {cls.__name__} has no name: expected `name: ClassVar[str] = "..."`')
    if not is_dataclass(cls):
        raise SpecError(f"{where}: {cls.__name__} is no dataclass: expected @dataclass(frozen=True) above it")
    try:
        cls()
    except Exception as error:  # TypeError: an option without a default
        raise SpecError(f"{where}: {cls.name}: every option has a default: {error}") from error
