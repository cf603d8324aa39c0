"""The ops alone, for users of arrays: libchunkkv by ctypes, on torch, CuPy, NumPy or DLPack arrays and raw pointers."""

from chunkkv.native.arrays import RawArray
from chunkkv.native.kv import KVCache, contiguous_kv, packed_kv, paged_kv
from chunkkv.native.library import Chunks, NativeLibrary, Rows

__all__ = ["Chunks", "KVCache", "NativeLibrary", "RawArray", "Rows", "contiguous_kv", "packed_kv", "paged_kv"]
