"""Arguments that several commands share."""

import contextlib
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def add_model(
    parser: ArgumentParser,
    about: str = "Hugging Face directory with safetensors, or a name in the hub's local cache",
) -> None:
    """The model that a command reads."""
    parser.add_argument("model", metavar="MODEL", type=Path, help=about)


def add_reading(parser: ArgumentParser) -> None:
    """What a model directory may do beyond being read: both are off unless asked for."""
    add = parser.add_argument
    add("--trust-remote-code", action="store_true", help="allow the model directory's own python code to run")
    add("--follow-links", action="store_true", help="follow links that lead out of the model directory")


def add_device(parser: ArgumentParser, about: str) -> None:
    """Which processor is used."""
    about += " (default auto: a GPU if there is one)"
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help=about)


def add_calibration(parser: ArgumentParser) -> None:
    """Text to calibrate on, see `text_of`, and how much of it."""
    add = parser.add_argument
    add(
        "--calib",
        action="append",
        metavar="FILE[=WEIGHT]",
        help='text to calibrate on: .jsonl or .json of {"text": ...}, {"messages": [...]} or {"input_ids": '
        "[...]}, .txt, .parquet, a directory of `datasets`; of several files each gives its share of samples",
    )
    add("--samples", type=int, metavar="N", help="calibration samples to use (default 128)")
    add("--seq-len", type=int, default=512, metavar="L", help="tokens kept of each sample (default 512)")
    add("--pack", action="store_true", help="join samples and cut them into N rows of just L tokens")


def add_passes(parser: ArgumentParser) -> None:
    """Passes that specs may name beside those of fxq and of installed packages."""
    parser.add_argument(
        "--passes",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="a Python file with passes that the spec may name; its code runs (may be given again)",
    )


def add_settings(parser: ArgumentParser) -> None:
    """Options of the spec's passes."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="PASS.OPTION=VALUE",
        help="set an option of the spec's passes of that name (may be given again)",
    )


def add_partial(parser: ArgumentParser) -> None:
    """Whether a spec may be carried out in part."""
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave what cannot be quantized as it is, with a warning, instead of failing",
    )


def add_json(parser: ArgumentParser, about: str = "print it as JSON") -> None:
    """Output for programs."""
    parser.add_argument("--json", action="store_true", help=about)


def text_of(given: Sequence[str] | None) -> object:
    """The text that `FILE[=WEIGHT]`, maybe several of them, stand for: files, the whole name if there is such
    a one."""
    if given is None:
        return None
    parts = [_weighed(name) for name in given]
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    from fxq.sources.samples import Blend

    return Blend(parts)


def _weighed(name: str) -> tuple[Path, float]:
    file, equals, weight = name.rpartition("=")
    if equals and not Path(name).exists():
        with contextlib.suppress(ValueError):
            return Path(file), float(weight)
    return Path(name), 1.0
