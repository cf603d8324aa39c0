"""Attention of long blocks with scores from whole numbers: against NumPy, and inside engines of w8a8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support import class_engines, engines

from chunkkv.cache_scales import CacheScales
from chunkkv.executors.onnxruntime import graphs
from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder import build as build_engine
from chunkkv_builder.backends.onnxruntime import step_weights
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph import fused_step
from chunkkv_builder.onnx_graph.block_attention import BlockAttention, EightBitBlockAttention
from chunkkv_builder.onnx_graph.eight_bit_cache import scale_inputs
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.plan import make_plan

HEAD_DIM, CAPACITY = 32, 300
W8A8 = {"use_weight_only": True, "weight_only_precision": "w8a8"}


def attention_graph(query_heads: int, kv_heads: int, scales: CacheScales | None = None) -> onnx.ModelProto:
    """Return a graph of the attention alone, over a cache of 8 bits where `scales` are given."""
    e, dtype = GraphEmitter(), "float32" if scales is None else "int8"
    qkv = [
        e.input(name, "float32", [1, "block", heads * HEAD_DIM])
        for name, heads in (("query", query_heads), ("key", kv_heads), ("value", kv_heads))
    ]
    cache = [1, kv_heads, "capacity", HEAD_DIM]
    past = [e.input(name, dtype, cache) for name in ("past_key", "past_value")]
    last, sizes = e.input("last", "int32", [1]), (query_heads, kv_heads, HEAD_DIM)
    if scales is None:
        attention = BlockAttention(e, *sizes)
    else:
        attention = EightBitBlockAttention(e, *sizes, scale_inputs(e, scales, 0))
    mixed, *caches = attention.emit((qkv[0], qkv[1], qkv[2]), past, last)
    e.output(mixed, "float32", [1, "block", query_heads * HEAD_DIM])
    for name in caches:
        e.output(name, dtype, cache)
    return e.model("block", opset=23 if scales is None else 24, domains=[("com.microsoft", 1)])


def expected(arrays: dict[str, np.ndarray], kv_heads: int, first: int) -> list[np.ndarray]:
    """Return attention and caches in float64."""
    heads = {name: arrays[name][0].reshape(arrays[name].shape[1], -1, HEAD_DIM) for name in ("query", "key", "value")}
    size, query_heads, _ = heads["query"].shape
    caches = []
    for name in ("key", "value"):
        cache = arrays[f"past_{name}"].astype(np.float64)
        cache[0, :, first : first + size] = heads[name].transpose(1, 0, 2)
        caches.append(cache)
    mixed = np.empty((size, query_heads, HEAD_DIM))
    for head in range(query_heads):
        keys, values = (cache[0, head // (query_heads // kv_heads), : first + size] for cache in caches)
        scores = heads["query"][:, head] @ keys.T
        scores[np.arange(first + size) > first + np.arange(size)[:, None]] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = shares / shares.sum(axis=1, keepdims=True) @ values
    return [mixed.reshape(1, size, -1), *caches]


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("first", [0, 1, 170])
def test_it_attends_as_float64_does_up_to_rounding(query_heads: int, kv_heads: int, first: int) -> None:
    rng, size = np.random.default_rng(first), 65
    shapes = {"query": (1, size, query_heads * HEAD_DIM)} | {
        name: (1, size, kv_heads * HEAD_DIM) for name in ("key", "value")
    }
    shapes |= {name: (1, kv_heads, CAPACITY, HEAD_DIM) for name in ("past_key", "past_value")}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["query"] *= np.float32(0.2)
    arrays["key"][..., 3] *= 5  # some numbers of keys are larger than the others
    arrays["past_key"][..., 3] *= 5
    session = ort.InferenceSession(attention_graph(query_heads, kv_heads).SerializeToString())
    found = session.run(None, {**arrays, "last": np.array([first + size - 1], np.int32)})
    attention, *caches = expected(arrays, kv_heads, first)
    assert np.sqrt(((found[0] - attention) ** 2).mean()) < 0.04 * attention.std()
    for cache, exact in zip(found[1:], caches, strict=True):
        assert np.array_equal(cache, exact.astype(np.float32))


def eight_bit_run(
    first: int, size: int, kv_heads: int, loud: float = 1.0
) -> tuple[dict[str, np.ndarray], list[np.ndarray], CacheScales]:
    """Run 6 query heads over a cache of 8 bits; return what was given, what came out, and the cache's scales.

    All queries read the first number of a key; that of the first token's key is 40 * `loud`.
    """
    rng = np.random.default_rng(4)
    scales = CacheScales(*(((rng.uniform(0.5, 2, (kv_heads, HEAD_DIM)) / 40).astype(np.float32),) for _ in range(2)))
    shapes = {"query": 6, "key": kv_heads, "value": kv_heads}
    arrays = {
        name: rng.standard_normal((1, size, heads * HEAD_DIM)).astype(np.float32) for name, heads in shapes.items()
    }
    arrays |= {
        name: rng.integers(-90, 91, (1, kv_heads, CAPACITY, HEAD_DIM)).astype(np.int8)
        for name in ("past_key", "past_value")
    }
    arrays["past_value"] += np.int8(30)
    arrays["query"] *= np.float32(0.2)
    arrays["query"][..., ::HEAD_DIM] = 0.4
    arrays["past_key"][:, :, 0, 0] = 40 * loud
    session = ort.InferenceSession(attention_graph(6, kv_heads, scales).SerializeToString())
    return arrays, session.run(None, {**arrays, "last": np.array([first + size - 1], np.int32)}), scales


def test_over_a_cache_of_8_bits_it_reads_what_the_cache_holds() -> None:
    size, first, kv_heads = 65, 170, 2
    arrays, found, scales = eight_bit_run(first, size, kv_heads)
    read = {"query": arrays["query"]}
    for name, of_kind in (("key", scales.keys[0]), ("value", scales.values[0])):
        codes = np.clip(np.rint(arrays[name].reshape(1, size, kv_heads, HEAD_DIM) / of_kind), -128, 127)
        read[name] = (codes * of_kind).reshape(1, size, -1)
        read[f"past_{name}"] = arrays[f"past_{name}"] * of_kind[None, :, None]
        written = found[1 + (name == "value")]
        assert np.array_equal(written[0, :, first : first + size], codes[0].transpose(1, 0, 2))
        assert np.array_equal(written[0, :, :first], arrays[f"past_{name}"][0, :, :first])
    attention = expected(read, kv_heads, first)[0]
    assert np.sqrt(((found[0] - attention) ** 2).mean()) < 0.03 * attention.std(), "queries and probabilities"


@pytest.mark.parametrize(("first", "size"), [(170, 65), (0, 65), (2, 100)])
@pytest.mark.parametrize("loud", [0.0, 3.0])
def test_probabilities_of_8_bits_lose_nothing_to_zero(first: int, size: int, loud: float) -> None:
    """NumPy's own arithmetic: the first tokens exact, others in codes, and what these lose at the mean of values."""
    kv_heads, group = 2, 3
    arrays, found, scales = eight_bit_run(first, size, kv_heads, loud)
    queries, hidden = arrays["query"][0].reshape(size, 6, HEAD_DIM), np.triu(np.full((size, size), -np.inf), 1)
    wanted = np.empty((size, 6, HEAD_DIM))
    for head in range(kv_heads):
        keys, values = (cache[0, head, : first + size].astype(np.float64) for cache in found[1:])
        own = slice(head * group, (head + 1) * group)
        scaled = queries[:, own] * scales.keys[0][head]
        step = np.abs(scaled).max() / 127
        scores = np.einsum("sgd,td->gst", np.rint(scaled / step) * step, keys)
        scores[:, :, first:] += hidden
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        rounded, center = shares.copy(), np.rint(values.mean(axis=0))
        steps = np.maximum(shares[:, :, 4:].max(axis=2, keepdims=True) / 127, 1e-30)
        rounded[:, :, 4:] = np.rint(shares[:, :, 4:] / steps) * steps
        lost = 1 - rounded.sum(axis=2, keepdims=True)
        wanted[:, own] = ((rounded @ values + lost * center) * scales.values[0][head]).transpose(1, 0, 2)
    difference = found[0][0].reshape(size, 6, HEAD_DIM) - wanted
    assert np.sqrt((difference**2).mean()) < 1e-3 * wanted.std(), "a code on the edge may be its neighbour"


