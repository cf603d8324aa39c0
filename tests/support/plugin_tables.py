"""The tables of the TensorRT plugins' inputs and outputs, read from their sources: what a network must connect."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_PLUGINS = Path(__file__).resolve().parents[2] / "plugins" / "tensorrt"


@cache
def input_names(plugin: str) -> tuple[str, ...]:
    """Return the names of all inputs of a plugin in order, such as of "ChunkKVPrepare"; "" where a field decides."""
    table = re.search(r"kInputs\[\] = \{([^}]*)\}", _source(plugin))
    assert table is not None, f"{plugin} has no table of inputs"
    return tuple(re.findall(r'"(\w*)"', table[1]))


@cache
def output_names(plugin: str) -> tuple[str, ...]:
    """Return the names of all outputs of a plugin in order, from the enum before its table of inputs."""
    enum = re.search(r"enum \{([^}]*)\};\s*constexpr const char\* kInputs", _source(plugin))
    assert enum is not None, f"{plugin} has no enum of outputs"
    names = re.findall(r"\bk(\w+)", enum[1])
    return tuple(re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in names)


def _source(plugin: str) -> str:
    return (_PLUGINS / f"{plugin.removeprefix('ChunkKV').lower()}_plugin.cc").read_text(encoding="utf-8")
