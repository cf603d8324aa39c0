"""ChunkKV-TRT: keep the part of a prompt's KV cache that matters, inside a compiled engine.

The public names are loaded on first use, so that `import chunkkv` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
