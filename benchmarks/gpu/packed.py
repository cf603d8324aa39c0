"""A packed batch of prompts and generating rows: prepare and the packed ops, checked and timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.gpu.device import Device
from chunkkv.native import BatchRows, NativeLibrary, RawArray, paged_kv
from chunkkv.native.arrays import as_raw
from chunkkv.settings import ChunkKVSettings

GENERATING = 64  # rows of one token each, behind the prompts
PER_ROW = ("attention_lengths", "kept_lengths", "row_starts")
PER_TOKEN = ("positions", "is_delimiter")


class PackedBatch:
    """Two prompts, one half as long as the other, and GENERATING rows; arrays belong to this object."""

    def __init__(self, device: Device, library: NativeLibrary, settings: ChunkKVSettings, length: int):
        self.device, self.library, self.settings, self.length = device, library, settings, length
        rng = np.random.default_rng(5)
        self.prompts = np.array([length, length // 2, *rng.integers(1, length, GENERATING)], np.int32)
        self.generated = np.array([0, 0, *rng.integers(1, 100, GENERATING)], np.int32)
        self.tokens = length + length // 2 + GENERATING
        vocabulary = device.shapes.vocabulary
        self.ids = rng.integers(-1, vocabulary + 1, self.tokens).astype(np.int32)
        self.words = rng.integers(0, 1 << 31, -(-vocabulary // 32)).astype(np.int32)
        self.outputs = {name: device.empty(len(self.prompts), dtype="int32") for name in PER_ROW}
        self.outputs |= {name: device.empty(self.tokens, dtype="int32") for name in PER_TOKEN}
        self.inputs = [device.int32(values) for values in (self.prompts + self.generated, self.prompts, self.ids)]
        self.bitmap_words = device.int32(self.words)  # what bitmap points to
        raw = as_raw(self.bitmap_words)
        self.bitmap = RawArray(raw.pointer, "uint32", raw.shape, on_device=raw.on_device)

    def prepare(self) -> None:
        """Run the op."""
        sequences, prompts, ids = self.inputs
        options = {"delimiter_bitmap": self.bitmap, "vocab_size": self.device.shapes.vocabulary, "token_ids": ids}
        sizes = {"contexts": 2, "max_length": self.length, "stream": self.device.stream}
        self.library.prepare(self.settings, sequences, prompts, **options, **sizes, **self.outputs)

    @property
    def moved(self) -> int:
        """Bytes that prepare reads and writes."""
        return 12 * self.tokens + 20 * len(self.prompts)

    def check_prepare(self) -> None:
        """Compare every output with NumPy's."""
        kept = np.array([self.settings.kept_tokens(int(length)) for length in self.prompts])
        tokens = np.where(np.arange(len(self.prompts)) < 2, self.prompts, 1)
        last = self.prompts + self.generated - 1
        inside = (self.ids >= 0) & (self.ids < self.device.shapes.vocabulary)
        ids = np.where(inside, self.ids, 0)
        expected = {
            "attention_lengths": np.where(self.generated > 0, last + 1 - (self.prompts - kept), self.prompts),
            "kept_lengths": kept,
            "row_starts": np.cumsum(tokens) - tokens,
            "positions": np.concatenate([np.arange(self.length), np.arange(self.length // 2), last[2:]]),
            "is_delimiter": inside & (self.words[ids // 32] >> (ids % 32) & 1 != 0),
        }
        self.prepare()
        self.device.wait()
        for name, values in expected.items():
            output = self.device.host(self.outputs[name])
            assert np.array_equal(output, values), f"prepare: wrong {name} at {np.flatnonzero(output != values)[:9]}"

    def check_choice(self) -> None:
        """Score, select and compact the prompts with packed and with padded arrays: the results must not differ."""
        results = [self._compress(packed) for packed in (False, True)]
        for name, padded, packed in zip(("kept_lengths", "kept_indices", "pool"), *results, strict=True):
            assert np.array_equal(padded, packed), f"packed {name} differ from padded ones"

    def _compress(self, packed: bool) -> list[Any]:
        device, library, shapes = self.device, self.library, self.device.shapes
        lengths, rows = self.prompts[:2], BatchRows(device.int32(self.prompts[:2]), self.length)
        if packed:
            rows = BatchRows(
                rows.lengths, self.length, row_starts=self.outputs["row_starts"][:2], num_tokens=self.tokens
            )
        pages = -(-self.length // shapes.page)
        pool = device.random(2 * pages, 1, 2, shapes.kv_heads, shapes.page, shapes.head_dim, seed=3)
        order = np.random.default_rng(0).permutation(2 * pages).reshape(2, pages) * 2
        cache = paged_kv(pool, device.int32(np.stack([order, order + 1], axis=1)), 0)
        query = device.random(2, shapes.heads, self.settings.window, shapes.head_dim, seed=4)

        def array(width: int, dtype: str) -> Any:
            return device.empty(*((self.tokens,) if packed else (2, width)), dtype=dtype)

        scores = array(library.max_chunks(self.settings, self.length), "float32")
        kept, counts = array(self.length, "int32"), device.empty(2, dtype="int32")
        size = library.score_workspace(self.settings, rows, query, cache, chunk_scores=scores)
        arguments = {"workspace": device.workspace(size), "stream": device.stream}
        library.score(self.settings, rows, query, cache, chunk_scores=scores, **arguments)
        library.select(self.settings, rows, scores, kept, counts, stream=device.stream)
        library.compact(rows, kept, counts, [cache], stream=device.stream)
        device.wait()
        indices, numbers = device.host(kept), device.host(counts)
        own = np.split(indices[: lengths.sum()], [lengths[0]]) if packed else list(indices)
        return [numbers, np.concatenate([row[:n] for row, n in zip(own, numbers, strict=True)]), device.host(pool)]
