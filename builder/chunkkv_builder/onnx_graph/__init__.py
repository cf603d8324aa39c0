"""Plan to ONNX: the transformer's step graph, and ChunkKV as model-local functions."""
