"""The models that tritonserver runs."""
