"""The graph that scores a second reading of a prompt: the largest attention that each key receives. It has no weights.

The step graph returns the queries of the second reading; this graph meets them with the keys of one part of the cache.
"""

from __future__ import annotations

import onnx

from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.plan import GraphPlan

REREAD_OPSET = 18


def reread_graph(plan: GraphPlan) -> onnx.ModelProto:
    """Return the graph for every part of the cache.

    Inputs: query [H,g,S,D], the rotated queries of H KV heads; key [H,1,D,T], their keys transposed; mask [S,T], 0
    where a query sees a key and -inf elsewhere. Output: received [H,T], the maximum over queries of the attention
    weights, in float32.
    """
    e, size = GraphEmitter(), plan.model.head_dim
    query = e.input("query", "float32", ["kv_heads", plan.model.num_heads // plan.model.num_kv_heads, "queries", size])
    key = e.input("key", "float32", ["kv_heads", 1, size, "keys"])
    mask = e.input("mask", "float32", ["queries", "keys"])
    logits = e.op("MatMul", [e.op("Mul", [query, e.scalar(size**-0.5)]), key])
    weights = e.op("Softmax", [e.op("Add", [logits, mask])], axis=-1)
    e.op("ReduceMax", [weights, e.ints(1, 2)], ["received"], keepdims=0)
    e.output("received", "float32", ["kv_heads", "keys"])
    return e.model("chunkkv_reread", opset=REREAD_OPSET, metadata={"chunkkv.graph": "reread"})
