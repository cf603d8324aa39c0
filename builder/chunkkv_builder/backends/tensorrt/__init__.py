"""TensorRT 10.15 and later: a prefill engine with the ChunkKV plugins inside, and decode engines."""
