"""A step graph whose layers fill different numbers of slots: for policies that give each layer its own budget.

The engines themselves keep the same number of tokens in every layer; this graph is derived from theirs in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from chunkkv.errors import EngineError
from chunkkv.executors.file_pages import file_pages
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.executors.onnxruntime.graphs import CPU, OnnxRuntimeStep, bind_arrays, session_options
from chunkkv.executors.onnxruntime.plain_attention import with_plain_attention
from chunkkv.executors.step_arrays import check_slots

LENGTHS_INPUT = "layer_lengths"
# Inputs of com.microsoft.GroupQueryAttention: at this place the last filled slot of each row (seqlens_k), then the
# largest length of all rows (total_sequence_length).
_SEQLENS_INPUT = 5
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


def load_layer_lengths_graph(path: Path, threads: int) -> ort.InferenceSession:
    """Return the step graph of `path` with one more input, layer_lengths [layers,B] int32.

    It takes the place of cache_lengths, which stays an input without effect. Raises EngineError for a graph without
    GroupQueryAttention.
    """
    options = session_options(threads)
    options.add_session_config_entry(_FOLDER_OPTION, str(path.parent))
    model = with_plain_attention(onnx.load(str(path), load_external_data=False))
    model = _with_layer_lengths(model, path)
    with file_pages(path.parent):
        return ort.InferenceSession(model.SerializeToString(), options, providers=CPU)


class LayerLengthsDecoder(OnnxRuntimeDecoder):
    """Appends tokens to a cache whose layers are filled to different lengths: steps take slots [layers,rows].

    Parameters
    ----------
    step : OnnxRuntimeStep
        The engine's own step graph, for its shapes.
    cache : HostKVCache
        The cache to append to.
    session : onnxruntime.InferenceSession
        The graph of load_layer_lengths_graph.
    """

    def __init__(self, step: OnnxRuntimeStep, cache: HostKVCache, session: ort.InferenceSession) -> None:
        super().__init__(step, cache, session)
        self._layer_lengths = np.zeros((len(step.layout.parts), cache.row_count), np.int32)
        bind_arrays(self._binding, {LENGTHS_INPUT: self._layer_lengths}, {})

    def step(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Append one token to each row in `rows`; layer l of rows[i] writes slot slots[l,i]. See Decoder.step."""
        layer_slots = np.asarray(slots, np.int32)
        check_slots(rows, layer_slots, self._cache.capacity * len(layer_slots))
        self._arrays.fill(rows, tokens, positions, layer_slots[0])
        self._layer_lengths[:] = 0
        self._layer_lengths[:, list(rows)] = layer_slots
        return self._run(rows)


def _with_layer_lengths(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    graph = model.graph
    attention = _attention_of_one_token(graph)
    if not attention:
        raise EngineError(f"{path} has no GroupQueryAttention; layers of different lengths cannot run on it")
    lengths = helper.make_tensor_value_info(LENGTHS_INPUT, onnx.TensorProto.INT32, [len(attention), "batch"])
    graph.input.append(lengths)
    number_one = helper.make_tensor("one", onnx.TensorProto.INT32, [], [1])
    axis = helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [1])
    new_nodes = [
        helper.make_node("Constant", [], ["layer_lengths.one"], value=number_one),
        helper.make_node("Constant", [], ["layer_lengths.axis"], value=axis),
        helper.make_node("Shape", ["input_ids"], ["layer_lengths.block64"], start=1, end=2),
        helper.make_node("Squeeze", ["layer_lengths.block64"], ["layer_lengths.block_"]),
        helper.make_node("Cast", ["layer_lengths.block_"], ["layer_lengths.block"], to=onnx.TensorProto.INT32),
        helper.make_node("Sub", ["layer_lengths.block", "layer_lengths.one"], ["layer_lengths.before_last"]),
        helper.make_node("Add", [LENGTHS_INPUT, "layer_lengths.before_last"], ["layer_lengths.last"]),
        helper.make_node("ReduceMax", [LENGTHS_INPUT, "layer_lengths.axis"], ["layer_lengths.longest"], keepdims=0),
        helper.make_node("Add", ["layer_lengths.longest", "layer_lengths.block"], ["layer_lengths.total"]),
    ]
    for layer, node in enumerate(attention):
        index = helper.make_tensor("index", onnx.TensorProto.INT64, [], [layer])
        new_nodes.append(helper.make_node("Constant", [], [f"layer_lengths.{layer}"], value=index))
        for place, source in ((_SEQLENS_INPUT, "last"), (_SEQLENS_INPUT + 1, "total")):
            name = f"layer_lengths.{source}.{layer}"
            new_nodes.append(
                helper.make_node("Gather", [f"layer_lengths.{source}", f"layer_lengths.{layer}"], [name], axis=0)
            )
            node.input[place] = name
    nodes = [*new_nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _attention_of_one_token(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the attention of each layer; over a cache of 8 bits it is in the branch for rows of one new token."""
    found = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            found.append(node)
        for attribute in node.attribute:
            if attribute.name == "then_branch":
                found += _attention_of_one_token(attribute.g)
    return found
