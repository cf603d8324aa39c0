"""One ranking over all layers or heads: the compress graph keeps what the NumPy reference keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support import class_engines, onnx_op
from support.messages import naming
from support.op_cases import OpCase, OpInputs
from support.op_properties import PADDING_CONTENTS

from chunkkv import reference, reference_layers
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph.compress import ChunkKVNodes, compress_graph
from chunkkv_builder.onnx_graph.emitter import GraphEmitter

LENGTHS = (61, 7, 40)
LAYERS, KV_HEADS = class_engines.LAYERS, class_engines.KV_HEADS
CONTRAST = (0.3, 2.0, 6.0)  # layers that attend to few tokens win more of them
RANKED: dict[str, dict[str, Any]] = {"layers": {"budget_split": "ranked"}, "heads": class_engines.RANKED_HEADS}
Kept = list[list[np.ndarray]]  # per part and row the kept positions


def settings_of(name: str, **changes: Any) -> ChunkKVSettings:
    return class_engines.settings_of(**{**RANKED[name], **changes})


def calls_of(settings: ChunkKVSettings, padding: int = 0) -> list[OpInputs]:
    """Return the inputs of every layer."""
    model = class_engines.plan_of(settings).model
    sizes: dict[str, Any] = {"heads": model.num_heads, "kv_heads": KV_HEADS, "head_dim": model.head_dim}
    return [
        OpCase(f"layer {n}", settings, LENGTHS, contrast=CONTRAST[n], extra_padding=padding, **sizes).inputs()
        for n in range(LAYERS)
    ]


def values_of(call: OpInputs) -> np.ndarray:
    return np.ascontiguousarray(call.key[..., ::-1])


@cache
def graph_of(settings: ChunkKVSettings) -> ort.InferenceSession:
    """Return the compress graph; how much is kept is an input."""
    return onnx_op.session_of(compress_graph(class_engines.plan_of(settings)))


def run(settings: ChunkKVSettings, calls: list[OpInputs], capacity: int) -> dict[str, np.ndarray]:
    """Return all outputs of the compress graph by name; every part's cache has `capacity` slots."""
    rows, group = len(calls[0].lengths), calls[0].query.shape[1] // KV_HEADS
    parts = class_engines.plan_of(settings).parts
    feeds = {
        "lengths": calls[0].lengths,
        "keep_per_10k": np.full(rows, settings.keep_per_10k, np.int32),
        "capacity": np.full(len(parts), capacity, np.int64),
        "budget_tokens": np.zeros(rows, np.int32),
        "window": np.full(rows, settings.window, np.int32),
    }
    for part in parts:
        heads, call = list(part.kv_heads), calls[part.layer]
        queries = [head * group + member for head in heads for member in range(group)]
        feeds[f"query.{part.number}"] = np.ascontiguousarray(call.query[:, queries])
        feeds[f"key.{part.number}"] = np.ascontiguousarray(call.key[:, heads])
        feeds[f"value.{part.number}"] = np.ascontiguousarray(values_of(call)[:, heads])
    graph = graph_of(replace(settings, keep_per_10k=5_000))
    return dict(zip((value.name for value in graph.get_outputs()), graph.run(None, feeds), strict=True))


def kept_of(settings: ChunkKVSettings, calls: list[OpInputs]) -> Kept:
    found = run(settings, calls, capacity=int(calls[0].lengths.max()))
    return [
        [indices[row, :count] for row, count in enumerate(found["kept_lengths"][part])]
        for part, indices in ((part, found[f"kept_indices.{part}"]) for part in range(len(found["kept_lengths"])))
    ]


def as_lists(kept: Kept) -> list[list[list[int]]]:
    return [[indices.tolist() for indices in rows] for rows in kept]


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("ratio", [4_000, 1_000, 10_000])
@pytest.mark.parametrize("value_norm", ["off", "on"])
def test_every_part_keeps_what_the_reference_keeps(name: str, ratio: int, value_norm: str) -> None:
    settings = settings_of(name, keep_per_10k=ratio, value_norm=value_norm)
    calls = calls_of(settings)
    values = [values_of(call) for call in calls]
    expected = reference_layers.select_layers(
        {n: call.query for n, call in enumerate(calls)},
        [call.key for call in calls],
        calls[0].lengths,
        settings,
        values=values,
    )
    parts = class_engines.plan_of(settings).parts
    totals = np.sum([selection.kept_lengths for selection in expected], axis=0)
    assert totals.tolist() == [len(parts) * settings.kept_tokens(length) for length in LENGTHS]
    assert ratio != 4_000 or len({tuple(selection.kept_lengths) for selection in expected}) > 1
    capacity = int(max(selection.kept_lengths.max() for selection in expected))
    found = run(settings, calls, capacity)
    assert found["kept_lengths"].tolist() == [selection.kept_lengths.tolist() for selection in expected]
    for part, selection in zip(parts, expected, strict=True):
        indices, heads = found[f"kept_indices.{part.number}"], list(part.kv_heads)
        for row, count in enumerate(selection.kept_lengths):
            kept = selection.kept_indices[row, :count]
            assert indices[row, :count].tolist() == kept.tolist()
            assert (indices[row, count:] == reference.PAD_INDEX).all()
            for kind, full in (("key", calls[part.layer].key), ("value", values[part.layer])):
                compacted = found[f"kept_{kind}.{part.number}"]
                assert compacted.shape[1:3] == (len(heads), capacity)
                assert compacted[row, :, :count].tobytes() == full[row][heads][:, kept].tobytes()


