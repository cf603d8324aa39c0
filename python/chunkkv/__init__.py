"""ChunkKV-TRT: keep the part of a prompt's KV cache that matters, inside a compiled engine.

The public names are loaded on first use, so that `import chunkkv` stays cheap.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunkkv.contexts.context import Context
    from chunkkv.errors import (
        BackendUnavailableError,
        BuildError,
        CacheFullError,
        CheckpointError,
        ChunkKVError,
        ConfigError,
        EngineError,
        EngineMismatchError,
        EngineRunError,
        NativeArgumentError,
        NativeError,
        OverloadedError,
        ProfileError,
        RequestError,
        RequestTimeoutError,
    )
    from chunkkv.results import GenerationResult, GroupChoice, Inspection, RequestStatistics, StreamEvent
    from chunkkv.sampling import SamplingParams
    from chunkkv.session import ChunkKVSession
    from chunkkv.settings import ChunkKVSettings

# ONNX Runtime's Linux wheels send usage data, and write a device id to the home directory as soon as they are imported.
# They read this once, so it stands before any import of onnxruntime. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.2.0"

__all__ = [
    "BackendUnavailableError",
    "BuildError",
    "CacheFullError",
    "CheckpointError",
    "ChunkKVError",
    "ChunkKVSession",
    "ChunkKVSettings",
    "ConfigError",
    "Context",
    "EngineError",
    "EngineMismatchError",
    "EngineRunError",
    "GenerationResult",
    "GroupChoice",
    "Inspection",
    "NativeArgumentError",
    "NativeError",
    "OverloadedError",
    "ProfileError",
    "RequestError",
    "RequestStatistics",
    "RequestTimeoutError",
    "SamplingParams",
    "StreamEvent",
    "__version__",
]

_MODULES = {
    "ChunkKVSession": "chunkkv.session",
    "ChunkKVSettings": "chunkkv.settings",
    "Context": "chunkkv.contexts.context",
    "GenerationResult": "chunkkv.results",
    "GroupChoice": "chunkkv.results",
    "Inspection": "chunkkv.results",
    "RequestStatistics": "chunkkv.results",
    "SamplingParams": "chunkkv.sampling",
    "StreamEvent": "chunkkv.results",
}

if not TYPE_CHECKING:  # checkers read the imports above, and would take any name for defined where this exists

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'chunkkv' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES.get(name, "chunkkv.errors")), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
