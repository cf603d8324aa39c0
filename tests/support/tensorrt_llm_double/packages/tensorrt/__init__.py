"""The names of the module tensorrt that TensorRT-LLM networks and ChunkKV use, recording what is added."""

from __future__ import annotations

import enum
import types
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from support.tensorrt_llm_double import TENSORRT_VERSION, machine
from support.tensorrt_llm_double.graph import Graph, Node, Value, field_value
from support.tensorrt_llm_double.plugins import FIELDS, plugin_outputs

__version__ = TENSORRT_VERSION


class DataType(enum.Enum):
    FLOAT, HALF, BF16 = "float32", "float16", "bfloat16"
    INT32, INT64, INT8, UINT8, BOOL, FP8 = "int32", "int64", "int8", "uint8", "bool", "float8_e4m3fn"


float32, float16, bfloat16, fp8 = DataType.FLOAT, DataType.HALF, DataType.BF16, DataType.FP8
int32, int64, int8, uint8, bool = DataType.INT32, DataType.INT64, DataType.INT8, DataType.UINT8, DataType.BOOL

TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
LayerType = enum.Enum("LayerType", "PLUGIN_V2 PLUGIN_V3 OTHER")
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")


class PluginFieldType(enum.IntEnum):
    FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64, FP8 = range(12)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None: ...


class Logger(ILogger):
    def log(self, severity: Severity, msg: str) -> None:
        machine().log.append((severity, msg))


class PluginField:
    """A field keeps an address, not the memory there: an array must outlive create_plugin."""

    def __init__(self, name: str, data: Any, type: PluginFieldType = PluginFieldType.UNKNOWN) -> None:
        self.name, self.type = name, PluginFieldType(type)
        view = memoryview(data)
        assert view.contiguous, f"{name}: the memory is not contiguous"
        self.size = view.nbytes // view.itemsize
        width = {
            PluginFieldType.INT32: 4,
            PluginFieldType.FLOAT32: 4,
            PluginFieldType.CHAR: 1,
            PluginFieldType.INT64: 8,
        }
        assert view.itemsize == width[self.type], f"{name}: {view.itemsize} bytes an element for {self.type.name}"
        self._data = (lambda: data) if isinstance(data, bytes) else weakref.ref(data)

    def entry(self) -> list[Any]:
        """Return name, type, length and content; the memory must still be there."""
        data = self._data()
        assert data is not None, f"the array behind the field {self.name} is gone"
        return [self.name, int(self.type), self.size, memoryview(data).tobytes().hex()]


class PluginFieldCollection(list):
    def __init__(self, fields: Iterable[PluginField] = ()) -> None:
        super().__init__(fields)
        assert all(isinstance(field, PluginField) for field in self)


class Plugin:
    """An IPluginV3 that knows its fields."""

    def __init__(self, name: str, entries: list[list[Any]]) -> None:
        self.plugin_name, self.plugin_version, self.plugin_namespace = name, "1", "chunkkv"
        self.entries = entries


class PluginCreator:
    def __init__(self, name: str) -> None:
        self.name, self.plugin_version, self.plugin_namespace = name, "1", "chunkkv"
        self.field_names = [types.SimpleNamespace(name=field) for field in FIELDS[name]]

    def create_plugin(self, name: str, field_collection: PluginFieldCollection, phase: TensorRTPhase) -> Plugin | None:
        assert isinstance(field_collection, PluginFieldCollection) and isinstance(phase, TensorRTPhase)
        entries = [field.entry() for field in field_collection]
        names = [entry[0] for entry in entries]
        assert len(set(names)) == len(names), f"{self.name}: a field was given twice"
        unknown = sorted(set(names) - set(FIELDS[self.name]))
        assert not unknown, f"{self.name} has no field {unknown}"
        return Plugin(self.name, entries)


