"""Steps of benchmarks/gpu_check.py; each is a module that prints its result as one JSON line."""
