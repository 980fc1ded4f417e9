"""Interrupted runs: whatever dies leaves the whole output, or work to go on from; never half a model."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxq
from fxq.checkpoint import workdir
from fxq.checkpoint import writer as checkpoint
from fxq.checkpoint.background import BackgroundWriter, Piece
from fxq.checkpoint.journal import Journal
from fxq.checkpoint.shards import Shards
from fxq.checkpoint.workdir import Work, working
from fxq.graph.hub import Hub, TensorInfo
from fxq.graph.program import Program
from fxq.graph.text import parse
from fxq.pipeline.base import Session
from fxq.run import stages
from fxq.run.statistics import Calibration
from tests.families import Zoo, load, samples, without_times, write_lines, zoo

__all__ = ["zoo"]

# Two linears, half of a fused expert tensor each, a KV cache, and tensors that are carried through.
PROGRAM = """\
%a : f32[] = fxq.value('a')
%q : bf16[32,32] = @q.weight
%q_packed : [u8[32,16], f8e4m3[32,2], f32[]] = fxq.pack(%q, %a, format='nvfp4', scale='mse')
%q_store : none = fxq.store_linear('q', %q_packed, %a, start=0, end=32)
%w0 : bf16[16,32] = @w0
%p0 : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w0, %a, format='nvfp4', scale='max')
%s0 : none = fxq.store_rows('w', %p0, %a, start=0, end=16, rows=[0, 32, 2], shape=[1, 32, 32], expert=0, \
experts=1, transposed=False)
%w1 : bf16[16,32] = @w1
%p1 : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w1, %a, format='nvfp4', scale='max')
%s1 : none = fxq.store_rows('w', %p1, %a, start=0, end=16, rows=[1, 33, 2], shape=[1, 32, 32], expert=0, \
experts=1, transposed=False)
%kv : none = fxq.store_kv('attn', %a, %a, format='fp8')
%embed_ : bf16[64,32] = fxq.load('embed.weight', shape=[64, 32], dtype=torch.bfloat16)
%embed_store : none = fxq.store('embed.weight', %embed_)
%norm_ : bf16[32] = fxq.load('norm.weight', shape=[32], dtype=torch.bfloat16)
%norm_store : none = fxq.store('norm.weight', %norm_)
return ()
"""
SHAPES = {
    "q.weight": (32, 32),
    "w0": (16, 32),
    "w1": (16, 32),
    "embed.weight": (64, 32),
    "norm.weight": (32,),
}
Files = dict[str, bytes]
CPU = torch.device("cpu")


class Given:
    """A source whose tensors are random but always the same."""

    hub = Hub()
    concurrent = False
    bytes_read = 0

    def __init__(self) -> None:
        self.reads: list[str] = []

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        self.reads.append(name)
        generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
        values = torch.randn(SHAPES[name], generator=generator).bfloat16()
        return values if out is None else out.copy_(values)

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        raise AssertionError("nothing here is fused")

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        whole = self.read(key)
        if part is None:
            return whole
        if part.start:  # a read in parts counts once
            self.reads.pop()
        return whole[part.start : part.stop]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1024)


@pytest.fixture
def side(tmp_path: Path) -> Path:
    """The files beside the weights of a model."""
    (tmp_path / "side" / "templates").mkdir(parents=True)
    (tmp_path / "side" / "tokenizer.json").write_text("{}")
    (tmp_path / "side" / "templates" / "chat.jinja").write_text("{{ messages }}")
    return tmp_path / "side"


def _write(
    out: Path, side: Path, *, resume: bool = False, amax: float = 4.0
) -> tuple[checkpoint.Written, Given]:
    program, source = Program(parse(PROGRAM), values={"a": torch.tensor(amax)}), Given()
    with working(out, resume=resume) as work:
        work.begin({"what": "a test"})
        plan = checkpoint.plan(program)
        return checkpoint.write(
            program, plan, source, {"model_type": "x"}, side, work, shard_bytes=2048
        ), source


def _files(directory: Path) -> Files:
    files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return without_times(files)


@pytest.fixture
def whole(tmp_path: Path, side: Path) -> Files:
    """What a run that nothing interrupts writes."""
    _write(tmp_path / "whole", side)
    files = _files(tmp_path / "whole")
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert {"config.json", "model.safetensors.index.json", "templates/chat.jinja"} <= set(files)
    return files


class Crash(BaseException):
    """The process is dead: after this nothing that it does reaches the disk."""


@contextmanager
def dying(at: int) -> Iterator[list[str]]:
    """The disk takes `at` changes, half of one more, and nothing further; yields the changes it took."""
    done: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrap(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= at:
                if len(done) == at and name in ("write", "pwrite"):
                    plain(args[0], args[1][: len(args[1]) // 2], *args[2:])
                done.append("dead")
                raise Crash(name)
            done.append(name)
            return plain(*args, **kwargs)

        patch.setattr(module, name, call)

    for name in ("write", "pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir"):
        wrap(os, name)
    wrap(json, "dump")
    wrap(shutil, "copyfile")
    with patch.context():
        try:
            yield done
        finally:
            patch.undo()


def _looks_like_a_model(directory: Path) -> bool:
    """Whether a loader would take a directory for a model."""
    names = os.listdir(directory)
    return "config.json" in names and any(name.endswith((".safetensors", ".index.json")) for name in names)


def _changes(tmp_path: Path, side: Path) -> list[str]:
    """Every change of the disk that a whole run makes, in order."""
    with dying(10**9) as done:
        _write(tmp_path / "counted", side)
    return done


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_change_of_the_disk_leaves_all_or_work_to_go_on_from(
    stride: int, tmp_path: Path, side: Path, whole: Files
) -> None:
    changes = len(_changes(tmp_path, side))
    assert changes > 60
    resumed_with_less = 0
    for at in range(0, changes, stride):
        out = tmp_path / f"out-{at}"
        with dying(at), pytest.raises(Crash):
            _write(out, side)
        if out.exists():  # it died when all was done, while cleaning up
            assert _files(out) == whole
            continue
        left = [path for path in (out.parent / f".{out.name}.partial").rglob("*") if path.is_dir()]
        for directory in left:
            if _looks_like_a_model(directory):  # only ever the whole one, an instant before it moves
                assert _files(directory) == whole
        _, source = _write(out, side, resume=True)
        assert _files(out) == whole, at
        assert not (out.parent / f".{out.name}.partial").exists()
        resumed_with_less += len(source.reads) < len(SHAPES)
    assert resumed_with_less > changes // stride // 3


def test_what_a_resumed_run_measures_is_what_a_whole_one_does(tmp_path: Path, side: Path) -> None:
    expected, _ = _write(tmp_path / "whole", side)
    for at in range(20, len(_changes(tmp_path, side)) - 30, 7):
        with dying(at), pytest.raises(Crash):
            _write(tmp_path / f"out-{at}", side)
        written, _ = _write(tmp_path / f"out-{at}", side, resume=True)
        assert written == expected
        assert list(written.qualities) == list(expected.qualities)


def _interrupted(tmp_path: Path, side: Path) -> tuple[Path, Path]:
    """(out, work directory) of a run that died when all pieces were written."""
    out = tmp_path / "out"
    with dying(_changes(tmp_path, side).index("dump")), pytest.raises(Crash):
        _write(out, side)
    return out, tmp_path / ".out.partial"


@pytest.mark.parametrize("seed", range(12))
def test_pieces_and_records_that_a_crash_spoiled_are_done_again(
    seed: int, tmp_path: Path, side: Path, whole: Files
) -> None:
    out, work = _interrupted(tmp_path, side)
    generator = random.Random(seed)
    shards = sorted((work / "model").glob("*.safetensors.part"))
    assert shards
    for path in [*generator.sample(shards, 2), work / "journal"]:
        content = bytearray(path.read_bytes())
        harm = generator.choice(["flip", "zero", "cut", "lose"])
        start = generator.randrange(len(content))
        if harm == "flip":
            content[start] ^= 1 << generator.randrange(8)
        elif harm == "zero":
            content[start : start + 300] = bytes(len(content[start : start + 300]))
        elif harm == "cut":
            del content[start:]
        path.write_bytes(content)
        if harm == "lose":
            path.unlink()
    _write(out, side, resume=True)
    assert _files(out) == whole


def test_finished_pieces_are_not_read_again(tmp_path: Path, side: Path, whole: Files) -> None:
    out, _ = _interrupted(tmp_path, side)
    _, source = _write(out, side, resume=True)
    assert _files(out) == whole
    assert source.reads == []


def test_pieces_made_from_other_amaxes_are_not_kept(tmp_path: Path, side: Path) -> None:
    out, _ = _interrupted(tmp_path, side)
    _, source = _write(out, side, resume=True, amax=5.0)
    _write(tmp_path / "whole", side, amax=5.0)
    assert _files(out) == _files(tmp_path / "whole")
    assert sorted(source.reads) == sorted(SHAPES)


def test_resuming_where_nothing_was_begun_simply_begins(tmp_path: Path, side: Path, whole: Files) -> None:
    _write(tmp_path / "out", side, resume=True)
    assert _files(tmp_path / "out") == whole


def test_an_interrupted_run_is_not_overwritten_unasked(tmp_path: Path, side: Path, whole: Files) -> None:
    out, work = _interrupted(tmp_path, side)
    before = _files(work / "model")
    with pytest.raises(fxq.CheckpointError, match=r"interrupted run.*\n.*--resume.*delete") as caught:
        _write(out, side)
    assert str(work) in str(caught.value)
    assert _files(work / "model") == before
    shutil.rmtree(work)
    _write(out, side)
    assert _files(out) == whole


def test_another_run_is_not_resumed_and_not_harmed(tmp_path: Path, side: Path, whole: Files) -> None:
    out, work = _interrupted(tmp_path, side)
    before = _files(work / "model")
    with working(tmp_path / "b") as other:
        other.begin({"files": {"a.safetensors": 1}})
        with pytest.raises(fxq.CheckpointError, match=r"files: a\.safetensors is 2, was 1"):
            other.begin({"files": {"a.safetensors": 2}})
    with pytest.raises(fxq.CheckpointError, match="what is a test, was"), working(out, resume=True) as other:
        other.begin({"what": "a test, was it not"})
    with pytest.raises(fxq.CheckpointError, match="more is 1, was None"), working(out, resume=True) as other:
        other.begin({"what": "a test", "more": 1})
    assert _files(work / "model") == before
    _write(out, side, resume=True)
    assert _files(out) == whole


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (fxq.SourceError("the weight holds NaN"), False),
        (fxq.CheckpointError("a scale is zero"), False),
        (KeyboardInterrupt(), True),
        (MemoryError(), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_work_is_kept_unless_the_run_cannot_succeed(
    error: BaseException,
    kept: bool,
    tmp_path: Path,
    side: Path,
    whole: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "neighbour").write_text("keep me")
    plain, calls = Shards.write, iter(range(100))

    def write(self: Shards, *args: Any) -> int:
        if next(calls) == 6:
            raise error
        return plain(self, *args)

    monkeypatch.setattr(Shards, "write", write)
    with pytest.raises(fxq.CheckpointError if isinstance(error, OSError) else type(error)) as caught:
        _write(tmp_path / "deep" / "out", side)
    monkeypatch.undo()
    work = tmp_path / "deep" / ".out.partial"
    assert work.exists() is kept
    notes = getattr(caught.value, "__notes__", [])
    assert bool(notes) is kept
    assert all("--resume" in note and str(work) in note for note in notes)
    assert (tmp_path / "deep").exists() is kept
    _write(tmp_path / "deep" / "out", side, resume=kept)
    assert _files(tmp_path / "deep" / "out") == whole


def test_an_interrupt_before_anything_is_done_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with working(tmp_path / "a" / "out") as work:
            work.begin({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_any_write_is_named_and_the_run_resumes(
    tmp_path: Path, side: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, total = os.pwrite, sum(len(data) for name, data in whole.items() if name.endswith("safetensors"))
    for room in range(0, total, total // 7):
        out, left = tmp_path / f"out-{room}", [room]

        def pwrite(file: int, data: Any, offset: int, left: list[int] = left) -> int:
            count = min(len(data), left[0])
            if count == 0 and len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= count
            return plain(file, data[:count], offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(fxq.CheckpointError, match="No space left on device"):
            _write(out, side)
        monkeypatch.setattr(os, "pwrite", plain)
        assert not out.exists()
        _write(out, side, resume=True)
        assert _files(out) == whole


def test_a_file_size_limit_shows_before_a_weight_is_read(tmp_path: Path, side: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(fxq.CheckpointError, match=r"cannot write: File too large"):
            _write(tmp_path / "out", side)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["side"]


def test_a_disk_too_small_is_refused_with_both_sizes(
    tmp_path: Path, side: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(fxq.CheckpointError, match=r"takes 0\.01 MB, but 0\.00 MB are free"):
        _write(tmp_path / "out", side)
    assert [path.name for path in tmp_path.iterdir()] == ["side"]


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(
    tmp_path: Path, side: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
    _write(tmp_path / "out", side)
    assert _files(tmp_path / "out") == whole


def test_a_second_run_to_one_place_is_refused_at_once(tmp_path: Path, side: Path, whole: Files) -> None:
    with working(tmp_path / "out") as work:
        for resume in (False, True):
            with pytest.raises(fxq.CheckpointError, match=f"another run .process {os.getpid()}.") as caught:
                _write(tmp_path / "out", side, resume=resume)
            assert str(tmp_path / "out") in str(caught.value)
        caught_there: list[BaseException] = []

        def run() -> None:
            try:
                _write(tmp_path / "out", side)
            except fxq.CheckpointError as error:
                caught_there.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(caught_there) == 1
        assert work.path.exists()
    _write(tmp_path / "out", side)
    assert _files(tmp_path / "out") == whole


HOLDER = """
import sys
from pathlib import Path
from fxq.checkpoint.workdir import working
with working(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_another_process_holds_and_dies_with_it(tmp_path: Path, side: Path, whole: Files) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(fxq.CheckpointError, match=f"process {holder.pid}"):
            _write(tmp_path / "out", side)
        holder.kill()
    assert (tmp_path / ".out.partial" / "lock").exists()
    _write(tmp_path / "out", side)
    assert _files(tmp_path / "out") == whole


def test_an_output_that_appeared_meanwhile_is_left_alone(
    tmp_path: Path, side: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, publish = tmp_path / "out", Work.publish

    def late(work: Work, parts: Sequence[str]) -> None:
        out.mkdir()
        (out / "mine").write_text("mine")
        publish(work, parts)

    monkeypatch.setattr(Work, "publish", late)
    with pytest.raises(fxq.CheckpointError, match="cannot write") as caught:
        _write(out, side)
    monkeypatch.setattr(Work, "publish", publish)
    assert "--resume" in caught.value.__notes__[0]
    assert _files(out) == {"mine": b"mine"}
    shutil.rmtree(out)
    _, source = _write(out, side, resume=True)
    assert _files(out) == whole
    assert source.reads == []


def test_a_symbolic_link_is_followed(tmp_path: Path, side: Path, whole: Files) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    _write(tmp_path / "out", side)
    assert (tmp_path / "out").is_symlink()
    assert _files(tmp_path / "disk" / "out") == whole
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def _file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")


def _parent_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")


def _loop(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")


@pytest.mark.parametrize(
    ("arrange", "out", "message"),
    [
        (_file, "out", "found a file"),
        (_parent_file, "out/model", "out: cannot write: (File exists|Not a directory)"),
        (_loop, "out", "symbolic link"),
        (lambda tmp_path: None, "x" * 250, "File name too long"),
    ],
)
def test_places_that_cannot_be_used(
    arrange: Callable[[Path], None], out: str, message: str, tmp_path: Path, side: Path
) -> None:
    arrange(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(fxq.CheckpointError, match=message):
        _write(tmp_path / out, side)
    assert sorted(tmp_path.iterdir()) == before


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(fxq.CheckpointError, match="mount point"):
        workdir.check_empty(tmp_path / "out")


def test_a_read_only_place_is_named(tmp_path: Path, side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Any, *args: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(fxq.CheckpointError, match=r"\.out\.partial: cannot write: Read-only file system"):
        _write(tmp_path / "out", side)


def test_a_journal_keeps_what_it_was_given_and_nothing_torn(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    values: list[Any] = [{"a": 1}, [1.5, "é"], None, "x\ny"]
    for value in values:
        journal.append(value)
    journal.close()
    whole = (tmp_path / "journal").read_bytes()
    for length in range(len(whole) + 1):
        (tmp_path / "journal").write_bytes(whole[:length])
        journal = Journal(tmp_path / "journal")
        kept = list(journal)
        assert kept == values[: len(kept)]
        journal.append("new")
        assert list(journal)[-1] == "new"
        assert list(journal)[:-1] in (kept, values[: len(kept) + 1])
        journal.close()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Shards]:
    infos = {f"t{i}": TensorInfo((1000,), torch.float32) for i in range(20)}
    made = Shards(tmp_path, infos, 1 << 20)
    made.open()
    yield made
    made.close()


def test_what_fails_behind_is_raised_in_front_as_it_was(
    tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        pass

    def write(self: Shards, *args: Any) -> int:
        raise Odd("the disk burns")

    monkeypatch.setattr(Shards, "write", write)

    def put(keys: Iterable[str]) -> None:
        writer = BackgroundWriter(shards, Journal(tmp_path / "j"), "")
        writer.write((Piece(key, [shards.whole(key, torch.zeros(1000))]) for key in keys), CPU)

    with pytest.raises(Odd, match="the disk burns"):
        put(list(shards.infos)[:10])
    with pytest.raises(Odd, match="the disk burns"):
        put(list(shards.infos)[10:])


def test_what_fails_in_front_ends_the_thread(tmp_path: Path, shards: Shards) -> None:
    before = threading.active_count()

    def pieces() -> Iterator[Piece]:
        yield Piece("t0", [shards.whole("t0", torch.zeros(1000))])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BackgroundWriter(shards, Journal(tmp_path / "j"), "").write(pieces(), CPU)
    assert threading.active_count() == before


def test_few_pieces_are_alive_at_a_time(
    tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.AHEAD, "cpu", 4000)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def pieces() -> Iterator[Piece]:
        nonlocal most
        for key in shards.infos:
            values = torch.zeros(1000)
            alive.append(weakref.ref(values))
            most = max(most, sum(ref() is not None for ref in alive))
            yield Piece(key, [shards.whole(key, values)])

    BackgroundWriter(shards, Journal(tmp_path / "j"), "").write(pieces(), CPU)
    assert most <= 4  # the one being written, those that wait, the one just made
    assert sum(ref() is not None for ref in alive) == 0
    shards.finish()


CALIBRATED = "nvfp4_default-fp8_kv"


@pytest.fixture(scope="module")
def model(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a file beside the weights."""
    path = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path_factory.mktemp("model") / "model"))
    (path / "chat_template.jinja").write_text("{{ messages }}\n")
    return path


def _compile(model: Any, out: Path, **options: Any) -> fxq.Compiled:
    given = {"calib": samples(4), "shard_bytes": 40_000, **options}
    return fxq.compile(model, CALIBRATED, out=out, **given)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, fxq.Compiled]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    compiled = _compile(model, out)
    return _files(out), compiled


def _figures(compiled: fxq.Compiled) -> dict[str, Any]:
    """What a report says of the model, without what it measured of the run, and without the place."""
    report, measured = compiled.report.as_dict(), ("seconds", "peak", "out", "source_bytes_read")
    return {name: value for name, value in report.items() if not name.startswith(measured)}


@pytest.fixture(scope="module")
def left(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a compilation that died in the middle of calibrating and writing."""
    tmp_path = tmp_path_factory.mktemp("left")
    plain, work = Calibration.segments, tmp_path / ".out.partial"

    def die_in_the_last(self: Calibration, batches: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        for resident in plain(self, batches):
            if any("layers.1" in name for name in resident):
                for _ in range(500):  # pieces are written behind
                    if (work / "journal").read_bytes().count(b"piece") >= 15:
                        raise Crash
                    time.sleep(0.01)
                raise AssertionError("nothing was written before")
            yield resident

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "segments", die_in_the_last)
        patch.setitem(stages.AHEAD, "cpu", 1)  # nothing waits that can be written
        patch.setattr(checkpoint, "PIECE_BYTES", 1024)  # as in the runs that go on
        with pytest.raises(Crash):
            _compile(model, tmp_path / "out")
    return work


def _left_calibrated(model: Path, tmp_path: Path) -> Path:
    """The work directory of a compilation that died when it was calibrated and not all was written."""
    plain, work = Shards.write, tmp_path / ".out.partial"

    def write(self: Shards, *args: Any) -> int:
        if list(work.glob("statistics-*.safetensors")):
            raise Crash
        return plain(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "write", write)
        with pytest.raises(Crash):
            _compile(model, tmp_path / "out")
    return work


@pytest.fixture(scope="module")
def left_calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a compilation that died in the middle of writing."""
    return _left_calibrated(model, tmp_path_factory.mktemp("left_calibrated"))


@pytest.fixture
def killed(left: Path, tmp_path: Path) -> Path:
    """Where a compilation died in the middle of calibrating and writing."""
    shutil.copytree(left, tmp_path / left.name)
    return tmp_path / "out"


@pytest.fixture
def calibrated(left_calibrated: Path, tmp_path: Path) -> Path:
    """Where a compilation died in the middle of writing."""
    shutil.copytree(left_calibrated, tmp_path / left_calibrated.name)
    return tmp_path / "out"


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("calibrated again")


def test_calibration_is_not_repeated_and_nothing_differs(
    model: Path, calibrated: Path, uninterrupted: tuple[Files, fxq.Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "segments", _never)
    resumed = _compile(model, calibrated, resume=True)
    files, compiled = uninterrupted
    assert _files(calibrated) == files
    assert _figures(resumed) == _figures(compiled)
    assert all(torch.equal(resumed.scales[name], value) for name, value in compiled.scales.items())
    assert not list(calibrated.parent.glob(".*"))


def test_a_run_that_died_while_calibrating_calibrates_again_and_keeps_what_it_wrote(
    model: Path, killed: Path, uninterrupted: tuple[Files, fxq.Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (killed.parent / ".out.partial" / "journal").read_bytes()
    assert before.count(b"piece") >= 15
    assert b"calibrated" not in before
    plain, written = Shards.write, itertools.count()

    def write(self: Shards, *args: Any) -> int:
        next(written)
        return plain(self, *args)

    monkeypatch.setattr(Shards, "write", write)
    resumed = _compile(model, killed, resume=True)
    files, compiled = uninterrupted
    assert _files(killed) == files
    assert _figures(resumed) == _figures(compiled)
    assert not list(killed.parent.glob(".*"))
    rest = next(written)
    _compile(model, killed.parent / "whole")
    assert rest + 10 < next(written) - rest


@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_statistics_that_a_crash_spoiled_are_found_again(
    harm: str, model: Path, calibrated: Path, uninterrupted: tuple[Files, fxq.Compiled]
) -> None:
    (path,) = (calibrated.parent / ".out.partial").glob("statistics-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if harm == "lose":
        path.unlink()
    _compile(model, calibrated, resume=True)
    assert _files(calibrated) == uninterrupted[0]
    assert not list(calibrated.parent.glob(".*"))


@pytest.mark.slow
def test_a_run_that_calibrated_before_it_wrote_does_not_calibrate_again(
    model: Path, tmp_path: Path, uninterrupted: tuple[Files, fxq.Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "is_deferred", False)
        _left_calibrated(model, tmp_path)
    monkeypatch.setattr(Calibration, "segments", _never)
    _compile(model, tmp_path / "out", resume=True)
    assert _files(tmp_path / "out") == uninterrupted[0]


def test_a_resumed_run_must_be_of_the_same_arguments(model: Path, killed: Path, tmp_path: Path) -> None:
    before = _files(killed.parent / ".out.partial")
    with pytest.raises(fxq.CheckpointError, match=r"calibration is 3 samples of .* was 4 samples"):
        _compile(model, killed, calib=samples(3), resume=True)
    with pytest.raises(fxq.CheckpointError, match=r"passes is .* was"):
        fxq.compile(model, "nvfp4_weight_only", calib=samples(4), out=killed, resume=True, shard_bytes=40_000)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    os.utime(other / "model.safetensors", ns=(0, 10**18))
    with pytest.raises(fxq.CheckpointError, match=r"model: model\.safetensors is .* was"):
        _compile(other, killed, resume=True)
    with pytest.raises(fxq.CheckpointError, match="shard_bytes is 1, was 40000"):
        _compile(model, killed, resume=True, shard_bytes=1)
    with pytest.raises(fxq.SourceError, match=r"nothing\.jsonl"):
        _compile(model, killed, calib=tmp_path / "nothing.jsonl", resume=True)
    assert _files(killed.parent / ".out.partial") == before


@pytest.mark.slow
def test_a_live_model_resumes_while_its_parameters_are_the_same(
    model: Path, killed: Path, tmp_path: Path, uninterrupted: tuple[Files, fxq.Compiled]
) -> None:
    live = load(model)
    with pytest.raises(fxq.CheckpointError, match=r"parameters is in memory, .* was of the files"):
        _compile(live, killed, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "publish", lambda *args: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            _compile(live, tmp_path / "live")
    with torch.no_grad():
        live.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
        with pytest.raises(fxq.CheckpointError, match="parameters is in memory"):
            _compile(live, tmp_path / "live", resume=True)
        live.model.layers[0].self_attn.q_proj.weight[0, 0] -= 1
    _compile(load(model), tmp_path / "live", resume=True)
    ours = _files(tmp_path / "live")
    assert {n: d for n, d in ours.items() if n.endswith("tensors")} == {
        n: d for n, d in uninterrupted[0].items() if n.endswith("tensors")
    }


KILLED = """
import os, signal, sys
from pathlib import Path
import torch, fxq
torch.set_num_threads(1)
model, calib, out, at = sys.argv[1:]
left = int(at)
def wrap(name):
    plain = getattr(os, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(os, name, call)
for name in ("pwrite", "write", "fsync", "rename", "unlink"):
    wrap(name)
spec = "nvfp4_default-fp8_kv"
fxq.compile(Path(model), spec, calib=Path(calib), out=Path(out), resume=True, shard_bytes=40_000)
print(-left)
"""


@pytest.mark.long
def test_kill_9_at_random_moments(model: Path, tmp_path: Path) -> None:
    calib = write_lines(tmp_path / "calib.jsonl", [{"input_ids": ids} for ids in samples(4)])

    def run(out: Path, at: int) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", KILLED, str(model), str(calib), str(out), str(at)]
        return subprocess.run(command, check=False, stdout=subprocess.PIPE)

    changes = int(run(tmp_path / "whole", 0).stdout)
    whole, generator = _files(tmp_path / "whole"), random.Random(0)
    for number in range(5):
        out = tmp_path / f"out-{number}"
        assert run(out, generator.randrange(1, changes - 5)).returncode == -signal.SIGKILL
        assert not out.exists()
        assert run(out, 0).returncode == 0
        assert _files(out) == whole
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_how_to_go_on(
    number: signal.Signals, status: int, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "fxq", "compile", str(model), "--spec", "nvfp4_weight_only"]
    command += ["--out", str(tmp_path / "out")]
    # A shell that started this in the background has SIGINT ignored, and so would the command.
    slow = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    slow += "import os, time; plain = os.pwrite\n"
    slow += "def pwrite(*args): time.sleep(0.05); return plain(*args)\n"
    slow += "os.pwrite = pwrite; from fxq.cli.main import main; raise SystemExit(main())"
    process = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.partial" / "journal"
    while not journal.exists() or journal.read_bytes().count(b"piece") < 10:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, message = process.communicate()
    assert process.returncode == status
    assert f"fxq: interrupted; what is done stays in {journal.parent}" in message
    assert "--resume" in message
    assert "Traceback" not in message
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    assert subprocess.run([*command, "--resume"], check=False, stdout=subprocess.DEVNULL).returncode == 0
    fxq.compile(model, "nvfp4_weight_only", out=tmp_path / "whole")
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
