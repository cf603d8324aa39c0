"""The graph plan: which layer decides for which; the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from chunkkv.cache_layout import ALL_HEADS, LOCAL, CacheLayout, deciding_parts, layout_of
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.model_config import ModelConfig

CACHE_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Parameters
    ----------
    index : int
        Number of the layer in the model.
    group : int
        Number of its layer-reuse group.
    leader : int
        The layer of that group whose attention decides what the group keeps; the layer itself without ChunkKV.
    is_leader : bool
        Whether the layer is its group's leader; False without ChunkKV.
    """

    index: int
    group: int
    leader: int
    is_leader: bool


@dataclass(frozen=True)
class PartPlan:
    """One part of the KV cache: heads of one layer that keep equally many tokens.

    Parameters
    ----------
    number : int
        Its place in the layout of the cache; the layer's number where every layer is one part.
    layer : int
        The decoder layer.
    kv_heads : tuple of int
        Its KV heads, ascending.
    head_class : str
        "all", "reading" or "local".
    length_class : int
        Parts of one length class fill equally many slots.
    leader : int
        The part of the group's leader whose choice it takes; its own number without ChunkKV.
    scores : bool
        Whether it is a leader that chooses by scores. Others take a leader's choice, or keep sinks and recent tokens.
    """

    number: int
    layer: int
    kv_heads: tuple[int, ...]
    head_class: str
    length_class: int
    leader: int
    scores: bool

    @property
    def leads(self) -> bool:
        """Whether it takes no other part's choice."""
        return self.leader == self.number

    def suffix(self, num_kv_heads: int) -> str:
        """Return what tells its nodes from those of other parts of a layer of `num_kv_heads` heads; "" for a layer."""
        if len(self.kv_heads) == num_kv_heads:
            return ""
        return f".head_{self.kv_heads[0]}" if self.head_class == ALL_HEADS else f".{self.head_class}"


@dataclass(frozen=True)
class GraphPlan:
    """What the graphs of an engine are made from, whichever engine it is.

    Parameters
    ----------
    model : ModelConfig
        Sizes of the model.
    settings : ChunkKVSettings or None
        ChunkKV's settings with every layer in a group, None without ChunkKV.
    layers : tuple of LayerPlan
        Every decoder layer in order.
    delimiter_tokens : bool array [vocab_size] or None, default None
        True where a token ends a clause or a line. Present exactly when chunk boundaries are taken from delimiters.
    """

    model: ModelConfig
    settings: ChunkKVSettings | None
    layers: tuple[LayerPlan, ...]
    delimiter_tokens: np.ndarray | None = None

    @property
    def leaders(self) -> tuple[int, ...]:
        """The layers that score and select, ascending; empty without ChunkKV."""
        return tuple(layer.index for layer in self.layers if layer.is_leader)

    @cached_property
    def layout(self) -> CacheLayout:
        """The parts of every cache."""
        return layout_of(self.settings, self.model.num_layers, self.model.num_kv_heads)

    @cached_property
    def parts(self) -> tuple[PartPlan, ...]:
        """The parts of every cache in order, each with the part that decides for it."""
        by_score = self.settings is not None
        recent = self.settings is not None and self.settings.local_policy == "recent"
        parts = []
        leaders = deciding_parts(self.settings, self.layout)
        for number, (part, leader) in enumerate(zip(self.layout.parts, leaders, strict=True)):
            scores = by_score and leader == number and not (recent and part.head_class == LOCAL)
            parts.append(
                PartPlan(number, part.layer, part.kv_heads, part.head_class, part.length_class, leader, scores)
            )
        return tuple(parts)

    def parts_of(self, layer: int) -> list[PartPlan]:
        """Return the parts of one layer, by length class."""
        return [part for part in self.parts if part.layer == layer]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token takes that is cached in all heads of all layers, in a cache of `dtype`."""
        return 2 * self.model.num_layers * self.model.num_kv_heads * self.model.head_dim * CACHE_ITEM_BYTES[dtype]


def make_plan(
    model: ModelConfig, settings: ChunkKVSettings | None, delimiter_tokens: np.ndarray | None = None
) -> GraphPlan:
    """Return the plan of `model` with `settings`; the parameters are those of GraphPlan.

    Raises ConfigError where the layer groups are not exactly the model's layers in order, or where delimiter
    boundaries are asked for without a table of delimiter tokens.
    """
    if settings is None:
        return GraphPlan(model, None, tuple(LayerPlan(i, i, i, False) for i in range(model.num_layers)))
    covered = [layer for group in settings.layer_groups for layer in group]
    if covered != list(range(model.num_layers)) or not all(settings.layer_groups):
        raise ConfigError(
            f"layer groups {settings.layer_groups} do not list the layers 0 to {model.num_layers - 1} once, in order: "
            "give consecutive groups that together cover every layer"
        )
    if settings.num_kv_heads not in (0, model.num_kv_heads):
        name = "reading_heads" if settings.reading_heads else "num_kv_heads"
        raise ConfigError(
            f"{name} is for layers of {settings.num_kv_heads} KV heads; this model has {model.num_kv_heads}: "
            "take a recipe that was made for this model"
        )
    if settings.boundaries == "delimiter":
        if delimiter_tokens is None or delimiter_tokens.shape != (model.vocab_size,):
            raise ConfigError(
                "boundaries is 'delimiter', which needs a tokenizer beside the checkpoint: "
                "add tokenizer.json or use boundaries 'fixed'"
            )
        delimiter_tokens = np.ascontiguousarray(delimiter_tokens, dtype=bool)
    else:
        delimiter_tokens = None
    layers: list[LayerPlan] = []
    for number, group in enumerate(settings.layer_groups):
        leader = settings.leader_of(group)
        layers.extend(LayerPlan(index, number, leader, index == leader) for index in group)
    return GraphPlan(model, settings, tuple(layers), delimiter_tokens)
