"""Who may import whom: data walks sources -> trace -> graph -> passes -> run -> checkpoint -> report."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room -> the rooms it may import besides itself and `errors`; those not listed may import anything, and no
# other room imports them.
ROOMS = {
    "numbers": "",
    "graph": "numbers",
    "sources": "graph.hub numbers",
    "trace": "graph",
    "pipeline": "graph numbers",
    "run": "graph numbers",
    "passes": "pipeline run graph numbers",
    "checkpoint": "run graph numbers",
    "report": "checkpoint pipeline graph numbers",
    "view": "report graph",
    "audit": "",
    "errors": "",
    "gc_paused": "",
}
# What is imported from outside in some rooms alone.
FENCED = {"transformers": "trace sources model", "yaml": "pipeline", "rich": "cli", "ctypes": "checkpoint"}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is one of torch's that are not public) of every import of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        assert not getattr(node, "level", 0), f"{file}: a relative import"
        if isinstance(node, ast.Attribute) and re.match(r"torch\._[a-zA-Z]", ast.unparse(node)):
            yield ast.unparse(node), True
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "._" in alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name, name.startswith("torch.") and "._" in name


def broken(file: Path, room: str) -> Iterator[str]:
    """The imports of a file that its room may not have."""
    allowed = ROOMS.get(room)
    for name, private in imports(file):
        top, _, inner = name.partition(".")
        if top == "fxq" and allowed is not None:
            fits = [f"{room}.", "errors.", "__version__.", *(f"{other}." for other in allowed.split())]
            if not any(f"{inner}.".startswith(prefix) for prefix in fits) or (
                room == "passes" == inner.partition(".")[0] and file.stem != "__init__"
            ):
                yield f"{room} imports {name}"
        if room not in FENCED.get(top, room).split():
            yield f"{top} outside of {FENCED[top]}"
        if private and room != "trace":
            yield f"{name}: torch's private names belong in trace"


FILES = [*sorted((ROOT / "fxq").rglob("*.py")), *sorted((ROOT / "passes").glob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_what_its_row_allows(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    assert list(broken(file, parts[1] if parts[0] == "fxq" and len(parts) > 1 else parts[0])) == []
