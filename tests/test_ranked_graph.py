"""One ranking over all layers: the compress graph keeps in every layer what the NumPy reference keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import class_engines, onnx_op
from support.messages import naming
from support.op_cases import OpCase

from chunkkv import reference, reference_layers
from chunkkv.errors import ConfigError
from chunkkv_builder.onnx_graph.compress import ChunkKVNodes, compress_graph
from chunkkv_builder.onnx_graph.emitter import GraphEmitter

LENGTHS = (61, 7, 40)
LAYERS, KV_HEADS = class_engines.LAYERS, class_engines.KV_HEADS


@pytest.mark.parametrize("ratio", [4_000, 1_000, 10_000])
@pytest.mark.parametrize("value_norm", ["off", "on"])
def test_every_layer_keeps_what_the_reference_keeps(ratio: int, value_norm: str) -> None:
    settings = class_engines.settings_of(budget_split="ranked", keep_per_10k=ratio, value_norm=value_norm)
    plan = class_engines.plan_of(settings)
    sizes: dict[str, Any] = {"heads": plan.model.num_heads, "kv_heads": KV_HEADS, "head_dim": plan.model.head_dim}
    contrast = (0.3, 2.0, 6.0)  # layers that attend to few tokens win more of them
    calls = [OpCase(f"layer {n}", settings, LENGTHS, contrast=contrast[n], **sizes).inputs() for n in range(LAYERS)]
    values = [np.ascontiguousarray(call.key[..., ::-1]) for call in calls]
    expected = reference_layers.select_layers(
        {n: call.query for n, call in enumerate(calls)},
        [call.key for call in calls],
        calls[0].lengths,
        settings,
        values=values,
    )
    totals = np.sum([selection.kept_lengths for selection in expected], axis=0)
    assert totals.tolist() == [LAYERS * settings.kept_tokens(length) for length in LENGTHS]
    assert ratio != 4_000 or len({tuple(selection.kept_lengths) for selection in expected}) > 1
    capacity = np.array([selection.kept_lengths.max() for selection in expected], np.int64)
    rows = len(LENGTHS)
    feeds = {"lengths": calls[0].lengths, "keep_per_10k": np.full(rows, ratio, np.int32), "capacity": capacity}
    feeds |= {"budget_tokens": np.zeros(rows, np.int32), "window": np.full(rows, settings.window, np.int32)}
    for number, call in enumerate(calls):
        feeds |= {f"query.{number}": call.query, f"key.{number}": call.key, f"value.{number}": values[number]}
    graph = onnx_op.session_of(compress_graph(plan))
    found = dict(zip((value.name for value in graph.get_outputs()), graph.run(None, feeds), strict=True))
    assert found["kept_lengths"].tolist() == [selection.kept_lengths.tolist() for selection in expected]
    for number, selection in enumerate(expected):
        for row, count in enumerate(selection.kept_lengths):
            kept = selection.kept_indices[row, :count]
            assert found[f"kept_indices.{number}"][row, :count].tolist() == kept.tolist()
            assert (found[f"kept_indices.{number}"][row, count:] == reference.PAD_INDEX).all()
            for kind, full in (("key", calls[number].key), ("value", values[number])):
                compacted = found[f"kept_{kind}.{number}"]
                assert compacted.shape[2] == capacity[number]
                assert compacted[row, :, :count].tobytes() == full[row][:, kept].tobytes()


def test_bodies_for_tensorrt_have_no_ranking_over_layers() -> None:
    plan = class_engines.plan_of(class_engines.settings_of(budget_split="ranked"))
    with pytest.raises(ConfigError, match=naming("budget_split 'ranked' onnxruntime")):
        ChunkKVNodes(GraphEmitter(), plan, sorting=False)