def test_keys_of_zero_are_no_error() -> None:
    arrays = {"query": np.ones((1, 64, HEAD_DIM), np.float32)}
    arrays |= {name: np.zeros((1, 64, HEAD_DIM), np.float32) for name in ("key", "value")}
    arrays |= {name: np.zeros((1, 1, 64, HEAD_DIM), np.float32) for name in ("past_key", "past_value")}
    found = ort.InferenceSession(attention_graph(1, 1).SerializeToString()).run(
        None, {**arrays, "last": np.array([63], np.int32)}
    )
    assert not found[0].any()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scores_are_hidden_in_their_own_memory(dtype: str) -> None:
    """ONNX Runtime writes a result into an input only where the graph names the same sizes for both."""
    folder = engines.engine_dir("llama3", **W8A8, kv_cache_dtype=dtype)
    operator, writes = ("ScatterElements", 1) if dtype == "float32" else ("TensorScatter", 2)
    graphs, checked = [onnx.load(folder / "step.onnx", load_external_data=False).graph], 0
    for graph in graphs:
        graphs += [entry.g for node in graph.node for entry in node.attribute if entry.HasField("g")]
        sizes = {
            value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in graph.value_info
        }
        for node in graph.node:
            if node.op_type == operator and not node.input[0].startswith("past_"):
                assert all(sizes[node.input[0]]) and sizes[node.input[0]] == sizes[node.output[0]]
                checked += 1
    assert checked == writes * 3 * 4, "three layers with four query heads"


