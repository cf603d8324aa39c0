"""The ops alone, for users of arrays: libchunkkv by ctypes, on torch, CuPy, NumPy or DLPack arrays and raw pointers."""

from chunkkv.native.arrays import RawArray
from chunkkv.native.batch import BatchRows, Chunks
from chunkkv.native.kv import KVView, contiguous_kv, packed_kv, paged_kv
from chunkkv.native.library import NativeLibrary

__all__ = ["BatchRows", "Chunks", "KVView", "NativeLibrary", "RawArray", "contiguous_kv", "packed_kv", "paged_kv"]
