"""Engine directories on ONNX Runtime."""
