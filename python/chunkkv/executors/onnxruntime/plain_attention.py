"""Step graphs whose attention is ONNX Runtime's own for blocks of any length, to derive other graphs from."""

from __future__ import annotations

import onnx

_EITHER = "/either"  # how the builder ends the name of a choice between the attention of steps and that of long blocks


def with_plain_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the attention of steps in the place of every choice, in `model` itself, and return it."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "If" and node.name.endswith(_EITHER):
            nodes += _of_step(node)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _of_step(choice: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the nodes of the branch for steps, with the choice's own outputs."""
    (branch,) = (attribute.g for attribute in choice.attribute if attribute.name == "then_branch")
    outputs = {value.name: name for value, name in zip(branch.output, choice.output, strict=True)}
    for node in branch.node:
        node.output[:] = [outputs.get(name, name) for name in node.output]
    return list(branch.node)
