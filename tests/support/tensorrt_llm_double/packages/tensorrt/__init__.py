"""The names of the module tensorrt that TensorRT-LLM networks and ChunkKV use, recording what is added."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.tensorrt_llm_double import TENSORRT_VERSION
from support.tensorrt_llm_double.graph import Graph, Node, Value, field_value
from support.tensorrt_llm_double.plugins import FIELDS, plugin_outputs

__version__ = TENSORRT_VERSION


class DataType(enum.Enum):
    FLOAT, HALF, BF16 = "float32", "float16", "bfloat16"
    INT32, INT64, INT8, FP8 = "int32", "int64", "int8", "float8_e4m3fn"


float32, fp8, int32, int64 = DataType.FLOAT, DataType.FP8, DataType.INT32, DataType.INT64
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")


class PluginFieldType(enum.IntEnum):
    FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64, FP8 = range(12)


class ILogger:
    Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    def log(self, severity: Any, msg: str) -> None: ...


class PluginField:
    """A field keeps an address, not the memory there: an array must outlive create_plugin."""

    def __init__(self, name: str, data: Any, type: PluginFieldType = PluginFieldType.UNKNOWN) -> None:
        self.name, self.type = name, PluginFieldType(type)
        view = memoryview(data)
        assert view.contiguous, f"{name}: the memory is not contiguous"
        self.size = view.nbytes // view.itemsize
        width = {PluginFieldType.INT32: 4, PluginFieldType.CHAR: 1}[self.type]
        assert view.itemsize == width, f"{name}: {view.itemsize} bytes an element for {self.type.name}"
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


class PluginCreator:
    def __init__(self, name: str) -> None:
        self.name, self.field_names = name, [SimpleNamespace(name=field) for field in FIELDS[name]]

    def create_plugin(self, name: str, field_collection: PluginFieldCollection, phase: TensorRTPhase) -> Any:
        """Return an IPluginV3 that knows its fields."""
        assert isinstance(field_collection, PluginFieldCollection) and isinstance(phase, TensorRTPhase)
        entries = [field.entry() for field in field_collection]
        names = [entry[0] for entry in entries]
        assert len(set(names)) == len(names), f"{self.name}: a field was given twice"
        assert set(names) <= set(FIELDS[self.name]), f"{self.name} has no field {set(names) - set(FIELDS[self.name])}"
        return SimpleNamespace(plugin_name=self.name, entries=entries)


class PluginRegistry:
    """A "library" is any file; loading it registers every ChunkKV plugin."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], PluginCreator] = {}

    def load_library(self, plugin_path: str) -> object | None:
        if self._creators or not Path(plugin_path).is_file():
            return None
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

    name = property(lambda self: self.value.name)
    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: DataType(self.value.dtype))


class ILayer:
    def __init__(self, node: Node, outputs: list[ITensor]) -> None:
        self.node, self._outputs = node, outputs

    num_outputs = property(lambda self: len(self._outputs))

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class INetworkDefinition:
    """A network that records; `record` is how the double of tensorrt_llm adds everything that is no plugin."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.layers: list[ILayer] = []

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> ITensor:
        self.graph.inputs.append(name)
        return self._tensor(name, dtype.value, tuple(shape))

    def add_plugin_v3(self, inputs: Sequence[ITensor], shape_inputs: Sequence[ITensor], plugin: Any) -> ILayer:
        assert list(shape_inputs) == []
        fields = {name: field_value(*rest) for name, *rest in plugin.entries}
        outputs = plugin_outputs(plugin.plugin_name, fields, [tensor.value for tensor in inputs])
        return self.record("plugin_v3", inputs, outputs, {"plugin": plugin.plugin_name, "fields": plugin.entries})

    def record(
        self,
        op: str,
        inputs: Sequence[ITensor],
        outputs: Sequence[tuple[str, tuple[int, ...]]],
        attributes: dict[str, Any],
        name: str | None = None,
    ) -> ILayer:
        """Add a node; `name` makes its only output one of the network."""
        for tensor in inputs:
            assert isinstance(tensor, ITensor) and tensor.network is self, f"{op}: a tensor of another network"
        number = len(self.layers)
        names = [name] if name else [f"{op}_{number}_output_{place}" for place in range(len(outputs))]
        self.graph.outputs += [name] if name else []
        made = [self._tensor(each, dtype, tuple(shape)) for each, (dtype, shape) in zip(names, outputs, strict=True)]
        node = Node(f"{op.upper()}_{number}", op, [tensor.name for tensor in inputs], names, attributes)
        self.graph.nodes.append(node)
        self.layers.append(ILayer(node, made))
        return self.layers[-1]

    def add_array(self, array: Any) -> ITensor:
        name = f"constant_{len(self.graph.constants)}"
        self.graph.constants[name] = array
        return self._tensor(name, array.dtype.name, array.shape)

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> ITensor:
        assert name not in self.graph.values
        self.graph.values[name] = Value(name, dtype, shape)
        return ITensor(self, self.graph.values[name])


from support.tensorrt_llm_double.engine import Runtime  # noqa: E402

__all__ = ["Runtime"]
