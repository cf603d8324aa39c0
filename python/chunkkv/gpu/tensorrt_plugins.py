"""Finds the ChunkKV plugins for a TensorRT and registers them, or says what is missing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chunkkv.engine.tensorrt_build import RTX, STANDARD
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.gpu.tensorrt_errors import ErrorLog
from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv.limits import KERNEL_HEAD_SIZES, KERNEL_MAX_GROUP
from chunkkv.native_files import HOW_TO_GET, LIBRARY_FOLDERS

PLUGIN_NAMESPACE, PLUGIN_VERSION = "chunkkv", "1"
PLUGINS = ("ChunkKVSelect", "ChunkKVCompact")
TENSORRT_LLM_PLUGINS = ("ChunkKVPrepare", "ChunkKVRope", "ChunkKVScore", "ChunkKVCompress")
_LIBRARIES = {STANDARD: "libchunkkv_tensorrt.so", RTX: "libchunkkv_tensorrt_rtx.so"}
PLUGIN_FOLDERS = LIBRARY_FOLDERS
# TensorRT for RTX: what its parser opens to find the plugin registry, and the library that is meant.
_REGISTRY_ALIAS, _REGISTRY_LIBRARY, _REGISTRY_SYMBOL = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1", "getPluginRegistry"
_ALIAS_FOLDER = "rtx"  # of its own, so that nobody's search path meets the alias
_ALIAS_ADVICE = "build the plugins again, or give --chunkkv_ops functions"


def library_name(flavour: str, version: str) -> str:
    """Return the file name of the plugins for a TensorRT: its flavour and the major version of its interface."""
    return f"{_LIBRARIES[flavour]}.{version.split('.', maxsplit=1)[0]}"


def find_plugin_library(flavour: str, version: str) -> Path:
    """Return the plugin library for a TensorRT of `flavour` and `version`.

    Raises BackendUnavailableError where there is none.
    """
    name = library_name(flavour, version)
    for folder in _places():
        if (folder / name).is_file():
            return folder / name
    raise BackendUnavailableError(
        f"the ChunkKV plugins {name}, which are in none of {', '.join(map(str, _places()))}: {HOW_TO_GET} (where they "
        "lie elsewhere, CHUNKKV_LIB names the libchunkkv.so beside them)"
    )


def plugin_libraries() -> list[Path]:
    """Return every plugin library that there is, for whichever TensorRT, in the order in which they are looked for."""
    names = [f"{name}.[0-9]*" for name in _LIBRARIES.values()]
    return [path for folder in _places() for name in names for path in sorted(folder.glob(name))]


def load_plugins(trt: TensorRT, registry: Any, errors: ErrorLog, names: Sequence[str] = PLUGINS) -> dict[str, Any]:
    """Register the ChunkKV plugins in `registry` unless they are, and return the creators of `names` by name.

    Call start() before, with the logger of `errors`: TensorRT logs there why a library does not load. Raises
    BackendUnavailableError where the plugin library is missing, does not load or lacks a plugin.
    """
    creators = _creators(registry, names)
    if None in creators.values():
        path = find_plugin_library(trt.flavour, trt.version)
        # The handle says nothing: TensorRT for RTX returns one that holds no address. The creators tell.
        registry.load_library(str(path))
        creators = _creators(registry, names)
        if all(creator is None for creator in creators.values()):
            raise BackendUnavailableError(f"{trt.title} does not load {path}{errors.explanation()}")
        if absent := [name for name, creator in creators.items() if creator is None]:
            raise BackendUnavailableError(f"{path} has no plugin {absent[0]} version {PLUGIN_VERSION}; build it again")
    return creators


def prepare_parser(trt: TensorRT) -> None:
    """Make sure that the ONNX parser of `trt` can import plugins; must be called before a graph with plugins is parsed.

    The parser of TensorRT for RTX looks for the plugin registry by opening the bare name libtensorrt_rtx.so, which its
    wheels do not contain, and ends the whole process where that fails. A library of that name which only refers to
    libtensorrt_rtx.so.1 lies in rtx/ beside our plugins and is loaded here; it stays loaded, as all that CDLL loads.

    Raises BackendUnavailableError where the parser would not find the registry.
    """
    if trt.flavour != RTX:
        return
    alias = find_registry_alias()
    try:
        ctypes.CDLL(str(alias))
    except OSError as error:
        raise BackendUnavailableError(f"{alias}, which cannot be loaded ({error}); {_ALIAS_ADVICE}") from None
    if not _parser_finds_registry():
        raise BackendUnavailableError(
            f"{alias} in place of another {_REGISTRY_ALIAS}, which does not lead to the {_REGISTRY_LIBRARY} of "
            f"{trt.title}; {_ALIAS_ADVICE}"
        )


def find_registry_alias() -> Path:
    """Return the library that prepare_parser loads; raises BackendUnavailableError where it is missing."""
    for folder in _places():
        if (alias := folder / _ALIAS_FOLDER / _REGISTRY_ALIAS).is_file():
            return alias
    raise BackendUnavailableError(
        f"{_ALIAS_FOLDER}/{_REGISTRY_ALIAS} beside the ChunkKV plugins, which is in none of "
        f"{', '.join(map(str, _places()))}: {_ALIAS_ADVICE}"
    )


def _parser_finds_registry() -> bool:
    """Do what the parser does: open the bare name. It must lead to the registry of the library that is in use."""
    try:
        opened = getattr(ctypes.CDLL(_REGISTRY_ALIAS), _REGISTRY_SYMBOL)
        in_use = getattr(ctypes.CDLL(_REGISTRY_LIBRARY), _REGISTRY_SYMBOL)
    except (OSError, AttributeError):
        return False
    return ctypes.cast(opened, ctypes.c_void_p).value == ctypes.cast(in_use, ctypes.c_void_p).value


def check_head_sizes(head_dim: int, num_heads: int, num_kv_heads: int, advice: str) -> None:
    """Raise ConfigError for a model that the plugins have no kernel for; `advice` says what to do then."""
    if head_dim not in KERNEL_HEAD_SIZES:
        sizes = ", ".join(map(str, KERNEL_HEAD_SIZES))
        raise ConfigError(f"head_dim is {head_dim}; the ChunkKV plugins have kernels for {sizes}: {advice}")
    if num_heads // num_kv_heads > KERNEL_MAX_GROUP:
        raise ConfigError(
            f"{num_heads} query heads share {num_kv_heads} KV heads; the ChunkKV plugins take at most "
            f"{KERNEL_MAX_GROUP} query heads for one: {advice}"
        )


def _places() -> tuple[Path, ...]:
    """Return the folders that may hold the plugins, the most specific first."""
    library = os.environ.get("CHUNKKV_LIB")
    return ((Path(library).parent,) if library else ()) + PLUGIN_FOLDERS


def _creators(registry: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) for name in names}
