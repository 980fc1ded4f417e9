"""Layers by the numbers in names: `model.layers.3.mlp` is in the fourth of `model.layers`."""

from collections.abc import Iterable

from fxq.graph.hub import NUMBER


def outer_layers(names: Iterable[str], first: int, last: int) -> dict[str, str]:
    """The names that lie in the `first` or the `last` layers of their list -> which of these."""
    lists: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if (number := NUMBER.search(name)) is not None:
            lists.setdefault(name[: number.start()], {}).setdefault(int(number[0]), []).append(name)
    found: dict[str, str] = {}
    for layers in lists.values():
        order = sorted(layers)
        for which, count, chosen in (("first", first, order[:first]), ("last", last, order[::-1][:last])):
            for layer in chosen:
                found.update(dict.fromkeys(layers[layer], f"in the {which} {count} of {len(order)} layers"))
    return found
