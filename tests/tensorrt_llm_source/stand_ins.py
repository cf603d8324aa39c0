"""Modules that TensorRT-LLM imports and that no network needs: compiled bindings, MPI, tools of other features.

A stand-in answers every name with a class that can be called, inherited from and indexed. Only what a build really
computes with is written out: the type of a KV cache, and the number of MPI processes.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

# Packages whose own code takes no part, installed or not: newer versions lack names that an old TensorRT-LLM imports.
_ALWAYS = {"transformers", "datasets", "onnx", "pandas", "sentencepiece", "accelerate", "cuda", "evaluate"}
_BINDINGS = "tensorrt_llm.bindings"


class _Anything(type):
    """The class of classes that have every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (_Value,), {})
        setattr(cls, name, made)
        return made


class _Value(metaclass=_Anything):
    """What a stand-in's classes are derived from."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return _Value()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Value()

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class KVCacheType(enum.Enum):
    """tensorrt_llm.bindings.KVCacheType."""

    CONTINUOUS = "continuous"
    PAGED = "paged"
    DISABLED = "disabled"

    @classmethod
    def _missing_(cls, value: object) -> KVCacheType | None:
        return next((each for each in cls if isinstance(value, str) and each.name == value.upper()), None)

    @classmethod
    def from_string(cls, value: str) -> KVCacheType:
        return cls(value)


class StrEnum(str, enum.Enum):
    """strenum.StrEnum: auto() gives a member its name."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[Any]) -> str:
        return name

    def __str__(self) -> str:
        return str(self.value)


class LowercaseStrEnum(StrEnum):
    """strenum.LowercaseStrEnum: auto() gives a member its name in lower case."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[Any]) -> str:
        return name.lower()


_WRITTEN_OUT: dict[str, dict[str, Any]] = {
    _BINDINGS: {"KVCacheType": KVCacheType},
    f"{_BINDINGS}.BuildInfo": {"ENABLE_MULTI_DEVICE": False},
    "pynvml": {"__version__": "12.0.0", "nvmlSystemGetDriverVersion": lambda: "999", "NVMLError": OSError},
    "strenum": {"StrEnum": StrEnum, "LowercaseStrEnum": LowercaseStrEnum},
}


class _Metadata(importlib.metadata.Distribution):
    """The metadata of a package that is not installed: a name and a version."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: 99.0\n" if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return path


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for every module that is not here, and for those of _ALWAYS."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.partition(".")[0]
        if fullname.startswith(_BINDINGS) or top in _ALWAYS or (top in self._missing and top != "tensorrt_llm"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def __init__(self, missing: set[str]) -> None:
        self._missing = missing

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is not None and context.name in self._missing:
            yield _Metadata(context.name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        module.__version__ = "4.45.1"
        for name, value in _WRITTEN_OUT.get(module.__name__, {}).items():
            setattr(module, name, value)
        module.__getattr__ = lambda name: _named(module, name)  # type: ignore[method-assign]


def _named(module: types.ModuleType, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _Anything(name, (_Value,), {})
    setattr(module, name, made)
    return made


def install(imported: set[str]) -> None:
    """Put stand-ins where the packages `imported` are not installed."""
    missing = {name for name in imported if name not in sys.builtin_module_names and not _exists(name)}
    sys.meta_path.insert(0, StandIns(missing))


def _exists(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
