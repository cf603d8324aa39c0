"""Which reuse groups lie on which rank: pipeline stages split the layers, tensor-parallel ranks all have them."""

from __future__ import annotations

from collections.abc import Sequence

from chunkkv.engine.tensorrt_llm_side_file import RankLayers
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings


def rank_layers(settings: ChunkKVSettings, stage: Sequence[int], rank: int, tp_rank: int, pp_rank: int) -> RankLayers:
    """Return the groups of a rank whose pipeline stage has the layers `stage` (global numbers, consecutive).

    Raises ConfigError where a group reaches over the end of the stage: a choice cannot be handed to another process.
    """
    first, last = stage[0], stage[-1]
    groups, leaders = [], []
    for group in settings.layer_groups:
        inside = [layer for layer in group if first <= layer <= last]
        if inside and len(inside) < len(group):
            raise ConfigError(
                f"layer_reuse has layers {group[0]} to {group[-1]} in one group, but pipeline stage {pp_rank} has the "
                f"layers {first} to {last}: give groups that end where a stage ends"
            )
        if inside:
            groups.append(tuple(layer - first for layer in group))
            leaders.append(settings.leader_of(group) - first)
    return RankLayers(rank, tp_rank, pp_rank, first, tuple(groups), tuple(leaders))


def even_stages(num_layers: int, pp_size: int) -> list[range] | None:
    """Return the layers of each pipeline stage where all are of one size; None where TensorRT-LLM decides."""
    size, rest = divmod(num_layers, pp_size)
    return None if rest else [range(stage * size, (stage + 1) * size) for stage in range(pp_size)]
