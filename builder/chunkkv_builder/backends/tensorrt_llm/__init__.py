"""TensorRT-LLM 0.16 to 1.2.1: trtllm-build with ChunkKV around every attention layer of the network.

`build_chunkkv` is the entry for Python programs, backend.TensorRTLLMBackend the one of chunkkv-build. tensorrt_llm is
imported only where it is needed. Versions are told apart by the signatures of its functions, not by their numbers.
"""

from chunkkv_builder.backends.tensorrt_llm.engine_build import EngineBuild, build_chunkkv

__all__ = ["EngineBuild", "build_chunkkv"]
