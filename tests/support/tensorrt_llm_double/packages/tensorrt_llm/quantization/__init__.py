"""How weights, activations and the cache are quantised."""

from __future__ import annotations

import enum


class QuantMode(enum.IntFlag):
    INT4_WEIGHTS, INT8_WEIGHTS, ACTIVATIONS, PER_CHANNEL, PER_TOKEN, PER_GROUP = (1 << bit for bit in range(6))
    INT8_KV_CACHE, FP8_KV_CACHE = 1 << 6, 1 << 7
    FP8_QDQ = 1 << 8

    def has_int8_kv_cache(self) -> bool:
        return bool(self & QuantMode.INT8_KV_CACHE)

    def has_fp8_kv_cache(self) -> bool:
        return bool(self & QuantMode.FP8_KV_CACHE)

    def has_kv_cache_quant(self) -> bool:
        return self.has_int8_kv_cache() or self.has_fp8_kv_cache()

    def has_fp8_qdq(self) -> bool:
        return bool(self & QuantMode.FP8_QDQ)

    @classmethod
    def from_quant_algo(cls, quant_algo: str | None, kv_cache_quant_algo: str | None = None) -> QuantMode:
        mode = {None: cls(0), "FP8": cls.FP8_QDQ}[quant_algo]
        return mode | {None: cls(0), "INT8": cls.INT8_KV_CACHE, "FP8": cls.FP8_KV_CACHE}[kv_cache_quant_algo]
