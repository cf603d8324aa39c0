"""The CUDA runtime, TensorRT and the plugins on this machine."""
