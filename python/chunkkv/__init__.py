"""ChunkKV-TRT: keep the part of a prompt's KV cache that matters, inside a compiled engine.

The public names are loaded on first use, so that `import chunkkv` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "ChunkKVSession": "chunkkv.session",
    "ChunkKVSettings": "chunkkv.settings",
    "SamplingParams": "chunkkv.sampling",
    "ChunkKVError": "chunkkv.errors",
}
__all__ = ["ChunkKVError", "ChunkKVSession", "ChunkKVSettings", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'chunkkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
