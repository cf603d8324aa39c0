"""Engine directories on TensorRT."""
