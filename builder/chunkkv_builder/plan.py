"""The graph plan: which layer decides for which, before any engine is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.model_config import ModelConfig

CACHE_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: its reuse group, and the layer of that group whose attention decides what is kept."""

    index: int
    group: int
    leader: int
    is_leader: bool


@dataclass(frozen=True)
class Plan:
    """What every backend builds from: model, ChunkKV settings (None without ChunkKV), layers in order.

    `delimiter_tokens` is a bool table [vocab_size], True where a token ends a clause or a line; it is present
    exactly when chunk boundaries are taken from delimiters.
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


def make_plan(model: ModelConfig, settings: ChunkKVSettings | None, delimiter_tokens: np.ndarray | None = None) -> Plan:
    """Return the plan of `model` with `settings`.

    Raises ConfigError where the layer groups are not exactly the model's layers in order, or where delimiter
    boundaries are asked for without a table of delimiter tokens.
    """
    if settings is None:
        layers = tuple(LayerPlan(i, i, i, False) for i in range(model.num_layers))
        return Plan(model, None, layers)
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
    layers = []
    for number, group in enumerate(settings.layer_groups):
        leader = settings.leader_of(group)
        layers.extend(LayerPlan(index, number, leader, index == leader) for index in group)
    return Plan(model, settings, tuple(layers), delimiter_tokens)
