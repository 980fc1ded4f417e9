"""Self-contained pages: a template with its style, its script and its data in one file, nothing fetched."""

import json
from importlib import resources
from typing import Any


def page(name: str, title: str, data: Any) -> str:
    """The page `name`.html of this package; its script finds `data` as JSON in the element `data`."""
    # In a script element only `</` could end it, and `<!--` change how it is read.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    filled = {
        "{{style}}": _read("style.css") + _read(f"{name}.css"),
        "{{script}}": _read(f"{name}.js"),
        "{{title}}": title.replace("&", "&amp;").replace("<", "&lt;"),
        "{{data}}": text.replace("<", "\\u003c"),
    }
    made = _read(f"{name}.html")
    for mark, content in filled.items():
        made = made.replace(mark, content, 1)
    return made


def _read(file: str) -> str:
    return resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
