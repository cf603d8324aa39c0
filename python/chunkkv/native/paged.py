"""Compresses rows of a paged pool of KV blocks, which an engine with such a pool does between prefill and decode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.errors import CacheFullError, ConfigError, NativeArgumentError
from chunkkv.native.arrays import Array, as_raw
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import paged_kv
from chunkkv.native.library import NativeLibrary
from chunkkv.settings import ChunkKVSettings


@dataclass(frozen=True)
class CompressedRows:
    """What compress_pool leaves of the rows.

    Parameters
    ----------
    kept_lengths : tuple of int
        N of each row. Its next token goes to slot N, and keeps its logical position.
    block_tables : tuple of tuple of int
        The blocks of each row that hold these tokens, in order: ceil(N / tokens_per_block).
    freed : tuple of int
        Blocks that no row and no other owner uses any more, ascending.
    released : tuple of tuple of int
        Per row the blocks that it gave up: those in `freed`, and shared ones, whose other owners keep them.
    """

    kept_lengths: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    freed: tuple[int, ...]
    released: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Move:
    """The rows that one call compacts: their numbers, and the tables that they are read by and written by."""

    rows: list[int]
    sources: list[Sequence[int]]
    targets: list[Sequence[int]] | None  # None: in place


def compress_pool(
    library: NativeLibrary,
    settings: ChunkKVSettings,
    pool: Any,
    block_tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    queries: Mapping[int, Any] | None = None,
    scores: Mapping[int, Any] | None = None,
    is_delimiter: Any = None,
    references: Mapping[int, int] | None = None,
    free_blocks: Sequence[int] = (),
    stream: Any = None,
) -> CompressedRows:
    """Score, select and compact rows whose prompts were just prefilled; say which blocks are free again.

    Kept tokens move to the first slots of their row. A row whose first blocks are shared, such as those of a common
    prefix, is copied to blocks of `free_blocks` instead: shared blocks are read and never written. All layers and KV
    heads of a row keep equally many tokens, because one table serves them all.

    Parameters
    ----------
    library : NativeLibrary
        The op.
    settings : ChunkKVSettings
        What is kept. Layer groups number the pool's layers; without them every layer chooses for itself.
    pool : array [blocks, layers, 2, Hkv, tokens_per_block, D]
        Rotated keys (index 0 of the third axis) and values: float32, float16 or bfloat16; torch (GPU), or NumPy with an
        emulated library. With scores from outside, any type of 1, 2 or 4 bytes.
    block_tables : sequence of sequences of int [B, ...], or an array
        The blocks of each row, in order; entries behind its tokens are not read.
    lengths : sequence of int [B], or an array
        Tokens of each row, all of them in the pool.
    queries : mapping of int to array [B, Hq, W, D], default None
        By leader layer the rotated queries of the last W = settings.window tokens of each row, of the pool's type.
    scores : mapping of int to float32 array [B, S], default None
        Instead of queries, with score "given": by leader layer the score of each token.
    is_delimiter : int32 array [B, S], default None
        With delimiter boundaries: not 0 where a chunk ends behind a token.
    references : mapping of int to int, default None
        How many owners a block has, a prefix cache included. None: as many as rows list it.
    free_blocks : sequence of int, default ()
        Blocks that may be taken, in this order, for rows whose first blocks are shared.
    stream : optional
        The CUDA stream, as the ops of NativeLibrary take it. With torch, give its current stream or nothing.

    Raises
    ------
    CacheFullError
        Where free_blocks are fewer than shared rows need; nothing has been done then.
    ConfigError
        For settings that one block table cannot serve. NativeArgumentError for arrays that do not fit together.
    """
    tables = [[int(block) for block in table] for table in _on_host(block_tables)]
    counts = [int(length) for length in _on_host(lengths)]
    work = _PoolWork(library, settings, pool, counts, stream)
    used = [table[: work.blocks_for(length)] for table, length in zip(tables, counts, strict=True)]
    moves, result = _planned(used, counts, settings, _owners(used, references), work.blocks_for, free_blocks)
    work.run(moves, queries, scores, is_delimiter)
    return result


def _owners(tables: Sequence[Sequence[int]], references: Mapping[int, int] | None) -> dict[int, int]:
    listed: dict[int, int] = {}
    for block in (block for table in tables for block in table):
        listed[block] = listed.get(block, 0) + 1
    for block, count in listed.items():
        if references is not None and references.get(block, 0) < count:
            raise NativeArgumentError(
                f"references says {references.get(block, 0)} for block {block}; {count} rows list it"
            )
    return listed if references is None else {block: references[block] for block in listed}


def _planned(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    settings: ChunkKVSettings,
    owners: dict[int, int],
    blocks_for: Callable[[int], int],
    free_blocks: Sequence[int],
) -> tuple[list[_Move], CompressedRows]:
    """Return which rows move where, and what is left: rows whose first blocks are shared get blocks of their own."""
    kept = [settings.kept_tokens(length) for length in lengths]
    changed = [row for row in range(len(tables)) if kept[row] < lengths[row]]
    shared = [row for row in changed if any(owners[block] > 1 for block in tables[row][: blocks_for(kept[row])])]
    needed = sum(blocks_for(kept[row]) for row in shared)
    if len(set(free_blocks)) < len(free_blocks) or owners.keys() & set(free_blocks):
        raise NativeArgumentError("free_blocks lists a block twice, or one that a row uses")
    if needed > len(free_blocks):
        raise CacheFullError(
            f"rows {shared} share the blocks that their kept tokens would go to, and need {needed} of their own; "
            f"free_blocks has {len(free_blocks)}: pass more, or compress these rows before their blocks are shared"
        )
    taken, left = iter(free_blocks), [tuple(table) for table in tables]
    released: list[tuple[int, ...]] = [() for _ in tables]
    for row in changed:
        count = blocks_for(kept[row])
        left[row] = tuple(int(next(taken)) for _ in range(count)) if row in shared else tuple(tables[row][:count])
        released[row] = tuple(tables[row] if row in shared else tables[row][count:])
    remaining = dict(owners)
    for block in (block for blocks in released for block in blocks):
        remaining[block] -= 1
    freed = tuple(sorted(block for block, count in remaining.items() if count == 0))
    in_place = [row for row in changed if row not in shared]
    moves = []
    if in_place:
        moves.append(_Move(in_place, [tables[row] for row in in_place], None))
    if shared:
        moves.append(_Move(shared, [tables[row] for row in shared], [left[row] for row in shared]))
    return moves, CompressedRows(tuple(kept), tuple(left), freed, tuple(released))


class _PoolWork:
    """One pool and what the ops on it share."""

    def __init__(
        self, library: NativeLibrary, settings: ChunkKVSettings, pool: Any, lengths: list[int], stream: Any
    ) -> None:
        self._library, self._settings, self._pool = library, settings, pool
        self._lengths, self._stream = lengths, stream
        shape = as_raw(pool).shape
        if len(shape) != 6 or shape[2] != 2:
            raise NativeArgumentError(f"pool has shape {shape}; it must be [blocks,layers,2,Hkv,tokens_per_block,D]")
        self.layers, self._tokens_per_block = shape[1], shape[4]

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that hold `tokens` tokens."""
        return -(-tokens // self._tokens_per_block)

    def run(self, moves: Sequence[_Move], queries: Any, scores: Any, is_delimiter: Any) -> None:
        """Compress the rows of every move in all layers."""
        self._check(queries, scores, is_delimiter)
        for move in moves:
            for group in self._settings.layer_groups or [(layer,) for layer in range(self.layers)]:
                self._compress(move, group, queries, scores, is_delimiter)

    def _check(self, queries: Any, scores: Any, is_delimiter: Any) -> None:
        """Raise where the settings are not those of one block table, or what they need was not given."""
        settings = self._settings
        if settings.budget_split != "uniform" or settings.heads != "shared":
            raise ConfigError(
                f"budget_split is {settings.budget_split!r} and heads is {settings.heads!r}; one block table serves "
                "all layers and heads of a row: give uniform and shared"
            )
        needed = {"scores": settings.score == "given", "queries": settings.score != "given"}
        for name, given in (("queries", queries), ("scores", scores)):
            if (given is not None) != needed[name]:
                raise NativeArgumentError(
                    f"score is {settings.score!r}: pass {'scores' if needed['scores'] else 'queries'} and not the other"
                )
        if (is_delimiter is not None) != (settings.boundaries == "delimiter"):
            raise NativeArgumentError(
                f"boundaries is {settings.boundaries!r}: pass is_delimiter with 'delimiter' alone"
            )

    def _compress(self, move: _Move, group: Sequence[int], queries: Any, scores: Any, is_delimiter: Any) -> None:
        """Choose by the group's leader, and compact its layers."""
        lengths = np.array([self._lengths[row] for row in move.rows], np.int32)
        rows = BatchRows(self._placed(lengths), int(lengths.max()))
        leader = self._settings.leader_of(tuple(group))
        source = self._offsets(move.sources)
        chunks = self._chunks(rows, None if is_delimiter is None else is_delimiter[move.rows])
        most = self._library.max_chunks(self._settings, rows.max_length)
        chunk_scores = self._placed(np.zeros((len(move.rows), most), np.float32))
        if scores is not None:
            given = self._cut(scores[leader][move.rows], rows.max_length)
            self._library.score_given(
                self._settings, rows, given, chunk_scores=chunk_scores, chunks=chunks, stream=self._stream
            )
        else:
            view, query = paged_kv(self._pool, source, leader), queries[leader][move.rows]
            options = {"chunk_scores": chunk_scores, "chunks": chunks}
            size = self._library.score_workspace(self._settings, rows, query, view, **options)
            workspace = self._placed(_aligned(size))
            self._library.score(self._settings, rows, query, view, workspace=workspace, stream=self._stream, **options)
        kept = max(self._settings.kept_tokens(int(length)) for length in lengths)
        indices = self._placed(np.empty((len(move.rows), kept), np.int32))
        kept_lengths = self._placed(np.empty(len(move.rows), np.int32))
        self._library.select(
            self._settings, rows, chunk_scores, indices, kept_lengths, chunks=chunks, stream=self._stream
        )
        targets = None if move.targets is None else self._offsets(move.targets)
        self._library.compact(
            rows,
            indices,
            kept_lengths,
            [paged_kv(self._pool, source, layer) for layer in group],
            None if targets is None else [paged_kv(self._pool, targets, layer) for layer in group],
            stream=self._stream,
        )

    def _chunks(self, rows: BatchRows, flags: Any) -> Chunks | None:
        if flags is None:
            return None
        most = self._library.max_chunks(self._settings, rows.max_length)
        count = as_raw(rows.lengths).shape[0]
        starts = self._placed(np.zeros((count, most + 1), np.int32))
        chunks = Chunks(starts, self._placed(np.zeros(count, np.int32)))
        flags = self._cut(flags, rows.max_length)
        self._library.boundaries(self._settings, rows, flags, None, 0, chunks, stream=self._stream)
        return chunks

    def _cut(self, array: Any, length: int) -> Any:
        """Return the first `length` columns, dense."""
        part = array[:, :length]
        return part.contiguous() if _is_torch(part) else np.ascontiguousarray(part)

    def _offsets(self, tables: Sequence[Sequence[int]]) -> Array:
        """Return block tables as offsets [rows, 2, most] of K and V parts of all layers."""
        offsets = np.zeros((len(tables), 2, max(map(len, tables))), np.int32)
        for row, table in enumerate(tables):
            first = np.array(table, np.int32) * self.layers * 2
            offsets[row, :, : len(table)] = first, first + 1
        return self._placed(offsets)

    def _placed(self, array: np.ndarray) -> Any:
        """Return an array where the pool lies."""
        if not _is_torch(self._pool):
            return array
        # The pool is torch's, so torch has been imported; nothing here depends on it.
        return sys.modules["torch"].from_numpy(array).to(self._pool.device)


def _aligned(size: int) -> np.ndarray:
    """Return `size` bytes at an address that is a multiple of 256."""
    memory = np.empty(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size]


def _is_torch(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"


def _on_host(values: Any) -> Any:
    """Return block tables or lengths as they can be read on the host."""
    return values.tolist() if _is_torch(values) or isinstance(values, np.ndarray) else values
