"""Kill compilations at random moments, resume each, and compare every byte with one that was left alone.

    python benchmarks/kill_and_resume.py MODEL CALIB [--times 20] [--spec S] [--shard-bytes N]

Every third is killed at a random time after it began its work directory, the others when its journal has
grown to a random part of its full size, so that most die while they write.
"""

import argparse
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

_RUN = """
import sys
from pathlib import Path
import fxq
model, calib, out, spec, shard_bytes = sys.argv[1:]
fxq.compile(model, spec, calib=Path(calib), out=out, samples=8, resume=True, shard_bytes=int(shard_bytes))
"""


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """A process that compiles into `out`, resuming what lies there."""
    words = [arguments.model, arguments.calib, out, arguments.spec, arguments.shard_bytes]
    return subprocess.Popen([sys.executable, "-c", _RUN, *map(str, words)])


def journal_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial" / "journal"


def watch(process: subprocess.Popen[bytes], out: Path, *, seconds: float, size: float) -> tuple[float, int]:
    """Wait until a run has had its journal for so long, or that has so many bytes; (how long, bytes) then."""
    journal, begun, held = journal_of(out), time.perf_counter(), 0
    while process.poll() is None:
        try:
            held = max(held, journal.stat().st_size)
        except FileNotFoundError:
            if held == 0:
                begun = time.perf_counter()
        if held and (time.perf_counter() - begun >= seconds or held >= size):
            break
        time.sleep(0.002)
    return time.perf_counter() - begun, held


def stage(out: Path) -> str:
    """What a killed run was doing."""
    journal = journal_of(out)
    text = journal.read_text(errors="replace") if journal.exists() else ""
    for word, name in (("piece", "writing"), ("calibrated", "between calibration and writing")):
        if f'"{word}"' in text:
            return name
    return "tracing or calibrating"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the report, which holds times."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.parent.name != "fxq-report"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--spec", default="nvfp4_default_mse-fp8_cast_kv")
    parser.add_argument("--shard-bytes", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, results = random.Random(arguments.seed), Counter[tuple[str, bool]]()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        process = start(arguments, whole)
        seconds, size = watch(process, whole, seconds=math.inf, size=math.inf)
        if process.wait() != 0:
            return 1
        expected, number = contents(whole), 0
        while results.total() < arguments.times:
            out, number = Path(name) / f"out-{number}", number + 1
            process = start(arguments, out)
            if number % 3 == 0:
                watch(process, out, seconds=seconds * generator.random(), size=math.inf)
            else:
                watch(process, out, seconds=math.inf, size=size * generator.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
            if out.exists():
                continue  # it was faster
            found = stage(out)
            start(arguments, out).wait()
            results[found, out.is_dir() and contents(out) == expected] += 1
            shutil.rmtree(out)
    table = Table("killed while", "runs", "identical after --resume")
    for (found, same), count in sorted(results.items()):
        table.add_row(found, str(count), "yes" if same else "NO")
    Console().print(table)
    return 0 if all(same for _, same in results) else 1


if __name__ == "__main__":
    sys.exit(main())
