"""Work directory: lies beside OUT, for one run at a time; kept when that is interrupted, OUT in the end.

.OUT.partial/lock       held by the process that works here; the lock dies with it
.OUT.partial/journal    what the run is, and what it has done
.OUT.partial/statistics-*.safetensors   what its calibration passes found
.OUT.partial/model/     what becomes OUT; its weights and config.json are called *.part until all is there
"""

import errno
import fcntl
import os
import shutil
import zlib
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxq.checkpoint.journal import Journal
from fxq.errors import CheckpointError, FxqError

PART = ".part"


Found = Mapping[str, Mapping[str, Tensor]]


class Calibrations(UserDict[str, Found]):
    """Calibration pass -> what it found (kind -> name -> tensor), on the disk as soon as it is known: tensors
    in a safetensors file of their own, its name and checksum in the journal."""

    def __init__(self, path: Path, journal: Journal) -> None:
        super().__init__()
        self.path, self.journal = path, journal
        for place, name, crc in (record["calibrated"] for record in journal if "calibrated" in record):
            if _checksum(path / name) == crc:
                self.data[place] = _read_found(path / name)

    def __setitem__(self, place: str, found: Found) -> None:
        path = self.path / f"statistics-{len(self.data)}.safetensors"
        tensors = {f"{kind} {n}": t.contiguous() for kind, own in found.items() for n, t in own.items()}
        save_file(tensors, path, metadata={"kinds": " ".join(found)})
        _sync(path)
        _sync(self.path)
        self.journal.append({"calibrated": [place, path.name, _checksum(path)]}, sync=True)
        super().__setitem__(place, found)


def _read_found(path: Path) -> Found:
    with safe_open(path, "pt") as file:
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in file.metadata()["kinds"].split()}
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition(" ")
            found[kind][name] = file.get_tensor(key)
    return found


def _checksum(path: Path) -> int | None:
    """The CRC-32 of a file; None if it is not there."""
    try:
        with path.open("rb") as file:
            crc = 0
            while data := file.read(1 << 24):
                crc = zlib.crc32(data, crc)
            return crc
    except FileNotFoundError:
        return None


class Work:
    """A locked work directory. out: the directory that it becomes, symbolic links followed."""

    def __init__(self, out: Path, path: Path) -> None:
        self.out, self.path, self.model = out, path, path / "model"
        self.journal = Journal(path / "journal")
        self.begun = self.published = False

    @property
    def run(self) -> Mapping[str, Any] | None:
        """What the run is that worked here before; None if there was none."""
        return next((record["run"] for record in self.journal if "run" in record), None)

    def begin(self, run: Mapping[str, Any]) -> None:
        """Say what this run is; CheckpointError if what lies here is of another one.

        run: everything that decides what is written, item -> a value of JSON.
        """
        found = self.run
        if found is None:
            self.journal.append({"run": run}, sync=True)
        else:
            for item in sorted({*run, *found}):
                if run.get(item) != found.get(item):
                    raise CheckpointError(
                        f"{self.path}: cannot resume another run: {_difference(item, run, found)}\n"
                        f"delete {self.path} to start anew, or repeat what was run"
                    )
        self.begun = True

    def calibrations(self) -> Calibrations:
        """What the calibration passes of this run found before it was interrupted, and room for more."""
        return Calibrations(self.path, self.journal)

    def clear(self, parts: Sequence[str]) -> None:
        """Begin to write `parts`, keeping what there is of them: no name is that of a model's file after
        this."""
        self.model.mkdir(exist_ok=True)
        for path in self.model.iterdir():
            if path.name.removesuffix(PART) not in parts:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in parts:
            with suppress(FileNotFoundError):
                os.rename(self.model / name, self.model / f"{name}{PART}")

    def check_space(self, nbytes: int) -> None:
        """CheckpointError if the disk has no room for `nbytes`, what is written already counted in."""
        held = sum(path.stat().st_blocks * 512 for path in self.model.iterdir())
        free = shutil.disk_usage(self.path).free + held
        if free < nbytes:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise CheckpointError(
                f"{self.out}: the output takes {_size(nbytes)}, but {_size(free)} are free there"
            ) from full

    def publish(self, parts: Sequence[str]) -> None:
        """Give `parts` their names, the last only when all others are on the disk, and put the directory
        where it is wanted."""
        sync_tree(self.model)
        *others, last = parts
        for name in others:
            os.rename(self.model / f"{name}{PART}", self.model / name)
        _sync(self.model)
        os.rename(self.model / f"{last}{PART}", self.model / last)
        _sync(self.model)
        os.rename(self.model, self.out)
        self.published = True
        _sync(self.out.parent)

    def leave(self, error: BaseException | None) -> None:
        """Remove the directory if nothing in it helps a later run, else say how to go on."""
        if not self.begun and self.run is not None:
            return  # another run's
        wrong = isinstance(error, FxqError) and not isinstance(error.__cause__, OSError)
        if not (wrong or self.published) and any("piece" in r or "calibrated" in r for r in self.journal):
            if error is not None:
                error.add_note(f"what is done stays in {self.path}: continue with --resume, or delete it")
            return
        shutil.rmtree(self.model, ignore_errors=True)
        for path in self.path.glob("statistics-*.safetensors"):
            path.unlink(missing_ok=True)
        for name in ("journal", "lock"):  # the lock last, so that nobody else is in here before
            with suppress(OSError):
                (self.path / name).unlink()
        with suppress(OSError):
            self.path.rmdir()


