"""The rows of a batch, as every op takes them."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.native.arrays import Array


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch, padded or packed.

    Padded arrays are [B, S], [B, max_chunks], [B, max_kept] and, for chunk starts, [B, max_chunks + 1]. Where
    row_starts is given, the same arrays are packed: [T], and [T + B] for chunk starts. Where every KV head chooses for
    itself (heads "each"), scores and kept indices have an axis more: [B, Hkv, ...], packed [Hkv, T].

    Parameters
    ----------
    lengths : int32 [B]
        Prompt tokens of each row.
    max_length : int
        The padded length S; at least the largest of `lengths`.
    keep_per_10k : int32 [B], default None
        A keep ratio of each row, times 10000. None: that of the settings.
    budget_tokens : int32 [B], default None
        A token budget of each row, 0 for rows that use their ratio. None: that of the settings.
    row_starts : int32 [B], default None
        The first entry of each row in packed arrays. None: arrays are padded.
    num_tokens : int, default 0
        T, the entries of packed arrays. Not read for padded ones.
    windows : int32 [B], default None
        How many of the window's last queries score a row, from 1 to the settings' window. None: all of them.
    head_class : {"all", "reading", "local"}, default "all"
        The KV heads that a call is about, where budget_split is "classes": how many tokens they keep, and how.
    """

    lengths: Array
    max_length: int
    keep_per_10k: Array | None = None
    budget_tokens: Array | None = None
    row_starts: Array | None = None
    num_tokens: int = 0
    windows: Array | None = None
    head_class: str = ALL_HEADS


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of each row begin, with delimiter boundaries; written by NativeLibrary.boundaries.

    Parameters
    ----------
    chunk_starts : int32 [B, max_chunks + 1] or, packed, [T + B]
        The first token of every chunk of a row, then the end of its last chunk.
    num_chunks : int32 [B]
        How many chunks each row has.
    """

    chunk_starts: Array
    num_chunks: Array
