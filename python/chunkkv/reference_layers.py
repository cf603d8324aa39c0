"""The ChunkKV op over all layers of a model in readable NumPy: groups, classes of heads, and one ranking of all layers.

Section numbers and letters are those of chunkkv.reference, which computes one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv import reference
from chunkkv.errors import ConfigError
from chunkkv.reference import BoolArray, FloatArray, IntArray, Selection
from chunkkv.settings import ChunkKVSettings


def select_layers(
    queries: Mapping[int, FloatArray],
    keys: Sequence[FloatArray],
    lengths: IntArray,
    settings: ChunkKVSettings,
    *,
    values: Sequence[FloatArray] | None = None,
    window: IntArray | None = None,
    keep_per_10k: IntArray | None = None,
    budget_tokens: IntArray | None = None,
    is_delimiter: BoolArray | None = None,
) -> list[Selection]:
    """Return one Selection per part of the cache, by layer and within a layer by class (sections 1 to 6).

    A layer is one part; with budget_split "classes" a layer with heads of both classes is two, reading before local.
    With "ranked" and heads "each" every KV head is a part, in order. The layers of a group share their leader's choice.

    Raises ConfigError unless settings.layer_groups lists every layer once, in order, and all leaders have queries.

    Parameters
    ----------
    queries : mapping of int to floating [B,Hq,W,D]
        The last W queries of every leader.
    keys : sequence of floating [B,Hkv,S,D]
        The keys of every layer.
    lengths : integer [B]
        L of each row.
    settings : ChunkKVSettings
        The op's settings; score "given" is not taken here.
    values : sequence of floating [B,Hkv,S,D], optional
        The values of every layer; needed where settings.value_norm is "on".
    window, keep_per_10k, budget_tokens, is_delimiter
        As in reference.select_batch.
    """
    _check_groups(settings, len(keys), queries)
    per_row: dict[str, Any] = {"window": window, "keep_per_10k": keep_per_10k, "budget_tokens": budget_tokens}
    per_row["is_delimiter"] = is_delimiter
    chosen: list[Selection] = []
    for group in settings.layer_groups:
        leader = settings.leader_of(group)
        parts = []
        for head_class, heads in head_classes(settings, leader, keys[leader].shape[1]):
            query, key, value = of_heads(
                heads, queries[leader], keys[leader], None if values is None else values[leader]
            )
            parts.append(
                reference.select_batch(
                    query,
                    key,
                    lengths,
                    settings.of_one_part(),
                    value=value,
                    head_class=head_class,
                    **per_row,
                )
            )
        chosen.extend(parts * len(group))
    if settings.budget_split == "ranked":
        return _ranked_batch(chosen, lengths, settings, keep_per_10k, budget_tokens, is_delimiter)
    return chosen


def _check_groups(settings: ChunkKVSettings, layers: int, queries: Mapping[int, FloatArray]) -> None:
    listed = [layer for group in settings.layer_groups for layer in group]
    if listed != list(range(layers)):
        raise ConfigError(
            f"layer_groups is {settings.layer_groups} for {layers} layers; list every layer once, in order"
        )
    for group in settings.layer_groups:
        if settings.leader_of(group) not in queries:
            raise ConfigError(f"queries of layer {settings.leader_of(group)} are missing; it leads the group {group}")


def head_classes(settings: ChunkKVSettings, layer: int, kv_heads: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the classes of a layer's KV heads that have heads, reading before local; "all" without classes.

    Where every KV head is ranked for itself, each is listed alone.
    """
    if settings.ranks_heads:
        return [("all", (head,)) for head in range(kv_heads)]
    if settings.budget_split != "classes":
        return [("all", tuple(range(kv_heads)))]
    reading = settings.reading_heads[layer]
    local = tuple(head for head in range(kv_heads) if head not in reading)
    return [(name, heads) for name, heads in (("reading", reading), ("local", local)) if heads]


