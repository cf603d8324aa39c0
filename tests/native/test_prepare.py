"""prepare against NumPy: ragged batches of context rows, then generation rows; and what garbage may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.messages import naming

from chunkkv.errors import NativeArgumentError
from chunkkv.native import NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory
from native.test_boundaries import DELIMITERS, VOCABULARY, bitmap

SETTINGS = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000)
INT32 = np.iinfo(np.int32)
WILD = np.array([INT32.min, -1, 0, 1, 9, 700, 2**22, INT32.max], np.int32)
Arrays = dict[str, NDArray[np.int32]]


@dataclass
class Batch:
    """`contexts` prompts, then rows that have generated; token ids of all of them and of `trailing` tokens."""

    prompts: NDArray[np.int32]
    generated: NDArray[np.int32]  # tokens that a row has generated; 0 in a context row
    contexts: int
    max_length: int
    token_ids: NDArray[np.int32]

    @classmethod
    def draw(cls, seed: int, contexts: int, generations: int, longest: int = 60, trailing: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        prompts = rng.integers(0, longest + 1, contexts + generations).astype(np.int32)
        generated = np.zeros(contexts + generations, np.int32)
        generated[contexts:] = rng.integers(1, 50, generations)
        tokens = int(prompts[:contexts].sum()) + generations + trailing
        ids = np.array([INT32.min, -1, *DELIMITERS, 5, 30, VOCABULARY, VOCABULARY + 31, INT32.max], np.int64)
        return cls(prompts, generated, contexts, longest, rng.choice(ids, tokens).astype(np.int32))

    def run(self, library: NativeLibrary, memory: Memory, settings: ChunkKVSettings, delimiters: bool = True) -> Arrays:
        return call(
            library,
            memory,
            settings,
            self.prompts + self.generated,
            self.prompts,
            self.contexts,
            self.max_length,
            self.token_ids,
            delimiters,
        )

    def expected(self, settings: ChunkKVSettings) -> Arrays:
        """Row by row and token by token, in Python integers."""
        kept = [settings.kept_tokens(int(length)) for length in self.prompts]
        attention, starts, positions = [], [], []
        for row, (length, generated) in enumerate(zip(self.prompts.tolist(), self.generated.tolist(), strict=True)):
            starts.append(len(positions))
            context = row < self.contexts
            attention.append(length if context else max(1, length + generated - (length - kept[row])))
            positions += range(length) if context else [length + generated - 1]
        positions += [0] * (len(self.token_ids) - len(positions))
        flags = np.isin(self.token_ids, DELIMITERS)
        named = (attention, kept, starts, positions, flags)
        return {name: np.array(values, np.int32) for name, values in zip(OUTPUTS, named, strict=True)}

    def check(self, library: NativeLibrary, memory: Memory, settings: ChunkKVSettings = SETTINGS) -> None:
        given, wanted = self.run(library, memory, settings), self.expected(settings)
        for name, values in wanted.items():
            np.testing.assert_array_equal(given[name], values, err_msg=name)


OUTPUTS = ("attention_lengths", "kept_lengths", "row_starts", "positions", "is_delimiter")


def call(
    library: NativeLibrary,
    memory: Memory,
    settings: ChunkKVSettings,
    sequences: NDArray[np.int32],
    prompts: NDArray[np.int32],
    contexts: int,
    max_length: int,
    token_ids: NDArray[np.int32],
    delimiters: bool = True,
) -> Arrays:
    sizes = (len(prompts),) * 3 + (len(token_ids),) * 2
    out: dict[str, Any] = {name: memory.empty((size,), "int32") for name, size in zip(OUTPUTS, sizes, strict=True)}
    options: dict[str, Any] = {"token_ids": memory.put(token_ids), "delimiter_bitmap": memory.put(bitmap())}
    options["vocab_size"] = VOCABULARY
    if not delimiters:
        options, out["is_delimiter"] = {}, None
    placed = memory.put(sequences), memory.put(prompts)
    library.prepare(settings, *placed, contexts=contexts, max_length=max_length, **options, **out)
    return {name: memory.get(array) for name, array in out.items() if array is not None}


@pytest.mark.parametrize("trailing", [0, 5])
@pytest.mark.parametrize(("contexts", "generations"), [(1, 0), (0, 1), (3, 0), (0, 4), (5, 6), (1, 300), (300, 1)])
def test_rows_and_tokens_are_those_of_numpy(
    library: NativeLibrary, memory: Memory, contexts: int, generations: int, trailing: int
) -> None:
    Batch.draw(contexts, contexts, generations, trailing=trailing or contexts == 0).check(library, memory)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 5000])
def test_thousands_of_rows(library: NativeLibrary, memory: Memory, rows: int) -> None:
    """A tile of the scan is 1024 rows; rows without tokens, contexts and generations cross it."""
    Batch.draw(rows, rows // 2, rows - rows // 2, longest=12).check(library, memory)
    Batch.draw(rows, rows - 3, 3, longest=2).check(library, memory)


@pytest.mark.parametrize("settings", [SETTINGS, ChunkKVSettings(), ChunkKVSettings(budget_tokens=100, min_tokens=46)])
def test_budgets(library: NativeLibrary, memory: Memory, settings: ChunkKVSettings) -> None:
    Batch.draw(7, 6, 9, longest=3000).check(library, memory, settings)


def test_long_prompts(library: NativeLibrary, memory: Memory) -> None:
    """L * keep_per_10k exceeds 32 bits."""
    batch = Batch.draw(8, 1, 3, longest=300_000)
    batch.prompts[0] = 299_999
    batch.token_ids = np.resize(batch.token_ids, 299_999 + 3)
    batch.check(library, memory, ChunkKVSettings(keep_per_10k=9_900))


def test_without_delimiters(library: NativeLibrary, memory: Memory) -> None:
    batch = Batch.draw(9, 4, 3)
    given, wanted = batch.run(library, memory, SETTINGS, delimiters=False), batch.expected(SETTINGS)
    assert set(given) == set(OUTPUTS) - {"is_delimiter"}
    for name, values in given.items():
        np.testing.assert_array_equal(values, wanted[name])


def test_generation_goes_on_at_the_logical_position(library: NativeLibrary, memory: Memory) -> None:
    """Prompt 50, 20 kept, 3 generated: the newest token is the 53rd and lies in slot 22, so attention reads 23."""
    batch = Batch(np.int32([50]), np.int32([3]), 0, 50, np.int32([5]))
    given = batch.run(library, memory, SETTINGS)
    assert given["kept_lengths"] == 20 and given["attention_lengths"] == 23 and given["positions"] == 52


def test_more_tokens_in_the_rows_than_in_the_batch_are_cut(library: NativeLibrary, memory: Memory) -> None:
    prompts = np.int32([10, 10, 10])
    given = call(library, memory, SETTINGS, prompts, prompts, 3, 10, np.zeros(15, np.int32))
    assert given["row_starts"].tolist() == [0, 10, 15]
    assert given["positions"].tolist() == [*range(10), *range(5)]


@pytest.mark.parametrize("seed", range(6))
def test_garbage_stays_inside(library: NativeLibrary, memory: Memory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for contexts in (0, 3, 1100):
        sequences, prompts = rng.choice(WILD, 1100), rng.choice(WILD, 1100)
        given = call(library, memory, SETTINGS, sequences, prompts, contexts, 900, rng.choice(WILD, 333))
        lengths = np.clip(prompts.astype(np.int64), 0, 900)
        tokens = np.where(np.arange(1100) < contexts, lengths, 1)
        starts = np.minimum(np.cumsum(tokens) - tokens, 333)
        np.testing.assert_array_equal(given["row_starts"], starts)
        assert (given["kept_lengths"] >= 0).all() and (given["kept_lengths"] <= lengths).all()
        np.testing.assert_array_equal(given["attention_lengths"][:contexts], sequences[:contexts])
        assert (given["attention_lengths"][contexts:] >= 1).all()
        assert (given["positions"] >= 0).all()
        assert np.isin(given["is_delimiter"], [0, 1]).all()


def test_two_runs_give_the_same_bits(library: NativeLibrary, memory: Memory) -> None:
    batch = Batch.draw(10, 700, 700)
    first, second = (batch.run(library, memory, SETTINGS) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in OUTPUTS)


def test_an_empty_batch_is_fine(library: NativeLibrary, memory: Memory) -> None:
    given = call(library, memory, SETTINGS, *[np.zeros(0, np.int32)] * 2, 0, 0, np.zeros(0, np.int32))
    assert all(len(values) == 0 for values in given.values())


def test_delimiters_come_with_all_they_need(library: NativeLibrary, memory: Memory) -> None:
    batch = Batch.draw(11, 2, 2)
    outputs = {name: memory.empty((4,), "int32") for name in OUTPUTS[:3]}
    outputs["positions"] = memory.empty(batch.token_ids.shape, "int32")
    with pytest.raises(NativeArgumentError, match=naming("is_delimiter NULL")):
        library.prepare(
            SETTINGS,
            memory.put(batch.prompts),
            memory.put(batch.prompts),
            contexts=2,
            max_length=60,
            token_ids=memory.put(batch.token_ids),
            **outputs,
        )
