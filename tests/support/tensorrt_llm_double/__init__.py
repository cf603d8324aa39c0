"""The packages tensorrt and tensorrt_llm as read from their published sources. A contract as read, not TensorRT-LLM.

Recorders with the names and signatures that ChunkKV meets, nothing else. They hold what the authors believe of
TensorRT-LLM, so a test on them cannot find that the belief is wrong; only a machine with TensorRT-LLM can.

The line from 1.0 to 1.2, and one decoder, like Llama's, for all models. TensorRT-LLM itself makes the networks of real
models, in tests/tensorrt_llm_source.

`installed()` puts them where `import tensorrt_llm` finds them. A built "engine" is the recorded network (graph.py),
which run.py executes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.tensorrt_llm_double.graph import Graph

PACKAGES = Path(__file__).parent / "packages"
VERSION, TENSORRT_VERSION = "1.2.1", "10.14.1.48"
_DOUBLED = ("tensorrt", "tensorrt_llm")


@dataclass
class Machine:
    """One machine, and every network that was built on it."""

    networks: list[Graph] = field(default_factory=list)
    cuda: Any = None  # a CudartDouble, where engines are run by addresses
    plugins: Any = None  # what runs the plugin nodes of engines, where that is not oracle.py


_MACHINES: list[Machine] = []


def machine() -> Machine:
    """Return the machine whose packages are installed."""
    return _MACHINES[-1]


@contextlib.contextmanager
def installed() -> Iterator[Machine]:
    """Make `import tensorrt` and `import tensorrt_llm` find fresh doubles."""
    before = _taken_out()
    _MACHINES.append(Machine())
    sys.path.insert(0, str(PACKAGES))
    try:
        yield _MACHINES[-1]
    finally:
        sys.path.remove(str(PACKAGES))
        _MACHINES.pop()
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict[str, Any]:
    names = [name for name in sys.modules if name.split(".")[0] in _DOUBLED]
    return {name: sys.modules.pop(name) for name in names}
