"""The ops alone, for users of arrays: libchunkkv by ctypes, on torch, CuPy, NumPy or DLPack arrays and raw pointers."""

from chunkkv.native.arrays import RawArray
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import KVView, contiguous_kv, packed_kv, paged_kv
from chunkkv.native.library import NativeLibrary
from chunkkv.native.paged import CompressedRows, compress_pool

__all__ = [
    "BatchRows",
    "Chunks",
    "CompressedRows",
    "KVView",
    "NativeLibrary",
    "RawArray",
    "compress_pool",
    "contiguous_kv",
    "packed_kv",
    "paged_kv",
]
