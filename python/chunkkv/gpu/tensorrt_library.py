"""Finds TensorRT, a GPU and the ChunkKV plugins, or says what is missing; used when building and when running.

Features are looked for, not version numbers: 10.15 brought what the graphs need, and names moved since.
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
    """Return what this machine lacks for TensorRT engines, with ChunkKV plugins or without; empty if nothing."""
    found = []
    trt = None
    try:
        trt = import_tensorrt()
    except BackendUnavailableError as error:
        found.append(str(error))
    try:
        if reason := CudaRuntime.load().why_no_device():
            found.append(f"an NVIDIA GPU, which was not found ({reason})")
    except BackendUnavailableError as error:
        found.append(str(error))
    if plugins and trt is not None:
        try:
            find_plugin_library(trt)
        except BackendUnavailableError as error:
            found.append(str(error))
    return found


def find_plugin_library(trt: Any) -> Path:
    """Return the plugin library for this TensorRT's major version; raises BackendUnavailableError where none is."""
    name = f"{_PLUGIN_LIBRARY}.{trt.__version__.split('.')[0]}"
    named = os.environ.get("CHUNKKV_LIB")
    places = ((Path(named).parent,) if named else ()) + _PLACES
    for folder in places:
        if (folder / name).is_file():
            return folder / name
    raise BackendUnavailableError(
        f"the ChunkKV plugins {name}, which are in none of {', '.join(map(str, places))}: build them with CMake, or "
        "let CHUNKKV_LIB name the libchunkkv.so beside them"
    )


def load_plugins(trt: Any, registry: Any, messages: Messages, names: Sequence[str] = PLUGINS) -> dict[str, Any]:
    """Register the ChunkKV plugins in `registry` unless they are, and return the creators of `names` by name.

    A Builder or Runtime must have started before: TensorRT says to its logger why a library does not load.
    """
    creators = _creators(registry, names)
    if None in creators.values():
        path = find_plugin_library(trt)
        if registry.load_library(str(path)) is None:
            raise BackendUnavailableError(f"TensorRT {trt.__version__} does not load {path}{messages.because()}")
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


class Messages:
    """What TensorRT's logger said last: errors are kept, so that a failure can be explained."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=50)

    def logger(self, trt: Any) -> Any:
        """Return a tensorrt.ILogger that writes here; it must outlive every object made with it."""
        severity, messages = trt.ILogger.Severity, self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, text: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    messages.errors.append(text)

        return Logger()

    def because(self) -> str:
        """Return ": " and the errors so far as one line, or nothing."""
        return ": " + "; ".join(self.errors) if self.errors else ""


def start(trt: Any, kind: Any, logger: Any, messages: Messages) -> Any:
    """Return a tensorrt.Builder or tensorrt.Runtime; raises BackendUnavailableError where there is no GPU for it."""
    try:
        return kind(logger)
    except (TypeError, RuntimeError):  # the bindings' way of saying that the library returned nothing
        reason = messages.because() or ": is there an NVIDIA GPU?"
        raise BackendUnavailableError(f"TensorRT {trt.__version__} cannot start{reason}") from None
