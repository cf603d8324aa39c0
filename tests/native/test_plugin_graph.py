"""The graph that TensorRT gets: every ChunkKV node in it gives the same in the plugin host as its ONNX function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt import graphs
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.plan import make_plan
from native.memory import Memory
from native.plugin_host import PluginHost, Range, node_fields, run_node
from native.plugin_op import COMPACT, SELECT, open_host, profile
from native.tensorrt_headers import own_headers

MODEL = Path(__file__).resolve().parents[2] / "examples" / "needle" / "model"  # its head size has kernels
LENGTHS, CAPACITY = (150, 20, 97), 64


CLASSES = {  # of 4 layers with 2 KV heads: 2 heads read
    "budget_split": "classes",
    "num_kv_heads": 2,
    "reading_heads": ((1,), (1,), (), ()),
    "reading_share_per_10k": 20_000,
    "local_share_per_10k": 6_667,
}


def run_graph(boundaries: str, folder: Path, **changes: Any) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Run the prefill graph in ONNX Runtime; return its ChunkKV nodes and every value that enters or leaves one."""
    checkpoint = HuggingFaceCheckpoint.open(MODEL)
    vocabulary = checkpoint.config.vocab_size
    groups = ((0, 1), (2, 3))
    sizes = {"window": 8, "chunk_size": 5, "sinks": 2, "min_tokens": 24, "keep_per_10k": 4_000}
    settings = ChunkKVSettings(**sizes, boundaries=boundaries, layer_groups=groups, **changes)
    flags = np.arange(vocabulary) % 7 == 0 if boundaries == "delimiter" else None
    build = BuildConfig(256, 512, 4, backend="tensorrt")
    sources = graphs.weight_sources(checkpoint, build.dtype)
    locations = write_weights(folder / "weights", sources)
    plan = make_plan(checkpoint.config, settings, flags)
    model = graphs.Graphs(checkpoint, plan, build, locations).prefill(sorting=True)
    nodes = [node for node in model.graph.node if node.domain == functions.DOMAIN]
    known = {value.name for value in model.graph.output}
    wanted = sorted({name for node in nodes for name in (*node.input, *node.output)})
    inputs = {value.name for value in model.graph.input}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known | inputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {source.name: source.load() for source in sources}
    rows = len(LENGTHS)
    feeds["input_ids"] = np.random.default_rng(3).integers(0, vocabulary, (rows, max(LENGTHS)))
    capacity = np.array([2 * CAPACITY, CAPACITY][-settings.length_classes :])  # reading heads need more
    feeds |= {"lengths": np.array(LENGTHS, np.int32), "capacity": capacity}
    feeds["window"] = np.array([8, 3, 5], np.int32)
    feeds |= {"keep_per_10k": np.full(rows, 4_000, np.int32), "budget_tokens": np.array([0, 0, 30], np.int32)}
    names = [value.name for value in session.get_outputs()]
    return nodes, {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_every_node_gives_in_the_plugin_host_what_its_function_gives(
    boundaries: str, tmp_path: Path, memory: Memory
) -> None:
    host = open_host(own_headers(11))  # one per process: a plugin library keeps its first logger
    nodes, values = run_graph(boundaries, tmp_path)
    assert [node.op_type for node in nodes].count(functions.SELECT) == 2 and len(nodes) == 2 + 8
    check_nodes(host, memory, nodes, values)
    assert np.array_equal(values["kept_lengths"], [[60, 20, 30]])


@pytest.mark.parametrize(
    ("choice", "selects"),
    [
        ({"local_policy": "recent", "heads": "each"}, 1),
        ({"local_policy": "recent"}, 1),
        ({"local_policy": "chunks"}, 3),
    ],
)
def test_every_node_of_a_class_gives_what_its_function_gives(
    choice: dict[str, str], selects: int, tmp_path: Path, memory: Memory
) -> None:
    """Two of eight heads read: one in each of two layers, which share one choice."""
    nodes, values = run_graph("fixed", tmp_path, **CLASSES, **choice)
    assert [functions.is_select(node.op_type) for node in nodes].count(True) == selects and len(nodes) == selects + 12
    assert functions.SELECT not in {node.op_type for node in nodes}
    check_nodes(open_host(own_headers(11)), memory, nodes, values)
    assert np.array_equal(values["kept_lengths"][:, [0, 2]], [[120, 48], [40, 24]])


def check_nodes(host: PluginHost, memory: Memory, nodes: list[onnx.NodeProto], values: dict[str, np.ndarray]) -> None:
    """Assert that each node gives in the plugin host the values that it gave as a function."""
    for node in nodes:
        given = [np.ascontiguousarray(values[name]) for name in node.input]
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        attributes = {name: text.decode() if isinstance(text, bytes) else text for name, text in attributes.items()}
        select = functions.is_select(node.op_type)
        key = SELECT if select else COMPACT
        fields = node_fields(attributes)
        ranges = profile(given) if select else [Range(v.dtype.name, v.shape, v.shape, v.shape) for v in given]
        built = host.build(key, fields, ranges)
        found = run_node(built, host.attach(key, built.fields), memory, given)
        expected = [values[name] for name in node.output]
        if select:
            width = expected[0].shape[-1]
            assert found[0].shape[-1] == max(LENGTHS) >= width and (found[0][..., width:] == -1).all()
            assert np.array_equal(found[0][..., :width], expected[0]) and np.array_equal(found[1], expected[1])
            np.testing.assert_allclose(found[2], expected[2], rtol=1e-4, atol=1e-8)
        else:
            assert found[0].tobytes() == expected[0].tobytes()
