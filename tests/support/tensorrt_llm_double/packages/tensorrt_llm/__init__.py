"""TensorRT-LLM's package as ChunkKV meets it."""

from support.tensorrt_llm_double import VERSION

__version__ = VERSION
