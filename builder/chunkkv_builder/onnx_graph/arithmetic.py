"""Pieces of graphs that only some families need: multipliers, and soft caps with the attention around them."""

from __future__ import annotations

import numpy as np

from chunkkv_builder.onnx_graph.emitter import NodeEmitter


def scaled(e: NodeEmitter, value: str, factor: float, dtype: str = "float32") -> str:
    """Return `value`, of type `dtype`, times `factor`; a factor of 1 needs no node."""
    return value if factor == 1.0 else e.op("Mul", [value, e.scalar(factor, dtype)])


def soft_cap(e: NodeEmitter, value: str, cap: float, dtype: str) -> str:
    """Return cap * tanh(value / cap)."""
    bound = e.scalar(cap, dtype)
    return e.op("Mul", [e.op("Tanh", [e.op("Div", [value, bound])]), bound])


def soft_capped_attention(
    e: NodeEmitter,
    name: str,
    qkv: tuple[str, str, str],
    visible: str | None,
    cap: float,
    heads: tuple[int, int],
    dtype: str,
) -> str:
    """Return attention whose logits are capped, [B,Hq,S,D].

    It is written in small operators, because TensorRT refuses the attribute softcap of Attention.

    Parameters
    ----------
    e : NodeEmitter
        The graph that gets the nodes.
    name : str
        Name of the last node.
    qkv : tuple of str
        Query [B,Hq,S,D], which has the scale of attention already, and key and value [B,Hkv,C,D].
    visible : str or None
        Mask [B,1,S,C] bool of which slots a token attends to; None for causal attention over a block, where C = S.
    cap : float
        Bound of the logits.
    heads : tuple of int
        Hq and Hkv.
    dtype : str
        Type of the tensors.
    """
    query, key, value = qkv
    num_heads, kv_heads = heads
    rows = e.dim(query, 2)
    # The query heads of one KV head lie side by side: together they are one matrix, and no key is repeated.
    grouped_shape = e.op("Concat", [e.ints(0, kv_heads, -1), e.dim(query, 3)], axis=0)
    grouped = e.op("Reshape", [query, grouped_shape])
    logits = e.op("MatMul", [grouped, e.op("Transpose", [key], perm=[0, 1, 3, 2])])
    by_head = e.op("Concat", [e.ints(0, num_heads), rows, e.ints(-1)], axis=0)
    logits = soft_cap(e, e.op("Reshape", [logits, by_head]), cap, dtype)
    if visible is None:
        steps = e.op("Range", [e.const(0, "int64"), e.op("Squeeze", [rows]), e.const(1, "int64")])
        visible = e.op("LessOrEqual", [steps, e.op("Unsqueeze", [steps, e.ints(1)])])
    weights = e.op("Softmax", [e.op("Where", [visible, logits, e.scalar(-np.inf, dtype)])], axis=-1)
    grouped_weights = e.op("Concat", [e.ints(0, kv_heads, -1), e.dim(key, 2)], axis=0)
    mixed = e.op("MatMul", [e.op("Reshape", [weights, grouped_weights]), value])
    return e.op("Reshape", [mixed, e.op("Concat", [e.ints(0, num_heads), rows, e.ints(-1)], axis=0)], name=name)
