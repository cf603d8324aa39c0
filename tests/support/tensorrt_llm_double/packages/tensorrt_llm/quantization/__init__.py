"""How the cache is quantised."""

from __future__ import annotations

import enum


class QuantMode(enum.IntFlag):
    INT8_KV_CACHE, FP8_KV_CACHE = 1 << 6, 1 << 7

    def has_int8_kv_cache(self) -> bool:
        return bool(self & QuantMode.INT8_KV_CACHE)

    def has_fp8_kv_cache(self) -> bool:
        return bool(self & QuantMode.FP8_KV_CACHE)

    def has_kv_cache_quant(self) -> bool:
        return bool(self)