class PluginRegistry:
    """A "library" is any file; loading it registers every ChunkKV plugin."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self._creators: dict[tuple[str, str, str], PluginCreator] = {}

    def load_library(self, plugin_path: str) -> object | None:
        if self._creators or not Path(plugin_path).is_file():
            return None
        self.loaded.append(plugin_path)
        self._creators = {(name, "1", "chunkkv"): PluginCreator(name) for name in FIELDS}
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> PluginCreator | None:
        return self._creators.get((type, version, plugin_namespace))


_REGISTRY = PluginRegistry()


def get_plugin_registry() -> PluginRegistry:
    return _REGISTRY


class ITensor:
    """A tensor of a network definition."""

    def __init__(self, network: INetworkDefinition, value: Value) -> None:
        self.network, self.value = network, value
        self.location = TensorLocation.DEVICE

    @property
    def name(self) -> str:
        return self.value.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> DataType:
        return DataType(self.value.dtype)


class ILayer:
    def __init__(self, network: INetworkDefinition, node: Node) -> None:
        self.network, self.node, self.metadata = network, node, ""
        self.type = {"plugin_v3": LayerType.PLUGIN_V3, "gpt_attention": LayerType.PLUGIN_V2}.get(
            node.op, LayerType.OTHER
        )

    @property
    def name(self) -> str:
        return self.node.name

    @name.setter
    def name(self, name: str) -> None:
        self.node.name = name

    @property
    def num_outputs(self) -> int:
        return len(self.node.outputs)

    def get_output(self, index: int) -> ITensor:
        return self.network.tensors[self.node.outputs[index]]


class INetworkDefinition:
    """A network that records; `record` is how the double of tensorrt_llm adds everything that is no plugin."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.tensors: dict[str, ITensor] = {}
        self.layers: list[ILayer] = []

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> ITensor:
        self.graph.inputs.append(name)
        return self._tensor(name, dtype.value, tuple(shape))

    def mark_output(self, tensor: ITensor) -> None:
        self.graph.outputs.append(tensor.name)

    def add_plugin_v3(self, inputs: Sequence[ITensor], shape_inputs: Sequence[ITensor], plugin: Plugin) -> ILayer:
        assert isinstance(plugin, Plugin) and list(shape_inputs) == []
        fields = {name: field_value(*rest) for name, *rest in plugin.entries}
        outputs = plugin_outputs(plugin.plugin_name, fields, [tensor.value for tensor in inputs])
        attributes = {"plugin": plugin.plugin_name, "version": "1", "namespace": "chunkkv", "fields": plugin.entries}
        return self.record("plugin_v3", inputs, outputs, attributes)

    def record(
        self, op: str, inputs: Sequence[ITensor], outputs: Sequence[tuple[str, tuple[int, ...]]], attributes: dict
    ) -> ILayer:
        for tensor in inputs:
            assert isinstance(tensor, ITensor) and tensor.network is self, f"{op}: a tensor of another network"
        number = len(self.layers)
        names = [f"{op}_{number}_output_{place}" for place in range(len(outputs))]
        for name, (dtype, shape) in zip(names, outputs, strict=True):
            self._tensor(name, dtype, tuple(shape))
        node = Node(f"{op.upper()}_{number}", op, [tensor.name for tensor in inputs], names, attributes)
        self.graph.nodes.append(node)
        self.layers.append(ILayer(self, node))
        return self.layers[-1]

    def add_array(self, array: Any) -> ITensor:
        name = f"constant_{len(self.graph.constants)}"
        self.graph.constants[name] = array
        return self._tensor(name, array.dtype.name, array.shape)

    def rename(self, tensor: ITensor, name: str, dtype: str) -> None:
        """Give an output its name and type."""
        old = tensor.value.name
        for node in self.graph.nodes:
            node.inputs = [name if entry == old else entry for entry in node.inputs]
            node.outputs = [name if entry == old else entry for entry in node.outputs]
        self.graph.values[name] = Value(name, dtype, tensor.shape)
        del self.graph.values[old], self.tensors[old]
        tensor.value = self.graph.values[name]
        self.tensors[name] = tensor

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> ITensor:
        assert name not in self.tensors
        self.graph.values[name] = Value(name, dtype, shape)
        self.tensors[name] = ITensor(self, self.graph.values[name])
        return self.tensors[name]


from support.tensorrt_llm_double.engine import Builder, ICudaEngine, IExecutionContext, Runtime  # noqa: E402

__all__ = ["Builder", "ICudaEngine", "IExecutionContext", "Runtime"]
