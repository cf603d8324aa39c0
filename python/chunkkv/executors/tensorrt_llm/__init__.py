"""TensorRT-LLM engines over a pool of KV blocks."""
