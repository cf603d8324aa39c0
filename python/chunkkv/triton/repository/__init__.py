"""Writes, patches and checks Triton model repositories."""
