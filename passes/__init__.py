"""The passes, one file each, and the table by which specs find them; third parties add to it."""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fxq.errors import SpecError, choices
from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.passes.calibrate_hessian import CalibrateHessian
from fxq.passes.calibrate_max import CalibrateMax
from fxq.passes.calibrate_mse import CalibrateMse
from fxq.passes.cast_mxfp4 import CastMxfp4
from fxq.passes.choose_formats import ChooseFormats
from fxq.passes.fix_input_scales import FixInputScales
from fxq.passes.fold_scales import FoldScales
from fxq.passes.fuse_experts import FuseExperts
from fxq.passes.gptq import Gptq
from fxq.passes.keep_fp8_blocks import KeepFp8Blocks
from fxq.passes.learn import Learn
from fxq.passes.lower import Lower
from fxq.passes.quantize_experts import QuantizeExperts
from fxq.passes.quantize_kv import QuantizeKv
from fxq.passes.quantize_linears import QuantizeLinears
from fxq.passes.resolve_choices import ResolveChoices
from fxq.passes.retarget import Retarget
from fxq.passes.sync_groups import SyncGroups
from fxq.passes.tune_norms import TuneNorms
from fxq.pipeline.base import Pass
from fxq.pipeline.schema import schema

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        FuseExperts,
        QuantizeLinears,
        QuantizeExperts,
        QuantizeKv,
        FoldScales,
        SyncGroups,
        Retarget,
        CalibrateHessian,
        Gptq,
        FixInputScales,
        Learn,
        TuneNorms,
        CalibrateMax,
        CalibrateBootstrap,
        CalibrateMse,
        CastMxfp4,
        ChooseFormats,
        ResolveChoices,
        KeepFp8Blocks,
        Lower,
    )
}
GROUP = "fxq.passes"


def table(more: Iterable[str | Path | type[Pass]] = ()) -> dict[str, type[Pass]]:
    """Every pass by the name that specs use: those here, those of installed packages that declare an entry
    point in the group `fxq.passes`, and `more`: classes, or Python files (`--passes FILE.py`), whose code
    runs and each of whose passes counts.

    Raises SpecError if one that was given cannot be loaded, is no pass, or has a name that another has.
    """
    if isinstance(more, (str, Path)) or not isinstance(more, Iterable):
        raise SpecError(f"passes: expected a list of classes and Python files, found {more!r}")
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
    """The passes of installed packages; one that cannot be loaded is left out with a warning, as it may have
    nothing to do with what is asked for."""
    for point in importlib.metadata.entry_points(group=GROUP):
        where = f"{point.dist.name if point.dist else 'an installed package'}: {point.value}"
        try:
            found = point.load()
            _check(where, found)
        except Exception as error:  # whatever its code raises
            warnings.warn(f"{where}: left out, this pass cannot be loaded: {error}", stacklevel=2)
        else:
            yield where, found


def _given(given: str | Path | type[Pass]) -> Iterator[tuple[str, Any]]:
    if inspect.isclass(given):
        yield f"{given.__module__}.{given.__qualname__}", given
        return
    if not isinstance(given, (str, Path)):
        raise SpecError(f"passes: expected a class or a Python file, found {given!r}")
    path = Path(given)
    if path.suffix != ".py":
        raise SpecError(f"{path}: expected a Python file with passes, a .py")
    module = _loaded(path)
    own = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Pass) and cls.__module__ == module.__name__
    ]
    named = [cls for cls in own if hasattr(cls, "name")]  # one without a name is a base of others
    if not own:
        raise SpecError(f"{path}: expected a class that subclasses fxq.pipeline.base.Pass, found none")
    yield from ((str(path), cls) for cls in named or own)


def _loaded(path: Path) -> Any:
    """The module of a file, run once a process; its name in `sys.modules` says which file it is."""
    name = f"fxq_passes:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
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
    """SpecError unless specs and their schema can use a class as a pass."""
    if not (inspect.isclass(cls) and issubclass(cls, Pass)):
        raise SpecError(f"{where}: expected a class that subclasses fxq.pipeline.base.Pass, found {cls!r}")
    if not isinstance(getattr(cls, "name", None), str):
        raise SpecError(f'{where}: {cls.__name__} has no name: expected `name: ClassVar[str] = "..."`')
    if not dataclasses.is_dataclass(cls):
        raise SpecError(f"{where}: {cls.__name__} is no dataclass: expected @dataclass(frozen=True) above it")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            raise SpecError(f"{where}: {cls.name}: its option {field.name!r} has no default")
    try:
        schema({cls.name: cls})
        cls()
    except Exception as error:  # KeyError: of a type that no spec can give
        raise SpecError(
            f"{where}: {cls.name}: expected options of bool, int, float, str, tuple[str, ...] or Literal, "
            f"whose defaults go together; found {type(error).__name__}: {error}"
        ) from error