@pytest.mark.parametrize(
    ("checkpoint", "settings"),
    [
        (engines.checkpoint_dir("llama3"), None),
        (engines.checkpoint_dir("qwen3"), None),  # norms of queries and keys
        (engines.checkpoint_dir("phi3"), None),  # rotated outside the attention
        (class_engines.checkpoint(), class_engines.settings_of(**class_engines.CLASSES)),
        (class_engines.checkpoint(), class_engines.settings_of(budget_split="ranked")),
    ],
    ids=["llama3", "qwen3", "phi3", "classes", "ranked"],
)
def test_long_blocks_fill_the_cache_as_short_ones_do(
    checkpoint: Path, settings: ChunkKVSettings | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused_step._LONG_CACHES, "float32", 128)  # these models have few positions
    opened = HuggingFaceCheckpoint.open(checkpoint)
    locations = write_weights(tmp_path / "weights.safetensors", step_weights(opened, "w8a8", 512))
    model = fused_step.FusedStepGraph(make_plan(opened.config, settings), locations).build()
    onnx.save_model(model, tmp_path / "step.onnx")
    step = OnnxRuntimeStep(tmp_path / "step.onnx", settings, threads=1)
    ids = np.random.default_rng(5).integers(3, step.vocab_size, 400)
    logits, caches = [], []
    for block in (32, 100):  # blocks of 32 never take it
        cache = step.new_cache(1, len(ids))
        for first in range(0, len(ids), block):
            last, _ = step.append_prompt_block(cache, ids[first : first + block], first)
        logits.append(last)
        caches.append((*cache.keys, *cache.values))
    assert not np.array_equal(logits[0], logits[1])
    assert np.sqrt(((logits[0] - logits[1]) ** 2).mean()) < 0.1 * logits[0].std()
    for first, second in zip(*caches, strict=True):
        assert np.sqrt(((first - second) ** 2).mean()) < 0.1 * first.std()


