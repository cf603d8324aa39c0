"""A step graph whose layers fill different numbers of slots: for policies that give each layer its own budget.

The engines themselves keep the same number of tokens in every layer; this graph is derived from theirs in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from chunkkv.errors import EngineError
from chunkkv.executors.onnxruntime.executor import Decoder, KVCache, bind_arrays

LENGTHS_INPUT = "layer_lengths"
_LENGTHS_AT = 5  # of GroupQueryAttention's inputs: the last filled slot of each row, then the largest length
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


class LayerLengthsStep:
    """The step graph of `path` with one more input, layer_lengths [layers,B] int32, in place of cache_lengths.

    Raises EngineError for a graph without GroupQueryAttention.
    """

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False
        options.add_session_config_entry(_FOLDER_OPTION, str(path.parent))
        model = onnx.load(str(path), load_external_data=False)
        self.session = ort.InferenceSession(
            _with_layer_lengths(model, path).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class LayerLengthsDecoder(Decoder):
    """One decode step for all rows of a cache, where layer l of row b writes slot layer_lengths[l,b]."""

    def __init__(
        self, step: LayerLengthsStep, binding: ort.IOBinding, cache: KVCache, vocab_size: int, heads: Mapping[int, int]
    ) -> None:
        super().__init__(step.session, binding, cache, vocab_size, heads, cache.keys[0].shape[3])
        self.layer_lengths = np.zeros((len(cache.keys), cache.keys[0].shape[0]), np.int32)
        bind_arrays(binding, {LENGTHS_INPUT: self.layer_lengths}, {})


def _with_layer_lengths(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    graph = model.graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise EngineError(f"{path} has no GroupQueryAttention; layers of different lengths cannot run on it")
    lengths = helper.make_tensor_value_info(LENGTHS_INPUT, onnx.TensorProto.INT32, [len(attention), "batch"])
    graph.input.append(lengths)
    one = helper.make_tensor("one", onnx.TensorProto.INT32, [], [1])
    axis = helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [1])
    made = [
        helper.make_node("Constant", [], ["layer_lengths.one"], value=one),
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
        made.append(helper.make_node("Constant", [], [f"layer_lengths.{layer}"], value=index))
        for place, source in ((_LENGTHS_AT, "last"), (_LENGTHS_AT + 1, "total")):
            name = f"layer_lengths.{source}.{layer}"
            made.append(
                helper.make_node("Gather", [f"layer_lengths.{source}", f"layer_lengths.{layer}"], [name], axis=0)
            )
            node.input[place] = name
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
