"""The exclude list: every linear that is not quantized, nothing that is, in a form that all engines match."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

from fxq.audit.checkpoint import COMPRESSED, CONFIG, Checkpoint
from fxq.audit.experts import COUNTS
from fxq.audit.findings import Finding
from fxq.audit.fusion import merged_name
from fxq.audit.store import Entry

_EMBEDDING = re.compile(r".*(embed(?!_out)|embd|wte|wpe|token_type|position).*")


@dataclass(frozen=True)
class Entries:
    """An exclude list as each engine matches it; names are (the hub's, vLLM's after merging)."""

    listed: tuple[str, ...]
    regex: bool  # compressed-tensors: exact names and `re:`, no globs

    @cached_property
    def exact(self) -> set[str]:
        """The entries as plain names."""
        return set(self.listed)

    def engines(self, hub: str, merged: str) -> list[str]:
        """The engines that leave this module alone."""
        return [name for name, matches in self._engines.items() if hub in self.exact or matches(hub, merged)]

    def hit(self, hub: str, merged: str) -> str | None:
        """The first entry by which some engine takes a module for an unquantized one."""
        if not self.engines(hub, merged):
            return None
        alone = (Entries((entry,), self.regex) for entry in self.listed)
        return next((e.listed[0] for e in alone if e.engines(hub, merged)), None)

    @cached_property
    def _engines(self) -> dict[str, Callable[[str, str], bool]]:
        if self.regex:
            return {"vLLM": lambda hub, merged: _found(self._regex, hub)}
        return {"vLLM": self._vllm, "SGLang": self._sglang, "TensorRT-LLM": self._tensorrt}

    def _vllm(self, hub: str, merged: str) -> bool:
        """Any entry as a substring of its own name, or as a glob of it."""
        return any(entry in merged for entry in self.listed) or _found(self._glob, merged)

    def _sglang(self, hub: str, merged: str) -> bool:
        """`*` only, of the whole name or of one dotted part of it."""
        return any(_found(self._stars, text) for text in (hub, *hub.split(".")))

    def _tensorrt(self, hub: str, merged: str) -> bool:
        """Globs of the whole name."""
        return _found(self._glob, hub)

    @cached_property
    def _glob(self) -> re.Pattern[str] | None:
        return _any_of(translate(entry) for entry in self.listed if any(c in entry for c in "*?["))

    @cached_property
    def _stars(self) -> re.Pattern[str] | None:
        return _any_of(re.escape(entry).replace(r"\*", ".*") for entry in self.listed if "*" in entry)

    @cached_property
    def _regex(self) -> re.Pattern[str] | None:
        return _any_of(f"{entry.removeprefix('re:')}.*" for entry in self.listed if entry.startswith("re:"))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    made = [f"(?:{pattern})" for pattern in patterns]
    try:
        return re.compile("|".join(made)) if made else None
    except re.error:
        return None


def _found(pattern: re.Pattern[str] | None, text: str) -> bool:
    return pattern is not None and pattern.fullmatch(text) is not None


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Both directions: nothing unquantized is missing, nothing quantized is hit."""
    entries = Entries(checkpoint.declared.excluded, checkpoint.declared.format == COMPRESSED)
    modules = set(checkpoint.linears) | set(checkpoint.matrices)
    if checkpoint.declared.algorithm != "MIXED_PRECISION":
        yield from _missing(checkpoint, entries, modules)
        yield from _head(checkpoint, entries)
    yield from _hits(checkpoint, entries, modules)
    for entry, count in Counter(entries.listed).items():
        if count > 1:
            yield Finding("exclude-twice", f"exclude list: {entry}", f"listed {count} times")
    yield from _unknown(checkpoint, entries)


def _missing(checkpoint: Checkpoint, entries: Entries, modules: set[str]) -> Iterator[Finding]:
    counts = checkpoint.number(*COUNTS)
    for name, entry in sorted(checkpoint.matrices.items()):
        stacked = f"{name}.weight" not in checkpoint.store.entries
        # An engine's module owns all tensors of a layer's experts.
        candidates = (name, name.rpartition(".")[0]) if stacked else (name,)
        found = {e for c in candidates for e in entries.engines(c, merged_name(c, modules))}
        if len(found) == len(entries._engines):
            continue
        if found:
            lacking = ", ".join(engine for engine in entries._engines if engine not in found)
            yield Finding(
                "exclude-unportable", name, f"expected under its full name; {lacking} would quantize it"
            )
        elif _is_embedding(name, entry, stacked):
            yield Finding("exclude-embedding", name, f"{entry} is not listed")
        else:
            router = "a router, " if entry.shape[0] in counts and len(entry.shape) == 2 else ""
            yield Finding(
                "exclude-missing", name, f"expected in the exclude list ({router}{entry}); found no match"
            )


def _is_embedding(name: str, entry: Entry, stacked: bool) -> bool:
    """Tables and convolutions, which no engine quantizes unasked."""
    convolution = len(entry.shape) > 2 and not stacked
    return convolution or _EMBEDDING.fullmatch(name.rpartition(".")[2]) is not None


def _head(checkpoint: Checkpoint, entries: Entries) -> Iterator[Finding]:
    modules = set(checkpoint.linears) | set(checkpoint.matrices)
    stored = any(name.rpartition(".")[2] == "lm_head" for name in modules)
    tied = checkpoint.config.get("tie_word_embeddings") is True and not stored
    if tied and not any("lm_head" in entry for entry in entries.listed):
        yield Finding(
            "exclude-embedding", "lm_head", "tied and without a tensor, yet best listed; found no entry"
        )


def _hits(checkpoint: Checkpoint, entries: Entries, modules: set[str]) -> Iterator[Finding]:
    """Entries that an engine takes for a quantized module; experts count once a layer."""
    prefixes: dict[str, str] = {}
    for name, linear in checkpoint.linears.items():
        if name in entries.exact:
            yield Finding("exclude-quantized", name, "quantized, and listed as not")
            continue
        owner = name.rpartition(".")[0] if linear.fused else merged_name(name, modules)
        prefixes.setdefault(owner, name)
    for prefix, name in prefixes.items():
        if (entry := entries.hit(name, prefix)) is not None:
            yield Finding(
                "exclude-quantized", name, f"quantized, but the entry {entry!r} matches it (as {prefix})"
            )


def _unknown(checkpoint: Checkpoint, entries: Entries) -> Iterator[Finding]:
    """Entries that stand for nothing here; lm_head and embeddings may be tied, class names are no modules."""
    known: set[str] = set()
    for tensor in checkpoint.store.entries:
        name = tensor
        while name and name not in known:
            known.add(name)
            name = name.rpartition(".")[0]
    for entry in dict.fromkeys(entries.listed):
        if entry.startswith("re:"):
            if not entries.regex:
                yield Finding(
                    "exclude-unportable",
                    f"exclude list: {entry}",
                    f"vLLM and SGLang know no `re:` in {CONFIG}",
                )
            continue
        single = Entries((entry,), entries.regex)._glob
        tied = "lm_head" in entry or "embed" in entry or entry[:1].isupper()
        if entry not in known and not tied and not any(_found(single, name) for name in known):
            yield Finding(
                "exclude-unknown", f"exclude list: {entry}", "expected a module of the checkpoint, found none"
            )
