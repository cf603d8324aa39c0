"""Turns what users pass to an op into the fields of its parameter struct, and checks it on the way."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.errors import ConfigError, NativeArgumentError
from chunkkv.limits import RANGES
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
            windows=self.optional(rows.windows, "windows", "int32", (batch,)),
            num_tokens=rows.num_tokens,
            batch=batch,
            max_length=rows.max_length,
        )

    def per_row(
        self, array: Array, name: str, dtype: str, rows: abi.Rows, packed_width: int, choices: int | None = None
    ) -> tuple[int, int]:
        """Return the address of an array [B, width] or [T], and the most entries of it that a row may use.

        Where every KV head has a choice of its own, `choices` is their number: [B, choices, width] or [choices, T].
        """
        heads = () if choices is None else (choices,)
        if rows.row_starts is not None:
            return self.array(array, name, dtype, (*heads, rows.num_tokens)).pointer, packed_width
        raw = self.array(array, name, dtype, (rows.batch, *heads, None))
        return raw.pointer, raw.shape[-1]

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


def settings_struct(settings: ChunkKVSettings, head_class: str = ALL_HEADS) -> abi.Settings:
    """Return the struct of the settings; raises NativeArgumentError for a word that the kernels do not compute."""
    try:
        settings.check_kernels()
    except ConfigError as error:
        raise NativeArgumentError(str(error)) from None
    if head_class not in abi.HEAD_CLASS_CODES:
        raise NativeArgumentError(f"head_class is {head_class!r}; allowed are {', '.join(abi.HEAD_CLASS_CODES)}")
    names = {name for name, _ in abi.Settings._fields_}
    values = {name: getattr(settings, name) for name in names if name in RANGES}
    values |= {name: codes[getattr(settings, name)] for name, codes in abi.WORD_CODES.items() if name in names}
    if settings.budget_split == "classes":
        values["head_class"] = abi.HEAD_CLASS_CODES[head_class]
        values["all_heads"] = settings.num_kv_heads * len(settings.reading_heads)
        values["all_reading_heads"] = sum(map(len, settings.reading_heads))
    return abi.Settings(**values)


def choices_of(settings: ChunkKVSettings, kv_heads: int) -> int | None:
    """Return how many KV heads have indices of their own, None where they share one list."""
    return kv_heads if settings.heads == "each" else None


def token_shape(rows: abi.Rows, choices: int | None = None) -> tuple[int, ...]:
    """Return the shape of an array with one entry per token."""
    heads = () if choices is None else (choices,)
    return (rows.batch, *heads, rows.max_length) if rows.row_starts is None else (*heads, rows.num_tokens)


def stream_pointer(stream: Any, arrays: Iterable[Any] = ()) -> ctypes.c_void_p:
    """Return the cudaStream_t of an integer, a torch stream or a CuPy stream.

    None is the stream that the library of `arrays` works on: the current one of torch or CuPy, else the default stream.
    """
    if stream is None:
        stream = current_stream(arrays)
    return ctypes.c_void_p(getattr(stream, "cuda_stream", getattr(stream, "ptr", stream)))


def current_stream(arrays: Iterable[Any]) -> Any:
    """Return the stream that work on the first torch or CuPy array on a GPU is enqueued on, 0 where there is none."""
    for array in arrays:
        library = type(array).__module__.partition(".")[0]
        if library == "torch" and array.is_cuda:
            return sys.modules["torch"].cuda.current_stream(array.device)
        if library == "cupy":
            return sys.modules["cupy"].cuda.get_current_stream()
    return 0
