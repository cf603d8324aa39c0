"""The C++ bindings, of which 0.16 to 1.1 have the kinds of KV cache."""

from support.tensorrt_llm_double import machine

if not machine().late:
    from tensorrt_llm._kv_cache_type import KVCacheType

    __all__ = ["KVCacheType"]
