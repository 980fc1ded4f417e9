"""The pages for users as data: their fenced blocks, commands, links and headings; and the part of them that
is made from the passes."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxq.pipeline.base import Pass
from fxq.pipeline.schema import schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SHELL = {"|", ">", ">>", "&&", ";", "||", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block: the first word after the fence, what is `file=...` there, and the text."""

    page: Path
    language: str
    file: str | None
    text: str


@dataclass(frozen=True)
class Shown:
    """A command of a console block and the output that the page shows for it."""

    command: str
    output: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in their order (of these languages)."""
    found = []
    for info, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        language, _, rest = info.partition(" ")
        if not languages or language in languages:
            found.append(Block(page, language, rest.partition("file=")[2] or None, text))
    return found


def shown(block: Block) -> list[Shown]:
    """The `$ command` lines of a console block, each with what follows it."""
    _, *parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    return [Shown(command, output) for command, output in zip(parts[::2], parts[1::2], strict=True)]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `fxq ...` in the page's sh and console blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    lines += [each.command for block in blocks(page, "console") for each in shown(block)]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;<")
        lexer.whitespace_split = True
        words = list(lexer)
        for start in (i for i, word in enumerate(words) if word == "fxq" or word.endswith("/fxq")):
            rest = words[start + 1 :]
            end = next((i for i, word in enumerate(rest) if word in _SHELL), len(rest))
            yield rest[:end]


def links(page: Path) -> list[str]:
    """Relative links of a page, outside of fenced blocks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in _LINK.findall(text) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings as GitHub spells them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def reference(table: Mapping[str, type[Pass]]) -> str:
    """Every pass and option as a section of Markdown, from the schema and the passes' facts."""
    lines = []
    _, with_options = schema(table)["properties"]["passes"]["items"]["anyOf"]
    for name, made in with_options["properties"].items():
        lines += [f"### {name}", "", made["description"], ""]
        rows = [_row(option, about) for option, about in made["properties"].items()]
        if rows:
            lines += ["| option | values | default | |", "|---|---|---|---|", *rows, ""]
        if order := _order(table[name]):
            lines += [order, ""]
    return "\n".join(lines) + "\n"


def _row(option: str, about: Mapping[str, Any]) -> str:
    listed = "globs" if "glob" in about["description"] else "list"
    values = listed if "anyOf" in about else "true, false" if about.get("type") == "boolean" else "-"
    if "enum" in about:
        values = ", ".join(f"`{value}`" for value in about["enum"] if value is not None)
    default = about["default"] if isinstance(about["default"], str) else json.dumps(about["default"])
    return f"| `{option}` | {values} | `{default}` | {about['description']} |"


def _order(step: type[Pass]) -> str:
    facts = {"Requires": step.requires, "Ensures": step.ensures, "Breaks": step.breaks}
    return " ".join(
        f"{verb} {', '.join(f'`{fact.__name__}`' for fact in held)}." for verb, held in facts.items() if held
    )
