"""A step graph in which every KV head has a cache of its own: for trying what heads would keep, without a build.

It is derived in memory from the engine's step graph, in which all heads of a layer fill equally many slots.
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
from chunkkv.executors.onnxruntime.graphs import CPU, OnnxRuntimeStep, bind_arrays, session_options
from chunkkv.executors.onnxruntime.plain_attention import with_plain_attention

_KINDS = ("query", "key", "value")
_ROTARY_INPUT = 7  # of com.microsoft.GroupQueryAttention: cosines, sines and positions, where it rotates
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


class HeadLengthsScorer:
    """Scores blocks of tokens behind kept tokens that differ in number from head to head.

    Raises EngineError for an engine whose step graph has no fused attention, or more parts than layers.

    Parameters
    ----------
    step : OnnxRuntimeStep
        The engine's own step graph.
    """

    def __init__(self, step: OnnxRuntimeStep) -> None:
        self._step = step
        options = session_options(step.threads)
        options.add_session_config_entry(_FOLDER_OPTION, str(step.path.parent))
        model = with_plain_attention(onnx.load(str(step.path), load_external_data=False))
        model = _with_head_caches(model, step, step.path)
        with file_pages(step.path.parent):
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=CPU)

    def score_block(
        self,
        keys: Sequence[Sequence[np.ndarray]],
        values: Sequence[Sequence[np.ndarray]],
        ids: np.ndarray,
        position: int,
        first: int = 0,
    ) -> np.ndarray:
        """Return the logits [S-first,vocab] float32 after the tokens ids [S] int64 from number `first` on.

        Parameters
        ----------
        keys, values : sequence of sequence of numpy.ndarray
            Per layer and KV head the kept tokens [N,D] float32; N may differ.
        ids : numpy.ndarray
            The block.
        position : int
            Logical position of its first token.
        first : int, default 0
            The first token of the block whose logits are needed: multiplying with a whole vocabulary takes time.
        """
        size, binding = len(ids), self._session.io_binding()
        lengths, held = [], []
        for number, (key, value) in enumerate(
            (key, value)
            for of_keys, of_values in zip(keys, values, strict=True)
            for key, value in zip(of_keys, of_values, strict=True)
        ):
            lengths.append(len(key))
            for kind, kept in (("key", key), ("value", value)):
                cache = np.empty((1, 1, len(kept) + size, kept.shape[1]), self._step.cache_dtype)
                cache[0, 0, : len(kept)] = kept
                bind_arrays(binding, {f"past_{kind}.{number}": cache}, {f"present_{kind}.{number}": cache})
                held.append(cache)
        logits = np.empty((1, size - first, self._step.vocab_size), np.float32)
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(ids, np.int64)[None],
            "position_ids": np.arange(position, position + size, dtype=np.int64)[None],
            "cache_lengths": np.array(lengths, np.int32)[:, None],
            "logit_indices": np.arange(first, size, dtype=np.int64)[None],
        }
        bind_arrays(binding, inputs, {"logits": logits})
        self._session.run_with_iobinding(binding)
        return logits[0]


def _with_head_caches(model: onnx.ModelProto, step: OnnxRuntimeStep, path: Path) -> onnx.ModelProto:
    """Replace every attention by one for each KV head, with caches and lengths of its own."""
    graph, heads, size = model.graph, step.num_kv_heads, step.head_dim
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if len(attention) != step.num_layers:
        raise EngineError(f"{path} has no GroupQueryAttention over all heads of every layer; build the engine again")
    per_head = len(attention) * heads
    inputs = [value for value in graph.input if value.name in ("input_ids", "position_ids", "logit_indices")]
    outputs = [value for value in graph.output if value.name == "logits"]
    del graph.input[:], graph.output[:]
    dtype = helper.np_dtype_to_tensor_dtype(step.cache_dtype)
    lengths = helper.make_tensor_value_info("cache_lengths", onnx.TensorProto.INT32, [per_head, "batch"])
    graph.input.extend([*inputs, lengths])
    graph.output.extend(outputs)
    for values, name in ((graph.input, "past"), (graph.output, "present")):
        for number in range(per_head):
            shape: list[str | int | None] = ["batch", 1, f"slots_{number}", size]
            for kind in ("key", "value"):
                values.append(helper.make_tensor_value_info(f"{name}_{kind}.{number}", dtype, shape))
    layers = {node.name: layer for layer, node in enumerate(attention)}
    nodes = _length_nodes(per_head)
    for node in graph.node:
        nodes.extend([node] if node.name not in layers else _head_nodes(node, layers[node.name], heads, size))
    live = _live(nodes, [value.name for value in graph.output])
    del graph.node[:]
    graph.node.extend(live)
    return model


def _length_nodes(per_head: int) -> list[onnx.NodeProto]:
    """Return nodes that give every head the last filled slot of each row, and the largest length."""
    constants = {"one": (onnx.TensorProto.INT32, []), "axis_0": (onnx.TensorProto.INT64, [1])}
    nodes = [
        helper.make_node("Constant", [], ["head.one"], value=helper.make_tensor("one", *constants["one"], [1])),
        helper.make_node("Constant", [], ["head.axis_0"], value=helper.make_tensor("zero", *constants["axis_0"], [0])),
        helper.make_node("Shape", ["input_ids"], ["head.block64"], start=1, end=2),
        helper.make_node("Squeeze", ["head.block64"], ["head.block_"]),
        helper.make_node("Cast", ["head.block_"], ["head.block"], to=onnx.TensorProto.INT32),
        helper.make_node("Sub", ["head.block", "head.one"], ["head.before_last"]),
        helper.make_node("Add", ["cache_lengths", "head.before_last"], ["head.lasts"]),
    ]
    rows = [f"head.last_.{number}" for number in range(per_head)]
    nodes.append(helper.make_node("Split", ["head.lasts"], rows, axis=0, num_outputs=per_head))
    for number, row in enumerate(rows):
        nodes += [
            helper.make_node("Squeeze", [row, "head.axis_0"], [f"head.last.{number}"]),
            helper.make_node("ReduceMax", [f"head.last.{number}"], [f"head.longest.{number}"], keepdims=0),
            helper.make_node("Add", [f"head.longest.{number}", "head.one"], [f"head.total.{number}"]),
        ]
    return nodes


def _head_nodes(node: onnx.NodeProto, layer: int, heads: int, size: int) -> list[onnx.NodeProto]:
    """Return what computes the attention `node` over `heads` KV heads of `size` numbers head by head."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    group = attributes.pop("num_heads") // attributes.pop("kv_num_heads")
    pieces, nodes, mixed = [], [], []
    values = list(node.input[:3])
    if not values[1]:  # query, key and value are one tensor
        values = [f"head.{kind}.of_{layer}" for kind in _KINDS]
        widths = [group * heads * size, heads * size, heads * size]
        sizes = helper.make_tensor("sizes", onnx.TensorProto.INT64, [len(widths)], widths)
        nodes += [
            helper.make_node("Constant", [], [f"head.sizes.{layer}"], value=sizes),
            helper.make_node("Split", [node.input[0], f"head.sizes.{layer}"], values, axis=2),
        ]
    for value, kind in zip(values, _KINDS, strict=True):
        names = [f"head.{kind}.{layer * heads + head}" for head in range(heads)]
        nodes.append(helper.make_node("Split", [value], names, axis=2, num_outputs=heads))
        pieces.append(names)
    for head, qkv in enumerate(zip(*pieces, strict=True)):
        number = layer * heads + head
        mixed.append(f"head.mixed.{number}")
        cache = [f"{name}.{number}" for name in ("past_key", "past_value", "head.last", "head.total")]
        nodes.append(
            helper.make_node(
                node.op_type,
                [*qkv, *cache, *node.input[_ROTARY_INPUT:]],
                [mixed[-1], f"present_key.{number}", f"present_value.{number}"],
                domain=node.domain,
                num_heads=group,
                kv_num_heads=1,
                **attributes,
            )
        )
    return [*nodes, helper.make_node("Concat", mixed, [node.output[0]], axis=2)]


def _live(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes that `outputs` need, in order."""
    needed, live = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            live.append(node)
    return live[::-1]
