"""The graphs of an engine, run directly: compress on ragged batches against the reference, two step graphs alike."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from support import engines, graphs, onnx_op, op_properties
from support.checkpoints import VARIANTS
from support.messages import naming
from support.op_cases import OpCase

from chunkkv import SamplingParams, reference_layers
from chunkkv.errors import EngineRunError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
from chunkkv.session import ChunkKVSession
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.transformer import StepGraph

TOLERANCE = 1e-4
LENGTHS = (61, 7, 40, 23, 10)
RATIOS = (4_000, 10_000, 2_500, 1, 9_000)
BUDGETS = (0, 0, 13, 17, 0)
SPARE = 3  # slots of the kept caches beyond the largest N
# The checks that leave alone what an engine fixes: window, chunk size, score, pooling.
CHECKS = (
    op_properties.check_exact_budget,
    op_properties.check_chunks,
    op_properties.check_keep_everything,
    op_properties.check_two_runs,
    op_properties.check_permuted_batch,
    op_properties.check_padding_contents,
    op_properties.check_row_alone,
    op_properties.check_growing_budget,
    op_properties.check_matches_reference,
)


def small_session(boundaries: str = "fixed", **flags) -> ChunkKVSession:
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries=boundaries, **flags)


def case_of(session: ChunkKVSession, name: str = "compress graph", **changes) -> OpCase:
    model = session.executor.step
    heads = {"heads": 4, "kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    budgets = {"keep_per_10k": RATIOS, "budget_tokens": BUDGETS}
    return OpCase(name, session.settings, LENGTHS, extra_padding=5, **heads, **{**budgets, **changes})


def ids_with(flags: np.ndarray | None, session: ChunkKVSession, shape: tuple[int, int]) -> np.ndarray:
    """Return token ids [B,S] that the engine takes for delimiters exactly where `flags` says so."""
    table = graphs.delimiter_table(session)
    if table is None or flags is None:
        return np.full(shape, 5, np.int64)
    return np.where(flags, table.argmax(), table.argmin())


def compress_feeds(
    session: ChunkKVSession, named: dict, queries: dict, keys: list, values: list, capacity: int
) -> dict[str, np.ndarray]:
    """Return the inputs of compress.onnx from those of the op, per leader and layer."""
    ids = ids_with(named.get("is_delimiter"), session, keys[0].shape[::2])
    row_inputs = {name: named[name] for name in ("lengths", "keep_per_10k", "budget_tokens", "window")}
    everything = {"input_ids": ids, **row_inputs, "capacity": np.array([capacity], np.int64)}
    everything.update({f"query.{leader}": query for leader, query in queries.items()})
    everything.update({f"key.{layer}": key for layer, key in enumerate(keys)})
    everything.update({f"value.{layer}": value for layer, value in enumerate(values)})
    wanted = {value.name for value in session.executor.compress.session.get_inputs()}
    return {name: array for name, array in everything.items() if name in wanted}


def run_compress(session: ChunkKVSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    graph = session.executor.compress.session
    return dict(zip((value.name for value in graph.get_outputs()), graph.run(None, inputs), strict=True))


def select_of(session: ChunkKVSession) -> Callable:
    """compress.onnx with the signature of reference.select_batch: every leader gets the same query and key."""

    def select(query, key, lengths, settings, **optional):
        named = onnx_op.feeds(query, key, lengths, settings, **optional)
        leaders, layers = session.executor.step.query_heads, range(session.executor.step.num_layers)
        keys = [named["key"]] * len(layers)
        inputs = compress_feeds(session, named, dict.fromkeys(leaders, named["query"]), keys, keys, key.shape[2])
        found = run_compress(session, inputs)
        first, *others = leaders
        for other in others:
            assert np.array_equal(found[f"kept_indices.{other}"], found[f"kept_indices.{first}"])
        return found[f"kept_indices.{first}"], found["kept_lengths"][0], found[f"token_scores.{first}"]

    return select


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_compress_graph_keeps_the_contract_on_ragged_batches(boundaries: str, check: op_properties.Check) -> None:
    session = small_session(boundaries)
    excused = check(select_of(session), case_of(session))
    if excused:
        warnings.warn(f"{excused} rows differ from the reference only in chunks near the cut", stacklevel=1)


@pytest.mark.parametrize("pooling", [1, 5])
@pytest.mark.parametrize("leader", ["first", "last"])
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_each_layer_keeps_its_leaders_rows_with_unchanged_bytes(boundaries: str, leader: str, pooling: int) -> None:
    session = small_session(boundaries, chunkkv_leader=leader, chunkkv_pooling=pooling)
    settings, layers = session.settings, range(session.executor.step.num_layers)
    calls = [case_of(session, f"layer {layer}").inputs() for layer in layers]
    flags, lengths = calls[0].is_delimiter, calls[0].lengths
    raw = np.random.default_rng(0).integers(0, 2**32, (*calls[0].key.shape, len(layers)), np.uint32)
    values = [np.ascontiguousarray(raw[..., layer]).view(np.float32) for layer in layers]  # NaN payloads included
    keys = [call.key for call in calls]
    for row, length in enumerate(lengths):
        for key, content in zip(keys, (np.nan, -3.0e38, np.inf), strict=True):
            key[row, :, length:] = content
    queries = {settings.leader_of(group): calls[settings.leader_of(group)].query for group in settings.layer_groups}
    named = onnx_op.feeds(calls[0].query, keys[0], lengths, settings, **calls[0].optional())
    expected = reference_layers.select_layers(queries, keys, lengths, settings, **calls[0].optional())
    capacity = int(expected[0].kept_lengths.max()) + SPARE
    found = run_compress(session, compress_feeds(session, named, queries, keys, values, capacity))
    assert (found["kept_lengths"] == expected[0].kept_lengths[None]).all()
    for group in settings.layer_groups:
        indices = found[f"kept_indices.{settings.leader_of(group)}"]
        assert np.array_equal(indices, expected[group[0]].kept_indices)
        for layer in group:
            for kind, full in (("key", keys[layer]), ("value", values[layer])):
                compacted = found[f"kept_{kind}.{layer}"]
                assert compacted.shape[2] == capacity
                for row, kept in enumerate(op_properties.kept_sets(indices, found["kept_lengths"][0])):
                    assert compacted[row, :, : len(kept)].tobytes() == full[row][:, kept].tobytes()
    if flags is not None:
        assert flags.any() and not flags.all()


@pytest.fixture(scope="module", params=["llama3", "qwen3", "llama_bias"])
def executors(request) -> tuple[OnnxRuntimeExecutor, OnnxRuntimeExecutor]:
    session = engines.session(request.param, chunkkv_layer_reuse=2)
    return session.executor, graphs.standard_executor(request.param, session)


def random_cache(executor: OnnxRuntimeExecutor, rows: int, capacity: int, seed: int) -> HostKVCache:
    rng = np.random.default_rng(seed)
    cache = executor.new_cache(rows, capacity)
    for array in (*cache.keys, *cache.values):
        array[...] = rng.standard_normal(array.shape)
    return cache


def assert_same_cache(first: HostKVCache, second: HostKVCache, filled: list[int]) -> None:
    for one, other in zip((*first.keys, *first.values), (*second.keys, *second.values), strict=True):
        for row, count in enumerate(filled):
            assert np.abs(one[row, :, :count] - other[row, :, :count]).max() <= TOLERANCE


@pytest.mark.parametrize("sizes", [(31,), (16, 15), (1, 29, 1)])
def test_prefill_blocks_agree_between_both_attentions(executors, sizes: tuple[int, ...]) -> None:
    fused, standard = executors
    ids = np.random.default_rng(1).integers(3, 300, sum(sizes))
    caches = [executor.new_cache(1, 40) for executor in executors]
    filled = 0
    for size in sizes:
        block = ids[filled : filled + size]
        (logits, queries), (other_logits, other_queries) = (
            executor.step.append_prompt_block(cache, block, filled)
            for executor, cache in zip(executors, caches, strict=True)
        )
        filled += size
        assert np.abs(logits - other_logits).max() <= TOLERANCE
        assert queries.keys() == other_queries.keys() and queries
        assert all(np.abs(queries[leader] - other_queries[leader]).max() <= TOLERANCE for leader in queries)
    assert_same_cache(*caches, [filled])
    assert fused.kv_bytes_per_token == standard.kv_bytes_per_token


def test_ragged_decode_agrees_between_both_attentions(executors) -> None:
    """Slots differ from row to row, and positions from slots, as after compression."""
    slots, positions = np.array([20, 3, 11]), np.array([90, 3, 40])
    caches = [random_cache(executor, 3, 24, seed=2) for executor in executors]
    decoders = [executor.decoder(cache) for executor, cache in zip(executors, caches, strict=True)]
    for step in range(3):
        inputs = range(3), [7, 200, 31 + step], positions + step, slots + step
        logits, other = (decoder.step(*inputs) for decoder in decoders)
        assert np.abs(logits - other).max() <= TOLERANCE
    assert_same_cache(*caches, (slots + 3).tolist())


def test_a_step_leaves_idle_rows_alone_but_for_their_first_slot(executors) -> None:
    for executor in executors:
        cache, alone = (random_cache(executor, 3, 24, seed=2) for _ in range(2))
        before = [array.copy() for array in (*cache.keys, *cache.values)]
        logits = executor.decoder(cache).step([2, 0], [31, 7], [40, 90], [11, 20])
        for row, token, position, slot, row_logits in zip([2, 0], [31, 7], [40, 90], [11, 20], logits, strict=True):
            own = executor.decoder(alone.rows(row, 1)).step([0], [token], [position], [slot])
            assert np.abs(own[0] - row_logits).max() <= TOLERANCE
        for array, old in zip((*cache.keys, *cache.values), before, strict=True):
            assert np.array_equal(array[1, :, 1:], old[1, :, 1:])
            for row, slot in ((0, 20), (2, 11)):
                assert np.array_equal(np.delete(array[row], slot, axis=1), np.delete(old[row], slot, axis=1))
                assert not np.array_equal(array[row, :, slot], old[row, :, slot])


def test_a_step_keeps_the_logits_of_earlier_steps(executors) -> None:
    executor, _ = executors
    decoder = executor.decoder(random_cache(executor, 2, 24, seed=2))
    first = decoder.step([0, 1], [7, 200], [20, 3], [20, 3])
    copy = first.copy()
    decoder.step([0, 1], [9, 9], [21, 4], [21, 4])
    assert np.array_equal(first, copy)


def test_a_slot_behind_the_cache_is_refused(executors) -> None:
    for executor in executors:
        decoder = executor.decoder(executor.new_cache(2, 24))
        with pytest.raises(EngineRunError, match=naming("row 1 slot 24")):
            decoder.step([0, 1], [7, 7], [30, 30], [23, 24])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_answers_agree_between_both_attentions(variant: str) -> None:
    session = engines.session(variant, chunkkv_layer_reuse=2)
    other = ChunkKVSession(
        graphs.standard_executor(variant, session), session.settings, session.limits, session.tokenizer
    )
    prompts = [np.random.default_rng([3, length]).integers(3, 300, length) for length in (61, 9)]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=True)
    for one, two in zip(session.generate(prompts, params), other.generate(prompts, params), strict=True):
        assert one.token_ids == two.token_ids
        assert np.abs(np.array(one.logprobs) - np.array(two.logprobs)).max() <= TOLERANCE


def test_standard_attention_needs_no_operator_beyond_onnx() -> None:
    session = small_session()
    _, locations = graphs.weights_of("llama3")
    model = StepGraph(graphs.plan_of("llama3", session), locations).build()
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_compress_nodes_carry_all_settings_and_the_plugins_name(boundaries: str) -> None:
    directory = engines.engine_dir("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries=boundaries)
    onnx.checker.check_model(str(directory / "compress.onnx"), full_check=True)
    model = onnx.load(directory / "compress.onnx")
    nodes = [node for node in model.graph.node if node.domain == functions.DOMAIN]
    assert sorted({node.op_type for node in nodes}) == [functions.COMPACT, functions.SELECT]
    assert [node.op_type for node in nodes].count(functions.SELECT) == 1
    settings = small_session(boundaries).settings
    together = replace(settings.with_score("given"), heads="each")  # one node chooses for both groups, a head for each
    for node in nodes:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given = {name: value.decode() if isinstance(value, bytes) else value for name, value in given.items()}
        assert given.pop("plugin_version") == "1" and given.pop("plugin_namespace") == "chunkkv"
        expected = together.to_dict() if node.op_type == functions.SELECT else {}
        assert given == {name: expected[name] for name in given}
        assert len(given) == (8 if node.op_type == functions.SELECT else 0)
    assert {(function.domain, function.name) for function in model.functions} == {
        (functions.DOMAIN, functions.SELECT),
        (functions.DOMAIN, functions.COMPACT),
    }


@pytest.mark.parametrize(("keep_ratio", "pieces"), [(0.4, 6), (1.0, 5)])
def test_a_prefill_goes_on_by_a_block_per_step_beside_another_one(keep_ratio: float, pieces: int) -> None:
    """Five blocks of 16 tokens, and compression as a piece of its own; between them another prompt is prefilled."""
    session = engines.session("llama3")
    prompts = [np.random.default_rng(seed).integers(3, 384, length).tolist() for seed, length in ((1, 70), (2, 40))]
    requests = session.requests(prompts, SamplingParams(max_new_tokens=1), keep_ratio)
    caches = [session.executor.new_cache(1, request.kept_tokens) for request in requests]
    alone = [
        session.executor.prefiller().run([request], cache, threading.Event())[0].logits
        for request, cache in zip(requests, caches, strict=True)
    ]
    first, second = (
        session.executor.prefiller().start([request], cache) for request, cache in zip(requests, caches, strict=True)
    )
    assert first.tokens_left == 70
    assert first.step() is None and first.tokens_left == 54
    while (other := second.step()) is None:
        pass
    made = [first.step() for _ in range(pieces - 1)]
    assert made[:-1] == [None] * (pieces - 2) and first.tokens_left == 0
    np.testing.assert_array_equal(made[-1][0].logits, alone[0])
    np.testing.assert_array_equal(other[0].logits, alone[1])