def of_heads(
    heads: Sequence[int], query: FloatArray, key: FloatArray, value: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Return query [B,Hq,W,D], key and value [B,Hkv,S,D] of some KV heads and the query heads that read them."""
    group = query.shape[1] // key.shape[1]
    query_heads = [head * group + member for head in heads for member in range(group)]
    return query[:, query_heads], key[:, list(heads)], None if value is None else value[:, list(heads)]


def select_ranked(
    scores: FloatArray,
    length: int,
    kept: int,
    settings: ChunkKVSettings,
    is_delimiter: BoolArray | None = None,
) -> list[NDArray[np.int32]]:
    """Return the positions that stay in every part, ascending, where all compete for one total (section 4).

    A part is a layer, or a KV head where each chooses for itself; heads are listed layer by layer. Every part keeps at
    least what it chooses with N = layer_floor. All other tokens are ranked by their chunk's score, equal scores by
    lower layer, then by lower position, then by lower head, until `parts * kept` tokens stay.

    Parameters
    ----------
    scores : floating [layers,L] or [layers,Hkv,L]
        Token scores of one row.
    length : int
        L.
    kept : int
        N(L), the mean over the parts.
    settings : ChunkKVSettings
        Window, sinks and chunks.
    is_delimiter : bool [L], optional
        Needed where settings.boundaries is "delimiter".
    """
    of_parts = scores.reshape(-1, scores.shape[-1])
    if kept >= length:
        return [np.arange(length, dtype=np.int32) for _ in of_parts]
    end = length - settings.window
    starts = reference.chunk_starts(length, settings, is_delimiter)
    sizes = reference.chunk_sizes(starts, end)
    stays = np.zeros((len(of_parts), length), dtype=bool)
    rank_value = np.full((len(of_parts), length), np.nan)
    for part, of_part in enumerate(of_parts):
        least = reference.select_tokens(of_part, length, settings.layer_floor, settings, is_delimiter)
        stays[part, least] = True
        rank_value[part, settings.sinks : end] = np.repeat(reference.chunk_scores(of_part, starts, end), sizes)
    tokens = np.arange(stays.size).reshape(len(scores), -1, length).swapaxes(1, 2).ravel()  # by layer, position, head
    candidates = tokens[~stays.ravel()[tokens]]
    best_first = candidates[np.argsort(-rank_value.ravel()[candidates], kind="stable")]  # NaN last
    stays.ravel()[best_first[: len(of_parts) * (kept - settings.layer_floor)]] = True
    return [np.flatnonzero(of_part).astype(np.int32) for of_part in stays]


def _ranked_batch(
    alone: Sequence[Selection],
    lengths: IntArray,
    settings: ChunkKVSettings,
    keep_per_10k: IntArray | None,
    budget_tokens: IntArray | None,
    is_delimiter: BoolArray | None,
) -> list[Selection]:
    """Return every part's Selection of select_ranked from the token scores of `alone`."""
    counts = np.zeros((len(alone), len(lengths)), dtype=np.int32)
    kept_indices = np.full(
        (len(alone), len(lengths), int(max(lengths, default=0))), reference.PAD_INDEX, dtype=np.int32
    )
    for row, length in enumerate(map(int, lengths)):
        ratio, budget = (None if x is None else int(x[row]) for x in (keep_per_10k, budget_tokens))
        scores = np.stack([selection.token_scores[row, :length] for selection in alone])
        scores = scores.reshape(len(settings.layer_groups), -1, length)
        flags = None if is_delimiter is None else is_delimiter[row, :length]
        kept = settings.kept_tokens(length, ratio, budget)
        for part, indices in enumerate(select_ranked(scores, length, kept, settings, flags)):
            counts[part, row] = len(indices)
            kept_indices[part, row, : len(indices)] = indices
    return [
        Selection(kept_indices[part, :, : counts[part].max(initial=0)], counts[part], selection.token_scores)
        for part, selection in enumerate(alone)
    ]
