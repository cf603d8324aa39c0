"""Rows of a paged pool, compressed against the NumPy reference: ragged, shared prefixes, blocks that come back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.messages import naming

from chunkkv import reference
from chunkkv.errors import CacheFullError, ConfigError, NativeArgumentError
from chunkkv.native import CompressedRows, NativeLibrary, compress_pool
from chunkkv.settings import ChunkKVSettings

LAYERS, HEADS, KV_HEADS, SIZE, BLOCKS = 3, 4, 2, 64, 48
SETTINGS = ChunkKVSettings(
    keep_per_10k=3000, window=8, chunk_size=5, sinks=2, min_tokens=16, layer_groups=((0, 1), (2,)), boundaries="fixed"
)
LENGTHS = (150, 12, 301, 97)


@dataclass
class Pool:
    """Random keys and values, and the rows that own their blocks; rows may begin with the same `shared` tokens."""

    tokens_per_block: int
    lengths: tuple[int, ...] = LENGTHS
    shared: int = 0
    sharers: tuple[int, ...] = ()
    settings: ChunkKVSettings = SETTINGS
    data: NDArray[Any] = field(init=False)
    tables: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.tokens_per_block)
        shape = (BLOCKS, LAYERS, 2, KV_HEADS, self.tokens_per_block, SIZE)
        self.data = self.random.normal(size=shape).astype(np.float32)
        self.free = self.random.permutation(BLOCKS).tolist()
        prefix = [self.free.pop() for _ in range(self.shared // self.tokens_per_block)]
        self.tables = []
        for row, length in enumerate(self.lengths):
            own = list(prefix) if row in self.sharers else []
            while len(own) * self.tokens_per_block < length:
                own.append(self.free.pop())
            self.tables.append(own)
        sizes = (len(self.lengths), HEADS, self.settings.window, SIZE)
        self.queries = {group[0]: self.random.normal(size=sizes).astype(np.float32) for group in self.groups}
        self.before = self.data.copy()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return self.settings.layer_groups or tuple((layer,) for layer in range(LAYERS))

    def part(self, data: NDArray[Any], table: Any, layer: int, kind: int, length: int) -> NDArray[Any]:
        """Return [Hkv,length,D] of a row."""
        blocks = data[list(table), layer, kind]
        return blocks.swapaxes(0, 1).reshape(KV_HEADS, -1, SIZE)[:, :length]

    def compress(self, library: NativeLibrary, **more: Any) -> CompressedRows:
        given = {"queries": self.queries, "free_blocks": self.free, **more}
        return compress_pool(library, self.settings, self.data, self.tables, self.lengths, **given)

    def check(self, result: CompressedRows, **more: Any) -> None:
        """Compare every row of every layer with the reference."""
        for row, length in enumerate(self.lengths):
            kept = self.settings.kept_tokens(length)
            assert result.kept_lengths[row] == kept
            assert len(result.block_tables[row]) == -(-kept // self.tokens_per_block) or kept == length
            for group in self.groups:
                key = self.part(self.before, self.tables[row], group[0], 0, length)
                own = {
                    name: value[group[0]][row : row + 1, :length] for name, value in more.items() if name == "scores"
                }
                flags = more.get("is_delimiter")
                choice = reference.select_batch(
                    None if own else self.queries[group[0]][row : row + 1],
                    key[None],
                    np.array([length]),
                    self.settings,
                    is_delimiter=None if flags is None else flags[row : row + 1, :length] != 0,
                    **own,
                )
                indices = choice.kept_indices[0, :kept]
                for layer in group:
                    for kind in (0, 1):
                        wanted = self.part(self.before, self.tables[row], layer, kind, length)[:, indices]
                        found = self.part(self.data, result.block_tables[row], layer, kind, kept)
                        np.testing.assert_array_equal(found, wanted)


@pytest.fixture(autouse=True)
def on_arrays_of_numpy(library: NativeLibrary) -> None:
    if library.device != "emulated":
        pytest.skip("NumPy arrays need an emulated library")


@pytest.mark.parametrize("tokens_per_block", [32, 64, 128])
def test_ragged_rows_are_compressed_in_place_and_their_tail_is_free(
    library: NativeLibrary, tokens_per_block: int
) -> None:
    pool = Pool(tokens_per_block)
    result = pool.compress(library)
    pool.check(result)
    for row, (before, after) in enumerate(zip(pool.tables, result.block_tables, strict=True)):
        assert list(after) == before[: len(after)] and list(result.released[row]) == before[len(after) :]
    assert set(result.freed) == {block for blocks in result.released for block in blocks} and len(result.freed) > 0
    assert result.freed == tuple(sorted(result.freed))


@pytest.mark.parametrize("tokens_per_block", [32, 64, 128])
def test_blocks_of_a_shared_prefix_are_never_written(library: NativeLibrary, tokens_per_block: int) -> None:
    pool = Pool(tokens_per_block, shared=128, sharers=(0, 2), lengths=(150, 90, 301, 150))
    prefix = pool.tables[0][: 128 // tokens_per_block]
    owners = {block: 2 for block in prefix} | {
        block: 1 for table in pool.tables for block in table if block not in prefix
    }
    owners |= {block: 3 for block in prefix}  # a prefix cache has them too
    result = pool.compress(library, references=owners)
    pool.check(result)
    np.testing.assert_array_equal(pool.data[prefix], pool.before[prefix])
    for row in (0, 2):
        assert set(result.block_tables[row]) <= set(pool.free) and list(result.released[row]) == pool.tables[row]
    assert not set(result.freed) & set(prefix), "the prefix cache keeps them"
    assert set(pool.tables[0][len(prefix) :]) <= set(result.freed)


def test_a_prefix_that_only_its_rows_share_is_free_when_both_have_left_it(library: NativeLibrary) -> None:
    pool = Pool(32, shared=128, sharers=(0, 2), lengths=(150, 90, 301, 150))
    result = pool.compress(library)
    pool.check(result)
    assert set(pool.tables[0][:4]) <= set(result.freed)


def test_one_of_two_sharers_that_is_short_keeps_its_blocks(library: NativeLibrary) -> None:
    settings = replace(SETTINGS, min_tokens=64)
    pool = Pool(32, shared=32, sharers=(0, 1), lengths=(301, 60), settings=settings)
    result = pool.compress(library)
    pool.check(result)
    assert list(result.block_tables[1]) == pool.tables[1] and result.released[1] == ()
    assert pool.tables[0][0] not in result.freed and set(pool.tables[0][1:]) <= set(result.freed)


def test_rows_in_place_need_no_free_block_and_shared_ones_say_how_many(library: NativeLibrary) -> None:
    pool = Pool(32)
    pool.check(pool.compress(library, free_blocks=()))
    pool = Pool(32, shared=128, sharers=(0, 2), lengths=(150, 90, 301, 150))
    with pytest.raises(CacheFullError, match=naming("[0, 2] 5 free_blocks 2")):
        pool.compress(library, free_blocks=pool.free[:2])
    np.testing.assert_array_equal(pool.data, pool.before)


def test_delimiters_and_scores_from_outside(library: NativeLibrary) -> None:
    pool = Pool(32, settings=replace(SETTINGS, boundaries="delimiter", layer_groups=()))
    flags = (pool.random.random((len(LENGTHS), max(LENGTHS))) < 0.2).astype(np.int32)
    pool.check(pool.compress(library, is_delimiter=flags), is_delimiter=flags)
    pool = Pool(64, settings=SETTINGS.with_score("given"))
    scores = {group[0]: pool.random.random((len(LENGTHS), max(LENGTHS))).astype(np.float32) for group in pool.groups}
    pool.check(pool.compress(library, queries=None, scores=scores), scores=scores)


def test_tables_and_lengths_may_be_arrays_with_entries_behind_the_tokens(library: NativeLibrary) -> None:
    pool = Pool(32)
    most = max(map(len, pool.tables)) + 2
    tables = np.array([[*table, *[BLOCKS] * (most - len(table))] for table in pool.tables], np.int32)
    result = compress_pool(library, SETTINGS, pool.data, tables, np.array(LENGTHS), queries=pool.queries)
    pool.check(result)


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"heads": "each"}, {}, "heads each shared"),
        ({"score": "given", "head_reduce": "mean"}, {}, "score given scores"),
        ({"boundaries": "delimiter"}, {}, "boundaries delimiter is_delimiter"),
        ({}, {"queries": None}, "score softmax queries"),
        ({}, {"free_blocks": [47, 47]}, "free_blocks twice"),
        ({}, {"references": {}}, "references 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    library: NativeLibrary, changes: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    pool = Pool(32, settings=replace(SETTINGS, **changes))
    with pytest.raises((ConfigError, NativeArgumentError), match=naming(said)):
        pool.compress(library, **more)
    np.testing.assert_array_equal(pool.data, pool.before)
