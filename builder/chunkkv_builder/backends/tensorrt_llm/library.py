"""TensorRT-LLM and the ChunkKV plugins as this machine has them: found, loaded, and added to a network as nodes."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np

from chunkkv.engine.backends import TENSORRT_LLM
from chunkkv.engine.directory import hash_file
from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_errors import ErrorLog
from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv.gpu.tensorrt_plugins import (
    PLUGIN_VERSION,
    TENSORRT_LLM_PLUGINS,
    find_plugin_library,
    load_plugins,
)

VERSIONS = "0.16 to 1.2.1"
WORD_BITS = 32
FieldValues = dict[str, Any]  # of a plugin: a number, a text or an array of int32 by the field's name


class BuildCommand(Protocol):
    """The module behind trtllm-build, as far as this backend uses it."""

    parse_arguments: Callable[[], argparse.ArgumentParser]
    main: Callable[[], None]
    build: Callable[[Any, Any], Any]


def installed() -> bool:
    """Whether the package tensorrt_llm is there, without importing it."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def import_build_command() -> BuildCommand:
    """Return the module behind trtllm-build; raises BackendUnavailableError where it is not one we know."""
    try:
        from tensorrt_llm.commands import build
    except ImportError as error:
        raise BackendUnavailableError(
            f"--backend {TENSORRT_LLM} needs the Python package 'tensorrt_llm' with trtllm-build ({VERSIONS}), which "
            f"cannot be loaded ({error})"
        ) from None
    for name in ("parse_arguments", "main", "build"):
        if not callable(getattr(build, name, None)):
            raise BackendUnavailableError(
                f"tensorrt_llm.commands.build has no {name}: this TensorRT-LLM is none of {VERSIONS}"
            )
    return cast(BuildCommand, build)


@contextmanager
def before_compiling(check: Callable[[], object]) -> Iterator[None]:
    """Call `check` in the block after a network was made and before TensorRT compiles it, which takes minutes."""
    from tensorrt_llm.builder import Builder

    original = Builder.build_engine

    def checked(*args: Any, **keywords: Any) -> Any:
        check()
        return original(*args, **keywords)

    Builder.build_engine = checked
    try:
        yield
    finally:
        Builder.build_engine = original


class Plugins:
    """The ChunkKV plugins in TensorRT's registry.

    `library` has the `name` and the `sha256` of the file they come from, `versions` those of the packages.
    """

    def __init__(self) -> None:
        import tensorrt as trt
        import tensorrt_llm

        self._trt = trt
        library = TensorRT.of(trt)
        path = find_plugin_library(library.flavour, library.version)
        self.library = {"name": path.name, "sha256": hash_file(path).sha256}
        self._creators = load_plugins(library, trt.get_plugin_registry(), ErrorLog(), TENSORRT_LLM_PLUGINS)
        self.versions = {"tensorrt": str(trt.__version__), "tensorrt_llm": str(tensorrt_llm.__version__)}

    def add_node(self, name: str, fields: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
        """Add plugin `name` to the network that is being built and return its outputs, tensors of tensorrt_llm.

        Raises BackendUnavailableError where the library does not take the fields.
        """
        from tensorrt_llm._common import default_trtnet
        from tensorrt_llm.functional import _add_plugin_info, _create_tensor

        trt, creator = self._trt, self._creators[name]
        # TensorRT keeps addresses only: `data` must live until the plugin is made.
        data = {field: _field_data(value) for field, value in fields.items()}
        types = {bytes: trt.PluginFieldType.CHAR, np.ndarray: trt.PluginFieldType.INT32}
        collection = trt.PluginFieldCollection(
            [trt.PluginField(field, value, types[type(value)]) for field, value in data.items()]
        )
        plugin = creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
        if plugin is None:
            raise BackendUnavailableError(
                f"the plugin {name} of {self.library['name']} does not take {dict(fields)}: library and builder are of "
                f"different versions (plugin version {PLUGIN_VERSION}): build the plugins again"
            )
        layer = default_trtnet().add_plugin_v3([tensor.trt_tensor for tensor in inputs], [], plugin)
        _add_plugin_info(layer, creator, name, collection)
        return [_create_tensor(layer.get_output(place), layer) for place in range(layer.num_outputs)]


def delimiter_words(table: np.ndarray) -> np.ndarray:
    """Return a bool table [vocab_size] as the plugins take it: int32 words, token t in bit t % 32 of word t // 32."""
    bits = np.packbits(np.asarray(table, dtype=bool), bitorder="little")
    return np.frombuffer(bits.tobytes().ljust(-(-len(table) // WORD_BITS) * 4, b"\0"), "<i4").copy()


def _field_data(value: Any) -> bytes | np.ndarray:
    if isinstance(value, str):
        return value.encode()
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.atleast_1d(value), dtype=np.int32)
