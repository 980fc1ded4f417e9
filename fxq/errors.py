"""What fxq raises: one type a layer, each message saying what was expected, what was found, where, and
the choices."""

from collections.abc import Collection, Iterable


class FxqError(Exception):
    """Base of everything fxq raises on purpose; the command line prints it without a traceback."""

    exit_status = 1

    def __str__(self) -> str:
        """The message; control characters that it quotes from a file are escaped, as terminals obey them."""
        text = super().__str__()
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class SpecError(FxqError):
    """The spec, the command line or the calibration request is wrong; nothing was traced or read."""

    exit_status = 2


class TraceError(FxqError):
    """The model cannot be turned into a graph that fxq understands."""


class VerifyError(FxqError):
    """A graph breaks a rule of the dialect, or a pass did not do what it promised."""


class SourceError(FxqError):
    """The model's files, tensors or calibration lines are missing, malformed or contradict each other."""


class CheckpointError(FxqError):
    """The output cannot be written, or what would be written breaks the checkpoint contract."""


def choices(names: Iterable[object]) -> str:
    """A sorted, comma-separated list for error messages."""
    return ", ".join(sorted(str(name) for name in names)) or "none"


def and_more(names: Collection[object]) -> str:
    """The first of some names, and how many there are besides: "a and 2 more"."""
    return f"{next(iter(names))}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