@pytest.mark.parametrize("variant", ["llama3", "qwen3", "phi3"])
def test_long_blocks_over_a_cache_of_8_bits_fill_it_as_short_ones_do(
    variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(fused_step._LONG_CACHES, "int8", 128)
    flags = {**W8A8, "kv_cache_dtype": "int8", "max_seq_len": 400, "max_num_tokens": 128, "overwrite": True}
    named = {"checkpoint_dir": engines.checkpoint_dir(variant), "output_dir": tmp_path / "engine", **flags}
    build_engine.main(engines.command_line({**named, "log_level": "error"}))
    step = OnnxRuntimeStep(tmp_path / "engine" / "step.onnx", None, threads=1)
    ids = np.random.default_rng(5).integers(3, step.vocab_size, 400)
    caches = []
    for block in (32, 100):  # blocks of 32 never take it
        cache = step.new_cache(1, len(ids))
        for first in range(0, len(ids), block):
            step.append_prompt_block(cache, ids[first : first + block], first)
        caches.append([array.astype(np.float32) for array in (*cache.keys, *cache.values)])
    assert any(not np.array_equal(first, second) for first, second in zip(*caches, strict=True))
    for first, second in zip(*caches, strict=True):
        assert np.sqrt(((first - second) ** 2).mean()) < 0.1 * first.std()


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_processors_whose_sums_overflow_do_not_take_it(
    cache_dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(fused_step._LONG_CACHES, cache_dtype, 128)
    flags = {**W8A8, "kv_cache_dtype": cache_dtype, "max_seq_len": 400, "max_num_tokens": 128, "overwrite": True}
    named = {"checkpoint_dir": engines.checkpoint_dir("llama3"), "output_dir": tmp_path / "engine", **flags}
    build_engine.main(engines.command_line({**named, "log_level": "error"}))
    found = []
    for overflows, block in ((False, 100), (True, 100), (True, 32)):
        monkeypatch.setattr(graphs, "products_overflow", lambda overflows=overflows: overflows)
        step = OnnxRuntimeStep(tmp_path / "engine" / "step.onnx", None, threads=1)
        ids, cache = np.random.default_rng(5).integers(3, step.vocab_size, 400), step.new_cache(1, 400)
        for first in range(0, len(ids), block):
            logits, _ = step.append_prompt_block(cache, ids[first : first + block], first)
        found.append(logits)
    long, never, short = found
    assert np.abs(never - short).max() < 1e-4 * short.std() < np.abs(long - short).max()


def test_only_engines_of_whole_numbers_have_it() -> None:
    for flags, has_it in ((W8A8, True), ({}, False), ({**W8A8, "weight_only_precision": "int4"}, False)):
        model = onnx.load(engines.engine_dir("llama3", **flags) / "step.onnx", load_external_data=False)
        assert any(node.name.endswith("/either") for node in model.graph.node) is has_it
    soft_capped = onnx.load(engines.engine_dir("gemma2", **W8A8) / "step.onnx", load_external_data=False)
    assert not any(node.name.endswith("/either") for node in soft_capped.graph.node)


def test_graphs_with_other_lengths_are_derived_from_such_engines() -> None:
    executor = engines.session("llama3", **W8A8).executor
    assert isinstance(executor, OnnxRuntimeExecutor)
    ids = np.arange(3, 11)
    cache, other = executor.new_cache(1, 16), executor.new_cache(1, 16)
    expected_logits = executor.score_block(cache, ids, 0, 0)
    layers = len(executor.step.layout.parts)
    uneven = executor.layer_lengths_decoder(other)
    for place, token in enumerate(ids):
        last = uneven.step([0], [int(token)], [place], np.full((layers, 1), place))
    assert np.allclose(last[0], expected_logits[-1], atol=1e-4)
    empty = [
        [np.zeros((0, executor.step.head_dim), np.float32)] * executor.step.num_kv_heads
    ] * executor.step.num_layers
    assert np.allclose(executor.head_scorer().score_block(empty, empty, ids, 0), expected_logits, atol=1e-4)
