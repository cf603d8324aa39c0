"""Measurements against other implementations; every run checks before it times."""
