"""The kinds of KV cache, in 1.2."""

from support.tensorrt_llm_double import machine

if not machine().late:
    raise ModuleNotFoundError("No module named 'tensorrt_llm.llmapi.kv_cache_type'", name=__name__)

from tensorrt_llm._kv_cache_type import KVCacheType

__all__ = ["KVCacheType"]
