"""The Python of a TensorRT-LLM source tree builds networks with ChunkKV (make test-tensorrt-llm)."""
