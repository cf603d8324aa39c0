"""Finds TensorRT, a GPU and the ChunkKV plugins, or says what is missing; used when building and when running.

Whether a TensorRT will do is decided by the names that it has, not by its version number: some names have moved.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.limits import KERNEL_HEAD_SIZES, KERNEL_MAX_GROUP

PLUGIN_NAMESPACE, PLUGIN_VERSION = "chunkkv", "1"
PLUGINS = ("ChunkKVSelect", "ChunkKVCompact")
TENSORRT_LLM_PLUGINS = ("ChunkKVPrepare", "ChunkKVRope", "ChunkKVScore", "ChunkKVCompress")
FIRST_VERSION = "10.15"
_PLUGIN_LIBRARY = "libchunkkv_tensorrt.so"
_PLACES = (Path(__file__).parents[1] / "lib", Path(__file__).parents[3] / "build" / "native")
_NEEDED = ("IKVCacheUpdateLayer", "IRotaryEmbeddingLayer", "IAttention", "OnnxParser", "IProgressMonitor")


def import_tensorrt(needed: Sequence[str] = _NEEDED) -> Any:
    """Return the module tensorrt; raises BackendUnavailableError where it is missing, broken or lacks a name `needed`.

    The default names are what the graphs for TensorRT need; TensorRT-LLM brings older versions and needs none of them.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise BackendUnavailableError(f"the Python package 'tensorrt', which lacks {error.name!r}") from None
        raise BackendUnavailableError(
            f"the Python package 'tensorrt' {FIRST_VERSION} or later, which is not installed"
        ) from None
    except ImportError as error:
        raise BackendUnavailableError(f"the Python package 'tensorrt', which cannot be loaded ({error})") from None
    if absent := [name for name in needed if not hasattr(trt, name)]:
        raise BackendUnavailableError(
            f"TensorRT {FIRST_VERSION} or later; {getattr(trt, '__version__', 'the one installed')} has no {absent[0]}"
        )
    return trt


def missing(plugins: bool) -> list[str]:
    """Return what this machine lacks for TensorRT engines, one text for each thing; empty if it lacks nothing.

    `plugins` says whether the engines contain ChunkKV plugins, so that the plugin library is needed too.
    """
    lacking = []
    trt = None
    try:
        trt = import_tensorrt()
    except BackendUnavailableError as error:
        lacking.append(str(error))
    try:
        if reason := CudaRuntime.load().why_no_device():
            lacking.append(f"an NVIDIA GPU, which was not found ({reason})")
    except BackendUnavailableError as error:
        lacking.append(str(error))
    if plugins and trt is not None:
        try:
            find_plugin_library(trt.__version__)
        except BackendUnavailableError as error:
            lacking.append(str(error))
    return lacking


def find_plugin_library(tensorrt_version: str) -> Path:
    """Return the plugin library for the major version of a TensorRT, such as "11" or "11.4.0.106".

    It is looked for beside the library that CHUNKKV_LIB names, then where CMake builds it. Raises
    BackendUnavailableError where it is in none of these folders.
    """
    name = f"{_PLUGIN_LIBRARY}.{tensorrt_version.split('.', maxsplit=1)[0]}"
    named = os.environ.get("CHUNKKV_LIB")
    places = ((Path(named).parent,) if named else ()) + _PLACES
    for folder in places:
        if (folder / name).is_file():
            return folder / name
    raise BackendUnavailableError(
        f"the ChunkKV plugins {name}, which are in none of {', '.join(map(str, places))}: build them with CMake, or "
        "let CHUNKKV_LIB name the libchunkkv.so beside them"
    )


def load_plugins(trt: Any, registry: Any, errors: ErrorLog, names: Sequence[str] = PLUGINS) -> dict[str, Any]:
    """Register the ChunkKV plugins in `registry`, unless they are registered, and return the creators of `names`.

    Call start() before, with the logger of `errors`: TensorRT logs there why a library does not load. Raises
    BackendUnavailableError where the plugin library is missing, does not load or lacks a plugin.
    """
    creators = _creators(registry, names)
    if None in creators.values():
        path = find_plugin_library(trt.__version__)
        if registry.load_library(str(path)) is None:
            raise BackendUnavailableError(f"TensorRT {trt.__version__} does not load {path}{errors.explanation()}")
        creators = _creators(registry, names)
        if absent := [name for name, creator in creators.items() if creator is None]:
            raise BackendUnavailableError(f"{path} has no plugin {absent[0]} version {PLUGIN_VERSION}; build it again")
    return creators


def check_head_sizes(head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise ConfigError for a model that the plugins have no kernel for."""
    advice = "build without --chunkkv, or with --backend onnxruntime"
    if head_dim not in KERNEL_HEAD_SIZES:
        sizes = ", ".join(map(str, KERNEL_HEAD_SIZES))
        raise ConfigError(f"head_dim is {head_dim}; the ChunkKV plugins have kernels for {sizes}: {advice}")
    if num_heads // num_kv_heads > KERNEL_MAX_GROUP:
        raise ConfigError(
            f"{num_heads} query heads share {num_kv_heads} KV heads; the ChunkKV plugins take at most "
            f"{KERNEL_MAX_GROUP} query heads for one: {advice}"
        )


def _creators(registry: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) for name in names}


class ErrorLog:
    """Keeps the last errors that TensorRT logs: its functions return nothing on failure and say the reason there."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=50)

    def logger(self, trt: Any) -> Any:
        """Return a tensorrt.ILogger that writes here; it must outlive every object made with it."""
        severity, errors = trt.ILogger.Severity, self.errors

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, text: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    errors.append(text)

        return Logger()

    def explanation(self) -> str:
        """Return ": " and the kept errors in one line, or "" if there are none; to be added to a message."""
        return ": " + "; ".join(self.errors) if self.errors else ""


def start(trt: Any, kind: Any, logger: Any, errors: ErrorLog) -> Any:
    """Make the first object of a TensorRT: kind(logger), where `kind` is tensorrt.Builder or tensorrt.Runtime.

    Raises BackendUnavailableError where it cannot be made, as on a machine without a GPU.
    """
    try:
        return kind(logger)
    except (TypeError, RuntimeError):  # the bindings raise these where the library returned nothing
        reason = errors.explanation() or ": is there an NVIDIA GPU?"
        raise BackendUnavailableError(f"TensorRT {trt.__version__} cannot start{reason}") from None
