"""The ONNX functions behind the reference's signature, so that every check of the op runs on them too."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.emitter import GraphEmitter

OPSET = 23


def select_model(
    settings: ChunkKVSettings, heads: int, kv_heads: int, opset: int = OPSET, sorting: bool = True
) -> onnx.ModelProto:
    """Return a graph of one ChunkKVSelect node; every dimension but the head counts is free."""
    e = GraphEmitter()
    shapes = {"query": ["B", heads, settings.window, "D"], "key": ["B", kv_heads, "S", "D"], "is_delimiter": ["B", "S"]}
    dtypes = {"query": "float32", "key": "float32"}
    names = functions.select_inputs(settings)
    for name in names:
        e.input(name, dtypes.get(name, "int32"), shapes.get(name, ["B"]))
    outputs = {"kept_indices": ("int32", ["B", "N"]), "kept_lengths": ("int32", ["B"])}
    outputs["token_scores"] = ("float32", ["B", "S"])
    attributes = functions.select_attributes(settings) if sorting else {}
    e.op(functions.SELECT, names, list(outputs), name="/select", domain=functions.DOMAIN, **attributes)
    for name, (dtype, shape) in outputs.items():
        e.output(name, dtype, shape)
    body = functions.select_function(settings, heads, kv_heads, opset, sorting=sorting)
    return e.model("select", opset=opset, functions=[body], domains=[(functions.DOMAIN, 1)])


def compact_model(opset: int = OPSET) -> onnx.ModelProto:
    """Return a graph of one ChunkKVCompact node."""
    e = GraphEmitter()
    inputs = [e.input("x", "float32", ["B", "Hkv", "S", "D"]), e.input("kept_indices", "int32", ["B", "K"])]
    attributes = functions.plugin_attributes()
    e.op(functions.COMPACT, inputs, ["y"], name="/compact", domain=functions.DOMAIN, **attributes)
    e.output("y", "float32", ["B", "Hkv", "K", "D"])
    body = functions.compact_function(opset)
    return e.model("compact", opset=opset, functions=[body], domains=[(functions.DOMAIN, 1)])


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """Return a session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=64)
def _select_session(settings: ChunkKVSettings, heads: int, kv_heads: int, sorting: bool) -> ort.InferenceSession:
    return session_of(select_model(settings, heads, kv_heads, sorting=sorting))


@functools.lru_cache(maxsize=1)
def _compact_session() -> ort.InferenceSession:
    return session_of(compact_model())


def feeds(
    query: NDArray[Any],
    key: NDArray[Any],
    lengths: NDArray[Any],
    settings: ChunkKVSettings,
    *,
    keep_per_10k: NDArray[Any] | None = None,
    budget_tokens: NDArray[Any] | None = None,
    is_delimiter: NDArray[Any] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the node's inputs; what a call leaves out is filled in from the settings, as the runtime does."""
    rows = len(lengths)
    if keep_per_10k is None and budget_tokens is None:
        budget_tokens = np.full(rows, settings.budget_tokens)
    if keep_per_10k is None:
        keep_per_10k = np.full(rows, settings.keep_per_10k)
    named = {
        "query": query.astype(np.float32),
        "key": key.astype(np.float32),
        "lengths": np.asarray(lengths, np.int32),
        "keep_per_10k": np.asarray(keep_per_10k, np.int32),
        "budget_tokens": np.asarray(np.zeros(rows) if budget_tokens is None else budget_tokens, np.int32),
    }
    return named if settings.boundaries == "fixed" else {**named, "is_delimiter": is_delimiter.astype(np.int32)}


def select(
    query: NDArray[Any], key: NDArray[Any], lengths: NDArray[Any], settings: ChunkKVSettings, **optional: Any
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """ChunkKVSelect in ONNX Runtime, with the signature of chunkkv.reference.select_batch."""
    session = _select_session(settings, query.shape[1], key.shape[1], True)
    indices, kept, scores = session.run(None, feeds(query, key, lengths, settings, **optional))
    return indices, kept, scores


def select_without_sorting(
    query: NDArray[Any], key: NDArray[Any], lengths: NDArray[Any], settings: ChunkKVSettings, **optional: Any
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """The bodies for TensorRT in ONNX Runtime, with the signature of chunkkv.reference.select_batch.

    They give indices [B,S]; those behind the longest row's N must be padding and are cut off.
    """
    session = _select_session(settings, query.shape[1], key.shape[1], False)
    indices, kept, scores = session.run(None, feeds(query, key, lengths, settings, **optional))
    assert indices.shape == scores.shape and (indices[:, kept.max() :] == -1).all()
    return indices[:, : kept.max()], kept, scores


def compact(x: NDArray[Any], kept_indices: NDArray[np.int32]) -> NDArray[Any]:
    """ChunkKVCompact in ONNX Runtime on float32 caches."""
    return _compact_session().run(None, {"x": x, "kept_indices": kept_indices})[0]
