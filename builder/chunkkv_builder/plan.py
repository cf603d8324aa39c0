"""The graph plan: which layer decides for which; the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.model_config import ModelConfig

CACHE_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token in a cache of `dtype` takes in all layers together."""
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
