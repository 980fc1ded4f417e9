"""Reasons of a pass: where it fires, where not and why; and what changed between two stages."""

import difflib
from collections.abc import Iterable

from fxq.graph.pattern import Match, Miss
from fxq.graph.structure.matmuls import as_weight_matmul
from fxq.graph.structure.views import root
from fxq.view.folded import NODE, NUMBER

_NO_SITES = "no candidate: nothing in this graph is of the kind the pass looks at\n"


def explain(sites: Iterable[Match | Miss]) -> str:
    """What a pass looked at, a line for each kind of site: how many there are and one of them as example.

    Sites are of one kind if their reasons differ only in numbers and in the names of nodes.
    """
    kinds: dict[tuple[bool, str], list[str]] = {}
    for site in sites:
        text, reason = _place(site), ""
        if isinstance(site, Miss):
            reason = f": {site.reason}"
        kind = NUMBER.sub("#", NODE.sub("%", site.rule + reason))
        kinds.setdefault((isinstance(site, Miss), kind), []).append(text + reason)
    lines = [
        f"{'misses' if missed else 'fires':7}{len(members):6} x  {members[0]}\n"
        for (missed, _), members in sorted(kinds.items(), key=lambda kind: kind[0])
    ]
    return "".join(lines) or _NO_SITES


def _place(site: Match | Miss) -> str:
    """`%node (@parameter)`, the parameter being the weight that the node multiplies or stands for."""
    matmul = as_weight_matmul(site.node)
    parameter = matmul.parameter if matmul is not None else root(site.node)
    return f"%{site.node.name}" + (f" (@{parameter.target})" if parameter is not None else "")


def difference(before: str, after: str, first: str, second: str) -> str:
    """A unified diff of two dumps or folded views of the stages `first` and `second`; empty if they are the
    same."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), first, second, lineterm="", n=1)
    return "".join(line + "\n" for line in lines)
