"""A network that records what TensorRT-LLM adds to it, over NVIDIA's own enums, fields and dimensions.

Shapes are followed as far as TensorRT-LLM's Python asks for them: -1 stands for a size that is known at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tensorrt_llm_source import shapes


class RecordedTensor:
    """A tensor of the network."""

    def __init__(self, name: str, dtype: Any, shape: Sequence[int], producer: RecordedLayer | None = None) -> None:
        self.name, self.dtype, self.producer = name, dtype, producer
        self.shape = shape
        self.is_network_input, self.is_network_output, self.is_shape_tensor = producer is None, False, False
        self.location: Any = None
        self.dimension_names: dict[int, str] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, tuple(map(int, value)) if name == "shape" else value)

    def set_dimension_name(self, place: int, name: str) -> None:
        self.dimension_names[place] = name


class RecordedLayer:
    """A layer with its inputs and outputs; every other attribute is whatever was set."""

    def __init__(self, kind: str, layer_type: Any, inputs: Sequence[RecordedTensor], **attributes: Any) -> None:
        self.kind, self.type, self.inputs = kind, layer_type, list(inputs)
        self.name, self.metadata, self.outputs = "", "", []
        self.precision_is_set = False
        vars(self).update(attributes)

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, place: int) -> RecordedTensor | None:
        return self.inputs[place] if place < len(self.inputs) else None

    def set_input(self, place: int, tensor: RecordedTensor) -> None:
        while place >= len(self.inputs):
            self.inputs.append(tensor)
        self.inputs[place] = tensor
        if self.kind == "slice" and place == 2:
            self.outputs[0].shape = (-1,) * len(self.outputs[0].shape)
        if self.kind == "shuffle" and place == 1:
            self.outputs[0].shape = (-1,) * max(tensor.shape[0], 1)

    def get_output(self, place: int) -> RecordedTensor:
        return self.outputs[place]

    def set_output_type(self, place: int, dtype: Any) -> None:
        self.outputs[place].dtype = dtype

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "reshape_dims":
            own = self.inputs[0].shape
            self.outputs[0].shape = tuple(
                own[i] if int(n) == 0 and i < len(own) else int(n) for i, n in enumerate(value)
            )
        if name == "axis" and self.kind == "concatenation" and self.outputs:
            self.outputs[0].shape = shapes.joined([tensor.shape for tensor in self.inputs], value)
        if name in ("first_transpose", "second_transpose"):
            shape = self.outputs[0].shape
            self.outputs[0].shape = tuple(shape[place] for place in list(value)[: len(shape)])


class RecordedPlugin:
    """A plugin with the fields it was made of."""

    def __init__(self, creator: RecordedCreator, collection: Any) -> None:
        self.plugin_type, self.plugin_namespace, self.plugin_version = creator.name, creator.namespace, creator.version
        self.fields = {field.name: _content(field) for field in collection}

    @property
    def plain_fields(self) -> dict[str, Any]:
        """Return the fields with a number in place of a list of one."""
        items = self.fields.items()
        return {name: each[0] if isinstance(each, list) and len(each) == 1 else each for name, each in items}

    @property
    def num_outputs(self) -> int:
        if self.plugin_type == "GPTAttention":
            return 1 if int(self.fields["paged_kv_cache"][0]) else 2
        if self.plugin_type == "AllReduce":
            return 2 if self.fields["fusion_op"][0] else 1
        if self.plugin_type in ("QuantizePerToken", "RmsnormQuantization", "LayernormQuantization"):
            return 2
        return 1


def recorded_fields(bindings: Any) -> tuple[type, type]:
    """Return classes for PluginField and PluginFieldCollection that also keep what they were given.

    NVIDIA's getter of a field repeats its first element; C++ gets the address of what was given.
    """

    class Field(bindings.PluginField):
        def __init__(self, name: str = "", data: Any = b"", kind: Any = bindings.PluginFieldType.UNKNOWN) -> None:
            super().__init__(name, data, kind)
            self.given = data

    class Collection(list):
        def __init__(self, fields: Sequence[Any] = ()) -> None:
            super().__init__(fields)
            self.real = bindings.PluginFieldCollection(list(fields))
            assert [field.name for field in self.real] == [field.name for field in fields]

    return Field, Collection


def _content(field: Any) -> Any:
    """Return what C++ reads of a field: the text of CHAR, else the numbers."""
    if field.type.name == "CHAR":
        text = field.given if isinstance(field.given, bytes) else np.asarray(field.given).view(np.uint8).tobytes()
        return text.rstrip(b"\0").decode()
    return np.array(field.given).reshape(-1).tolist()


class RecordedCreator:
    """Creates every plugin that it is asked for."""

    def __init__(self, name: str, version: str, namespace: str) -> None:
        self.name, self.version, self.namespace = name, version, namespace
        self.plugin_namespace, self.plugin_version = namespace, version

    def create_plugin(self, name: str, collection: Any, phase: Any = None) -> RecordedPlugin:
        return RecordedPlugin(self, collection)


class RecordedRegistry:
    """Has the plugins of TensorRT-LLM and those of ChunkKV."""

    plugin_creator_list: tuple[Any, ...] = ()
    error_recorder = None

    def get_plugin_creator(self, name: str, version: str, namespace: str = "") -> RecordedCreator:
        return RecordedCreator(name, version, namespace)

    get_creator = get_plugin_creator

    def load_library(self, path: str) -> Any:
        return object()


class RecordedNetwork:
    """Stands for INetworkDefinition: keeps layers in the order in which they were added."""

    def __init__(self, trt: Any, builder: Any, flags: int) -> None:
        self._trt, self.builder, self._flags, self.name = trt, builder, flags, "network"
        self.inputs: list[RecordedTensor] = []
        self.outputs: list[RecordedTensor] = []
        self.layers: list[RecordedLayer] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def get_input(self, place: int) -> RecordedTensor:
        return self.inputs[place]

    def get_output(self, place: int) -> RecordedTensor:
        return self.outputs[place]

    def get_layer(self, place: int) -> RecordedLayer:
        return self.layers[place]

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> RecordedTensor:
        self.inputs.append(RecordedTensor(name, dtype, shape))
        return self.inputs[-1]

    def mark_output(self, tensor: RecordedTensor) -> None:
        tensor.is_network_output = True
        self.outputs.append(tensor)

    def unmark_output(self, tensor: RecordedTensor) -> None:
        self.outputs.remove(tensor)

    def set_weights_name(self, weights: Any, name: str) -> bool:
        return True

    def mark_weights_refittable(self, name: str) -> bool:
        return True

    def plugins(self, name: str) -> list[RecordedLayer]:
        """Return the plugin layers of a name, in order."""
        return [layer for layer in self.layers if layer.kind == "plugin" and layer.plugin.plugin_type == name]

    def add_plugin_v2(self, inputs: Sequence[RecordedTensor], plugin: RecordedPlugin) -> RecordedLayer:
        return self._plugin("PLUGIN_V2", inputs, plugin)

    def add_plugin_v3(
        self, inputs: Sequence[RecordedTensor], shape_inputs: Sequence[RecordedTensor], plugin: RecordedPlugin
    ) -> RecordedLayer:
        assert not shape_inputs
        return self._plugin("PLUGIN_V3", inputs, plugin)

    def _plugin(self, kind: str, inputs: Sequence[RecordedTensor], plugin: RecordedPlugin) -> RecordedLayer:
        assert all(isinstance(tensor, RecordedTensor) for tensor in inputs)
        outputs = shapes.plugin_outputs(self._trt, plugin, inputs)
        return self._layer("plugin", getattr(self._trt.LayerType, kind), inputs, outputs, plugin=plugin)

    def _layer(
        self, kind: str, layer_type: Any, inputs: Sequence[Any], outputs: Sequence[tuple[Any, Any]], **more: Any
    ) -> RecordedLayer:
        tensors = [tensor for tensor in inputs if isinstance(tensor, RecordedTensor)]
        layer = RecordedLayer(kind, layer_type, tensors, **more)
        layer.name = f"(unnamed {kind} {len(self.layers)})"
        for place, (dtype, shape) in enumerate(outputs):
            layer.outputs.append(RecordedTensor(f"{layer.name} output {place}", dtype, shape, layer))
        self.layers.append(layer)
        return layer

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("add_"):
            raise AttributeError(name)
        kind = name.removeprefix("add_")

        def add(*args: Any, **keywords: Any) -> RecordedLayer:
            return self._add(kind, [*args, *keywords.values()], keywords)

        return add

    def _add(self, kind: str, values: list[Any], keywords: dict[str, Any]) -> RecordedLayer:
        trt = self._trt
        inputs = [value for value in values if isinstance(value, RecordedTensor)]
        for value in values:
            if isinstance(value, (list, tuple)) and value and all(isinstance(v, RecordedTensor) for v in value):
                inputs += value
        base = {"gather_v2": "gather", "normalization": "normalization", "pooling_nd": "pooling"}.get(kind, kind)
        layer_type = getattr(trt.LayerType, base.upper(), trt.LayerType.IDENTITY)
        shape, dtype = shapes.layer_output(trt, base, inputs, values, keywords)
        more = {"op": next((value for value in values if hasattr(value, "name") and hasattr(value, "value")), None)}
        if base == "constant":
            more |= {"weights": values[1], "shape": tuple(values[0])}
        if base == "concatenation":
            more["axis"] = 0
        if base == "gather":
            more |= {"axis": values[2] if isinstance(values[2], int) else 0, "mode": values[2]}
        count = 2 if base == "topk" else 1
        return self._layer(base, layer_type, inputs, [(dtype, shape)] * count, **more)


class _Settable:
    """An object of TensorRT that a build only writes to."""

    num_optimization_profiles = 0

    def __init__(self) -> None:
        self.flags: set[Any] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **keywords: True


class RecordedConfig(_Settable):
    """IBuilderConfig: keeps the profiles."""

    def __init__(self) -> None:
        super().__init__()
        self.profiles: list[RecordedProfile] = []

    @property
    def num_optimization_profiles(self) -> int:  # type: ignore[override]
        return len(self.profiles)

    def add_optimization_profile(self, profile: RecordedProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache()

    def get_timing_cache(self) -> TimingCache:
        return TimingCache()


class TimingCache:
    """ITimingCache: empty."""

    def serialize(self) -> memoryview:
        return memoryview(b"timing cache")


class RecordedProfile:
    """IOptimizationProfile: minimum, optimum and maximum by input."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self.shapes[name] = (tuple(low), tuple(opt), tuple(high))


class RecordedBuilder(_Settable):
    """Builder: an engine is the number of its network in `networks`."""

    networks: ClassVar[list[tuple[RecordedNetwork, RecordedConfig]]] = []
    trt: Any = None

    def __init__(self, logger: Any = None) -> None:
        super().__init__()

    def create_network(self, flags: int = 0) -> RecordedNetwork:
        network = RecordedNetwork(self.trt, self, flags)
        self.networks.append((network, RecordedConfig()))
        return network

    def create_builder_config(self) -> RecordedConfig:
        return RecordedConfig()

    def create_optimization_profile(self) -> RecordedProfile:
        return RecordedProfile()

    def build_serialized_network(self, network: RecordedNetwork, config: RecordedConfig) -> memoryview:
        place = [each for each, _ in self.networks].index(network)
        self.networks[place] = (network, config)
        return memoryview(f"recorded network {place}".encode())
