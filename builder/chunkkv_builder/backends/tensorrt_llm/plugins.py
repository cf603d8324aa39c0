"""Adds the ChunkKV plugins to a TensorRT-LLM network: their fields, and their inputs in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_library import PLUGIN_VERSION
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt_llm.library import Plugins

_SETTINGS = ("window", "sinks", "chunk_size", "boundaries", "pooling", "score", "keep_per_10k", "budget_tokens")
WORD_BITS = 32
Fields = dict[str, Any]  # a field's value is a number, a text or an array of int32


def settings_fields(settings: ChunkKVSettings) -> Fields:
    """Return the fields that say how tokens are chosen; all plugins that choose or count have them."""
    return {name: getattr(settings, name) for name in (*_SETTINGS, "min_tokens")}


def delimiter_words(table: np.ndarray) -> np.ndarray:
    """Return a bool table [vocab] as int32 words, token t in bit t % 32 of word t // 32."""
    bits = np.packbits(np.asarray(table, dtype=bool), bitorder="little")
    return np.frombuffer(bits.tobytes().ljust(-(-len(table) // WORD_BITS) * 4, b"\0"), "<i4").copy()


def add(plugins: Plugins, name: str, fields: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    """Add plugin `name` to the network being built and return its outputs, tensors of tensorrt_llm.

    Raises BackendUnavailableError where the library does not take the fields.
    """
    from tensorrt_llm._common import default_trtnet
    from tensorrt_llm.functional import _add_plugin_info, _create_tensor

    trt, creator = plugins.trt, plugins.creators[name]
    data = {field: _field_data(value) for field, value in fields.items()}  # TensorRT keeps addresses only
    kinds = {bytes: trt.PluginFieldType.CHAR, np.ndarray: trt.PluginFieldType.INT32}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(field, value, kinds[type(value)]) for field, value in data.items()]
    )
    plugin = creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise BackendUnavailableError(
            f"the plugin {name} of {plugins.library['name']} does not take {dict(fields)}: library and builder are of "
            f"different versions (plugin version {PLUGIN_VERSION}): build the plugins again"
        )
    layer = default_trtnet().add_plugin_v3([tensor.trt_tensor for tensor in inputs], [], plugin)
    _add_plugin_info(layer, creator, name, collection)
    return [_create_tensor(layer.get_output(place), layer) for place in range(layer.num_outputs)]


def _field_data(value: Any) -> bytes | np.ndarray:
    if isinstance(value, str):
        return value.encode()
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else np.atleast_1d(value), dtype=np.int32)