@contextmanager
def working(out: Path, *, resume: bool = False) -> Iterator[Work]:
    """The work directory of `out`, locked.

    When the block ends without `publish`, what a later run can use stays: unless an FxqError says that the
    run cannot succeed. Raises CheckpointError if another run works there, if an interrupted one did and
    `resume` is not set, or if the place cannot be used.
    """
    out = Path(os.path.realpath(out))
    path = out.parent / f".{out.name}.partial"
    with writing(out):
        made = _make(out.parent)
    lock = None
    try:
        with writing(out):
            lock = _lock(out, path)
            work = Work(out, path)
        error: BaseException | None = None
        try:
            with writing(out):
                check_empty(out)
            if work.run is not None and not resume:
                raise CheckpointError(
                    f"{out}: an interrupted run left its work in {path}\n"
                    "continue it with --resume (resume=True in python), or delete that directory"
                )
            yield work
        except BaseException as raised:
            error = raised
            raise
        finally:
            work.leave(error)
            work.journal.close()
    finally:
        if lock is not None:
            os.close(lock)
        for directory in made:
            with suppress(OSError):  # not empty, as it should be
                directory.rmdir()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the operating system refuses is a CheckpointError."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else out
        raise CheckpointError(f"{where}: cannot write: {error.strerror or error}") from error


def check_empty(out: Path) -> None:
    """CheckpointError unless a directory can appear at `out`."""
    real = Path(os.path.realpath(out))
    if real.is_symlink():
        raise CheckpointError(f"{out}: a symbolic link that leads nowhere")
    if os.path.lexists(real) and (not real.is_dir() or any(real.iterdir())):
        raise CheckpointError(
            f"{out}: expected a new or empty directory, found {'files in it' if real.is_dir() else 'a file'}"
        )
    if real.is_mount():
        raise CheckpointError(
            f"{out}: a mount point, which no directory can replace; give a new directory in it"
        )


def check_output(out: Path, model: Path | None) -> None:
    """CheckpointError if `out` holds something already, can be no directory, or lies inside the model's."""
    if "\0" in str(out):
        raise CheckpointError(f"{str(out)!r}: a path cannot hold a NUL character")
    with writing(out):
        check_empty(out)
    if model is not None and model.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out}: lies inside the model's directory {model}, which fxq does not touch")


def sync_tree(directory: Path) -> None:
    """Every file and directory below, and itself, to the disk."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(directory: Path) -> list[Path]:
    """Make a directory and its parents; returns those that are new, the deepest first."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return new


# Not filelock: its 3.x releases empty the file of a lock that they fail to get, and with it the number of the
# process that holds it, and where a file system has no flock it leaves a file that outlives a killed process.
def _lock(out: Path, path: Path) -> int:
    """Make and lock the work directory; CheckpointError if another run, here or elsewhere, holds it."""
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has just removed the directory
        try:
            _take(lock, out)
            if _is(lock, path / "lock"):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _take(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = os.pread(lock, 20, 0).decode(errors="replace").strip()
        raise CheckpointError(
            f"{out}: another run (process {process}) is writing it; wait for it, or give another directory"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def _is(file: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _difference(item: str, run: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The item, and where in it the two runs part."""
    ours, theirs = run.get(item), found.get(item)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        inner = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
        return f"{item}: {_difference(inner, ours, theirs)}"
    return f"{item} is {ours}, was {theirs}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
