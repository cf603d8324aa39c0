"""TensorRT-LLM 0.16 to 1.2.1: trtllm-build with ChunkKV around every attention layer of the network.

`build_chunkkv` is the Python entry, `command.run` the one of chunkkv-build. Nothing here imports tensorrt_llm before it
is needed, and nothing looks at its version number: what a signature has decides.
"""

from chunkkv_builder.backends.tensorrt_llm.api import EngineBuild, build_chunkkv

__all__ = ["EngineBuild", "build_chunkkv"]
