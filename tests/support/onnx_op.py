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
    settings: ChunkKVSettings,
    heads: int,
    kv_heads: int,
    opset: int = OPSET,
    sorting: bool = True,
    request_window: bool = True,
    head_class: str = "all",
) -> onnx.ModelProto:
    """Return a graph of one ChunkKVSelect node; every dimension but the head counts is free."""
    e = GraphEmitter()
    choices: list[int | str] = ["B", kv_heads] if settings.heads == "each" else ["B"]
    shapes = {"query": ["B", heads, settings.window, "D"], "key": ["B", kv_heads, "S", "D"], "is_delimiter": ["B", "S"]}
    shapes |= {"value": shapes["key"], "scores": [*choices, "S"]}
    dtypes = dict.fromkeys(("query", "key", "value", "scores"), "float32")
    names = functions.select_inputs(settings, request_window)
    for name in names:
        e.input(name, dtypes.get(name, "int32"), shapes.get(name, ["B"]))
    outputs = {"kept_indices": ("int32", [*choices, "N"]), "kept_lengths": ("int32", ["B"])}
    outputs["token_scores"] = ("float32", [*choices, "S"])
    attributes = functions.select_attributes(settings) if sorting else {}
    e.op(functions.SELECT, names, list(outputs), name="/select", domain=functions.DOMAIN, **attributes)
    for name, (dtype, shape) in outputs.items():
        e.output(name, dtype, shape)
    body = functions.select_function(
        settings, heads, kv_heads, opset, sorting=sorting, request_window=request_window, head_class=head_class
    )
    return e.model("select", opset=opset, functions=[body], domains=[(functions.DOMAIN, 1)])


def compact_model(opset: int = OPSET, heads: str = "shared") -> onnx.ModelProto:
    """Return a graph of one ChunkKVCompact node."""
    e = GraphEmitter()
    kept: list[int | str] = ["B", "H", "K"] if heads == "each" else ["B", "K"]
    inputs = [e.input("x", "float32", ["B", "Hkv", "S", "D"]), e.input("kept_indices", "int32", kept)]
    attributes = functions.plugin_attributes()
    e.op(functions.COMPACT, inputs, ["y"], name="/compact", domain=functions.DOMAIN, **attributes)
    e.output("y", "float32", ["B", "Hkv", "K", "D"])
    body = functions.compact_function(opset, heads)
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


@functools.lru_cache(maxsize=2)
def _compact_session(heads: str) -> ort.InferenceSession:
    return session_of(compact_model(heads=heads))


def feeds(
    query: NDArray[Any],
    key: NDArray[Any],
    lengths: NDArray[Any],
    settings: ChunkKVSettings,
    *,
    keep_per_10k: NDArray[Any] | None = None,
    budget_tokens: NDArray[Any] | None = None,
    is_delimiter: NDArray[Any] | None = None,
    window: NDArray[Any] | None = None,
    value: NDArray[Any] | None = None,
    scores: NDArray[Any] | None = None,
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
        "window": np.full(rows, settings.window, np.int32) if window is None else np.asarray(window, np.int32),
    }
    for name, array, dtype in (
        ("is_delimiter", is_delimiter, np.int32),
        ("value", value, np.float32),
        ("scores", scores, np.float32),
    ):
        if array is not None:
            named[name] = array.astype(dtype)
    return {name: named[name] for name in functions.select_inputs(settings, request_window=True)}


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
    assert indices.shape == scores.shape and (indices[..., kept.max() :] == -1).all()
    return indices[..., : kept.max()], kept, scores


def compact(x: NDArray[Any], kept_indices: NDArray[np.int32]) -> NDArray[Any]:
    """ChunkKVCompact in ONNX Runtime on float32 caches."""
    return _compact_session("each" if kept_indices.ndim == 3 else "shared").run(
        None, {"x": x, "kept_indices": kept_indices}
    )[0]