@pytest.mark.parametrize("name", RANKED)
def test_a_row_is_chosen_alone_whatever_stands_in_the_batch_and_behind_it(name: str) -> None:
    settings = settings_of(name)
    plain, order = kept_of(settings, calls_of(settings)), [2, 0, 1]
    permuted = kept_of(settings, [call.take_rows(order) for call in calls_of(settings)])
    assert as_lists(permuted) == [[rows[row] for row in order] for rows in as_lists(plain)]
    for content in PADDING_CONTENTS:
        padded = calls_of(settings, padding=5)
        for call, bare in zip(padded, calls_of(settings), strict=True):
            call.query[:] = bare.query
            for row, length in enumerate(LENGTHS):
                call.key[row, :, :length], call.key[row, :, length:] = bare.key[row, :, :length], content
        assert as_lists(kept_of(settings, padded)) == as_lists(plain), content


@pytest.mark.parametrize("name", RANKED)
def test_a_larger_budget_only_adds_tokens(name: str) -> None:
    settings = settings_of(name)
    calls, smaller = calls_of(settings), None
    for ratio in (2_000, 2_500, 4_000, 7_000, 9_000, 10_000):
        kept = kept_of(replace(settings, keep_per_10k=ratio), calls)
        if smaller is not None:
            for before, after in zip(smaller, kept, strict=True):
                assert all(set(few.tolist()) <= set(more.tolist()) for few, more in zip(before, after, strict=True))
        smaller = kept
    assert smaller is not None
    assert all(len(indices) == length for rows in smaller for indices, length in zip(rows, LENGTHS, strict=True))


def test_equal_heads_that_are_ranked_keep_what_shared_heads_keep() -> None:
    """At every budget: a chunk that is split is split at the same token in every head."""
    for ratio in range(2_000, 6_000, 300):
        shared, each = (settings_of(name, keep_per_10k=ratio) for name in ("layers", "heads"))
        calls = calls_of(shared)
        group = calls[0].query.shape[1] // KV_HEADS
        for call in calls:
            call.key[:] = call.key[:, :1]
            call.query[:] = np.tile(call.query[:, :group], (1, KV_HEADS, 1, 1))
        together, apart = as_lists(kept_of(shared, calls)), as_lists(kept_of(each, calls))
        assert apart == [kept for kept in together for _ in range(KV_HEADS)]


def test_not_a_number_is_the_lowest_of_all_scores() -> None:
    """The chunk with the token of NaN stays in no head as long as any other may come in its place."""
    settings = settings_of("heads", keep_per_10k=8_000, score="given")
    parts, length = class_engines.plan_of(settings).parts, 40
    scores = np.random.default_rng(0).random((len(parts), 1, length)).astype(np.float32)
    scores[4, 0, 8] = np.nan  # of the chunk 8 to 10
    feeds: dict[str, np.ndarray] = {f"scores.{part.number}": scores[part.number] for part in parts}
    row = {"lengths": length, "keep_per_10k": settings.keep_per_10k, "budget_tokens": 0}
    feeds |= {name: np.array([value], np.int32) for name, value in row.items()}
    feeds["capacity"] = np.full(len(parts), length, np.int64)
    head = np.zeros((1, 1, length, class_engines.plan_of(settings).model.head_dim), np.float32)
    feeds |= {f"{kind}.{part.number}": head for part in parts for kind in ("key", "value")}
    settings = replace(settings, pooling=1)
    graph = onnx_op.session_of(compress_graph(class_engines.plan_of(settings)))
    found = dict(zip((value.name for value in graph.get_outputs()), graph.run(None, feeds), strict=True))
    expected = reference_layers.select_ranked(scores.reshape(LAYERS, KV_HEADS, length), length, 32, settings)
    for part, kept in enumerate(expected):
        assert found[f"kept_indices.{part}"][0, : len(kept)].tolist() == kept.tolist()
    assert not set(range(8, 11)) & set(expected[4].tolist()) and found["kept_lengths"].sum() == 32 * len(parts)


def test_bodies_for_tensorrt_have_no_ranking_over_layers() -> None:
    plan = class_engines.plan_of(class_engines.settings_of(budget_split="ranked"))
    with pytest.raises(ConfigError, match=naming("budget_split 'ranked' onnxruntime")):
        ChunkKVNodes(GraphEmitter(), plan, sorting=False)
