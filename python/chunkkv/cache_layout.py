"""Parts of a KV cache: which heads of which layer hold equally many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkkv.settings import ChunkKVSettings

ALL_HEADS, READING, LOCAL = HEAD_CLASSES = ("all", "reading", "local")

Slots = tuple[int, ...]  # of a row: one number for each length class


@dataclass(frozen=True)
class CachePart:
    """KV heads of one layer that hold the same number of tokens; one array of keys and one of values.

    Parameters
    ----------
    layer : int
        The decoder layer.
    head_class : str
        "reading" or "local" where the engine splits its budget by head class, else "all".
    kv_heads : tuple of int
        The layer's KV heads in this part, ascending.
    length_class : int
        Parts of one length class fill the same number of slots in a row.
    """

    layer: int
    head_class: str
    kv_heads: tuple[int, ...]
    length_class: int = 0


@dataclass(frozen=True)
class CacheLayout:
    """The parts of every cache of an engine.

    Parameters
    ----------
    parts : tuple of CachePart
        In the order of the engine's arrays: by layer, and within a layer by length class.
    length_classes : int, default 1
        How many numbers of slots a row has.
    """

    parts: tuple[CachePart, ...]
    length_classes: int = 1

    @property
    def heads(self) -> Slots:
        """KV heads of each length class, over all layers."""
        counts = [0] * self.length_classes
        for part in self.parts:
            counts[part.length_class] += len(part.kv_heads)
        return tuple(counts)

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Return the numbers of the parts that hold `layer`."""
        return tuple(number for number, part in enumerate(self.parts) if part.layer == layer)

    def slots(self, value: int | Sequence[int]) -> Slots:
        """Return `value` as one number for each length class; a single number holds for all of them."""
        if isinstance(value, Sequence):
            assert len(value) == self.length_classes, (value, self.length_classes)
            return tuple(value)
        return (value,) * self.length_classes


def shown_slots(slots: Sequence[int]) -> str:
    """Return the slots of every length class as text."""
    return " and ".join(map(str, slots))


def layout_of(settings: ChunkKVSettings | None, num_layers: int, num_kv_heads: int) -> CacheLayout:
    """Return the layout of an engine with `settings` for a model of these sizes; None is an engine without ChunkKV.

    With budget_split "classes" length class 0 are the reading heads and 1 the local heads; a layer of both has two
    parts. With "ranked" every layer is a length class of its own, and with heads "each" every KV head.
    """
    if settings is None or settings.budget_split == "uniform":
        return uniform_layout(num_layers, num_kv_heads)
    heads = tuple(range(num_kv_heads))
    if settings.ranks_heads:
        places = [(layer, head) for layer in range(num_layers) for head in heads]
        parts = [CachePart(layer, ALL_HEADS, (head,), number) for number, (layer, head) in enumerate(places)]
        return CacheLayout(tuple(parts), len(parts))
    if settings.budget_split == "ranked":
        return CacheLayout(tuple(CachePart(layer, ALL_HEADS, heads, layer) for layer in range(num_layers)), num_layers)
    parts = []
    for layer, reading in enumerate(settings.reading_heads):
        local = tuple(head for head in heads if head not in reading)
        for number, (name, members) in enumerate(((READING, reading), (LOCAL, local))):
            if members:
                parts.append(CachePart(layer, name, members, number))
    return CacheLayout(tuple(parts), 2)


def deciding_parts(settings: ChunkKVSettings | None, layout: CacheLayout) -> tuple[int, ...]:
    """Return for each part the number of the part whose choice it takes: that of its layer-reuse group's leader."""
    places = {(part.layer, part.length_class): number for number, part in enumerate(layout.parts)}
    leaders = {part.layer: part.layer for part in layout.parts}
    if settings is not None:
        leaders |= {layer: settings.leader_of(group) for group in settings.layer_groups for layer in group}
    return tuple(places[leaders[part.layer], part.length_class] for part in layout.parts)


def leading_parts(settings: ChunkKVSettings | None, layout: CacheLayout) -> tuple[int, ...]:
    """Return the numbers of the parts whose choice is their own; none without ChunkKV."""
    if settings is None:
        return ()
    return tuple(number for number, leader in enumerate(deciding_parts(settings, layout)) if leader == number)


def uniform_layout(num_layers: int, num_kv_heads: int) -> CacheLayout:
    """Return the layout of an engine that keeps equally many tokens everywhere: one part for each layer."""
    heads = tuple(range(num_kv_heads))
    return CacheLayout(tuple(CachePart(layer, ALL_HEADS, heads) for layer in range(num_layers)))
