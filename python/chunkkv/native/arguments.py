"""Turns what users pass to an op into the fields of its parameter struct, and checks it on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from chunkkv.errors import ConfigError, NativeArgumentError
from chunkkv.native import structs as abi
from chunkkv.native.arrays import Array, RawArray, expect
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import KVView
from chunkkv.settings import ChunkKVSettings

Shape = tuple[int | None, ...]  # None: any size


class ArgumentReader:
    """Reads the arguments for one library; raises NativeArgumentError for what the library cannot use.

    Parameters
    ----------
    library_name : str
        The file name of the library, for messages.
    on_device : bool
        Whether the library works on device memory; the emulated one works on host memory.
    """

    def __init__(self, library_name: str, on_device: bool) -> None:
        self._library_name, self._on_device = library_name, on_device

    def array(self, array: Array, name: str, dtype: str | None, shape: Shape) -> RawArray:
        """Return a dense array of this type (None: any) and shape."""
        raw = expect(array, name, dtype, shape)
        self.check_memory(raw.on_device, name)
        return raw

    def optional(self, array: Array | None, name: str, dtype: str, shape: Shape) -> int | None:
        """Return the address of an array like array() does, or None for None."""
        return None if array is None else self.array(array, name, dtype, shape).pointer

    def check_memory(self, on_device: bool | None, name: str) -> None:
        """Raise NativeArgumentError for memory that the library cannot read; None means that it is not known."""
        if on_device is not None and on_device != self._on_device:
            actual, needed = ("device", "host") if on_device else ("host", "device")
            raise NativeArgumentError(f"{name} is in {actual} memory; {self._library_name} works on {needed} memory")

    def rows(self, rows: BatchRows) -> abi.Rows:
        """Return the struct of a batch."""
        lengths = self.array(rows.lengths, "lengths", "int32", (None,))
        batch = lengths.shape[0]
        return abi.Rows(
            lengths=lengths.pointer,
            keep_per_10k=self.optional(rows.keep_per_10k, "keep_per_10k", "int32", (batch,)),
            budget_tokens=self.optional(rows.budget_tokens, "budget_tokens", "int32", (batch,)),
            row_starts=self.optional(rows.row_starts, "row_starts", "int32", (batch,)),
            num_tokens=rows.num_tokens,
            batch=batch,
            max_length=rows.max_length,
        )

    def per_row(self, array: Array, name: str, dtype: str, rows: abi.Rows, packed_width: int) -> tuple[int, int]:
        """Return the address of an array [B, width] or [T], and the most entries of it that a row may use."""
        if rows.row_starts is not None:
            return self.array(array, name, dtype, (rows.num_tokens,)).pointer, packed_width
        raw = self.array(array, name, dtype, (rows.batch, None))
        return raw.pointer, raw.shape[1]

    def chunks(self, chunks: Chunks, rows: abi.Rows, max_chunks: int) -> tuple[int, int]:
        """Return the addresses of chunk_starts and num_chunks."""
        padded = rows.row_starts is None
        shape = (rows.batch, max_chunks + 1) if padded else (rows.num_tokens + rows.batch,)
        starts = self.array(chunks.chunk_starts, "chunk_starts", "int32", shape)
        return starts.pointer, self.array(chunks.num_chunks, "num_chunks", "int32", (rows.batch,)).pointer

    def layers(self, layers: Sequence[KVView], targets: Sequence[KVView], *, in_place: bool) -> Any:
        """Return the C array of chunkkv_layer; in place it names no outputs."""
        entries = (abi.Layer * len(layers))()
        for entry, cache, target in zip(entries, layers, targets, strict=True):
            self.check_memory(cache.on_device, "layers")
            self.check_memory(target.on_device, "outputs")
            entry.key, entry.value = cache.key, cache.value
            if not in_place:
                entry.key_out, entry.value_out = target.key, target.value
        return entries

    def bitmap(self, delimiter_bitmap: Array | None, vocab_size: int) -> int | None:
        """Return the address of a bitmap with one bit for each token id below vocab_size."""
        return self.optional(delimiter_bitmap, "delimiter_bitmap", "uint32", ((vocab_size + 31) // 32,))


def settings_struct(settings: ChunkKVSettings) -> abi.Settings:
    """Return the struct of the settings; raises NativeArgumentError for a word that the kernels do not compute."""
    try:
        settings.check_kernels()
    except ConfigError as error:
        raise NativeArgumentError(str(error)) from None
    return abi.Settings(
        window=settings.window,
        sinks=settings.sinks,
        chunk_size=settings.chunk_size,
        boundaries=abi.BOUNDARIES_CODES[settings.boundaries],
        pooling=settings.pooling,
        score=abi.SCORE_CODES[settings.score],
        keep_per_10k=settings.keep_per_10k,
        budget_tokens=settings.budget_tokens,
        min_tokens=settings.min_tokens,
    )


def token_shape(rows: abi.Rows) -> tuple[int, ...]:
    """Return the shape of an array with one entry per token."""
    return (rows.batch, rows.max_length) if rows.row_starts is None else (rows.num_tokens,)


def stream_pointer(stream: Any) -> ctypes.c_void_p:
    """Return the cudaStream_t of an integer, a torch stream or a CuPy stream; 0 is the default stream."""
    return ctypes.c_void_p(getattr(stream, "cuda_stream", getattr(stream, "ptr", stream)))
