"""Chooses the backend; each is imported only when it is asked for, so that a missing library costs nothing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from chunkkv.engine.backends import BACKENDS, DEFAULT_BACKEND, ONNXRUNTIME, TENSORRT, TENSORRT_LLM
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv_builder.backends.interface import Backend

AUTO = "auto"


def available_backend(flags: Namespace) -> Backend[Any]:
    """Return the backend that `flags` name; raises BackendUnavailableError with everything this machine lacks for it.

    Parameters
    ----------
    flags : Namespace
        Of chunkkv_builder.flags.parse.
    """
    backend = load_backend(flags)
    if lacking := backend.missing(flags):
        message = f"--backend {backend.name} needs {'; and '.join(lacking)}"
        if "--chunkkv_ops" not in lacking[-1]:  # else the nearer way out is named already
            message += f". Install that or give --backend {DEFAULT_BACKEND}"
        raise BackendUnavailableError(message)
    return backend


def load_backend(flags: Namespace) -> Backend[Any]:
    """Return the backend that `flags` name, with its own options, whether or not it can build on this machine."""
    name = DEFAULT_BACKEND if flags.backend == AUTO else flags.backend
    if name == ONNXRUNTIME:
        from chunkkv_builder.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name == TENSORRT:
        from chunkkv_builder.backends.tensorrt.backend import TensorRTBackend
        from chunkkv_builder.backends.tensorrt.target import Options

        timing_cache = Path(flags.timing_cache) if flags.timing_cache else None
        ops = flags.chunkkv_ops or "auto"
        return TensorRTBackend(Options(flags.tensorrt or "auto", flags.compute_capability, ops, timing_cache))
    if name == TENSORRT_LLM:
        from chunkkv_builder.backends.tensorrt_llm.backend import TensorRTLLMBackend

        tokenizer_dir = Path(flags.tokenizer_dir) if flags.tokenizer_dir else None
        return TensorRTLLMBackend(flags.passed_on, tokenizer_dir, flags.chunkkv_tp_agree)
    raise ConfigError(f"backend is {name!r}; allowed is {' or '.join(BACKENDS)}")
