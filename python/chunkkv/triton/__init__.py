"""Serving on NVIDIA Triton: model repositories, the models in them, and the server's supervisor."""
