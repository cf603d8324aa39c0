"""Finds TensorRT-LLM and the ChunkKV plugins that its engines need, or says what is missing."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

from chunkkv.engine.directory import hash_file
from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_library import TENSORRT_LLM_PLUGINS, Messages, find_plugin_library, load_plugins

VERSIONS = "0.16 to 1.2.1"


def installed() -> bool:
    """Whether the package tensorrt_llm is there, without importing it."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def import_build_command() -> ModuleType:
    """Return the module behind trtllm-build; raises BackendUnavailableError where it is not one we know."""
    try:
        from tensorrt_llm.commands import build
    except ImportError as error:
        raise BackendUnavailableError(
            f"--backend tensorrt_llm needs the Python package 'tensorrt_llm' with trtllm-build ({VERSIONS}), which "
            f"cannot be loaded ({error})"
        ) from None
    for name in ("parse_arguments", "main", "build"):
        if not callable(getattr(build, name, None)):
            raise BackendUnavailableError(
                f"tensorrt_llm.commands.build has no {name}: this TensorRT-LLM is none of {VERSIONS}"
            )
    return build


class Plugins:
    """The ChunkKV plugins in TensorRT's registry; `library` names the file they come from and its sha256."""

    def __init__(self) -> None:
        import tensorrt as trt
        import tensorrt_llm

        self.trt = trt
        path = find_plugin_library(trt)
        self.library = {"name": path.name, "sha256": hash_file(path).sha256}
        self.creators: dict[str, Any] = load_plugins(trt, trt.get_plugin_registry(), Messages(), TENSORRT_LLM_PLUGINS)
        self.versions = {"tensorrt": str(trt.__version__), "tensorrt_llm": str(tensorrt_llm.__version__)}
