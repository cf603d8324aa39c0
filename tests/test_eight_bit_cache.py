"""A KV cache in int8: what its numbers mean, who reads them, and that nothing but the scales stands between."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support import engines

from chunkkv import SamplingParams, reference
from chunkkv.cache_scales import CacheScales
from chunkkv.errors import BackendUnavailableError, EngineMismatchError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.rereading import Piece
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder.backends.calibration import TOKENS, calibration_prompts
from chunkkv_builder.onnx_graph import functions

FLAGS: dict[str, Any] = {"kv_cache_dtype": "int8"}
IDS = np.array([(7 * i) % 380 + 3 for i in range(61)], np.int64)


def filled(session: ChunkKVSession, ids: np.ndarray = IDS, spare: int = 0) -> tuple[HostKVCache, np.ndarray, Any]:
    """Return the whole cache of a prompt, the logits behind it and the window's queries."""
    prefiller = session.executor.blockwise_prefiller()
    cache = prefiller.new_cache(1, len(ids) + spare)
    logits, queries = prefiller.fill(ids, cache, threading.Event())
    assert logits is not None
    return cache, logits, queries


def both(cache: HostKVCache, part: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return keys and values of a part: in the cache, in float32, and their scales [H,1,D]."""
    assert cache.scales is not None
    keys = cache.keys[part], cache.float_keys(part), cache.scales.keys[part][:, None]
    return [keys, (cache.values[part], cache.float_values(part), cache.scales.values[part][:, None])]


@pytest.mark.parametrize("variant", ["llama3", "phi3", "gemma2"])
def test_a_prompt_s_cache_is_that_of_float32_within_half_a_step(variant: str) -> None:
    exact, eight = filled(engines.session(variant))[0], filled(engines.session(variant, **FLAGS))[0]
    assert eight.keys[0].dtype == np.int8
    # The inputs of later layers differ already.
    for (whole, floats, scales), expected in zip(both(eight, 0), (exact.keys[0], exact.values[0]), strict=True):
        inside = np.abs(expected) <= 127 * scales
        assert inside.mean() > 0.999
        assert (np.abs(floats - expected) / scales)[inside].max() < 0.5001
        assert np.abs(whole[~inside].astype(np.int32)).min(initial=127) >= 127, "what lies beyond is cut off"


@pytest.mark.parametrize("variant", ["llama3", "qwen3", "smollm3", "granite"])
def test_tokens_one_by_one_leave_the_cache_that_blocks_leave(variant: str) -> None:
    executor = engines.session(variant, **FLAGS).executor
    blocks, logits, _ = filled(engines.session(variant, **FLAGS))
    singly = executor.new_cache(1, len(IDS))
    decoder = executor.decoder(singly)
    for place, token in enumerate(IDS):
        last = decoder.step([0], [int(token)], [place], [place])
    for part in range(len(blocks.keys)):
        for one, two in ((blocks.keys, singly.keys), (blocks.values, singly.values)):
            apart = np.abs(one[part].astype(np.int32) - two[part])
            assert apart.max() <= 1 and apart.mean() < 0.01, "sums in another order may round to the neighbour"
    np.testing.assert_allclose(last[0], logits, atol=0.1)


@pytest.mark.parametrize(
    "flags",
    [{}, {"chunkkv_value_norm": "on"}, {"chunkkv_score": "logits"}, {"chunkkv_heads": "each"}],
    ids=["softmax", "values", "logits", "each"],
)
def test_what_is_kept_is_what_the_reference_keeps_of_the_same_keys(flags: dict[str, Any]) -> None:
    session = engines.session("llama3", **FLAGS, **flags)
    settings = session.settings
    assert settings is not None
    full, _, queries = filled(session)
    prefiller = session.executor.blockwise_prefiller()
    out = prefiller.new_cache(1, 24)
    choice = prefiller.compress(full, queries, IDS, 0, 24, out)
    assert sorted(choice.kept_indices) == sorted(queries)
    for part, kept in choice.kept_indices.items():
        heads = [[head] for head in range(full.keys[part].shape[1])] if settings.heads == "each" else [slice(None)]
        for row, members in enumerate(heads):
            group = queries[part].shape[1] // full.keys[part].shape[1]
            asked = queries[part][0].reshape(-1, group, *queries[part].shape[2:])[members]
            values = full.float_values(part)[0][members] if settings.value_norm == "on" else None
            scores = reference.token_scores(
                asked.reshape(-1, *asked.shape[2:]),
                full.float_keys(part)[0][members],
                settings.window,
                settings.pooling,
                settings.score,
                value=values,
                window_reduce=settings.window_reduce,
                head_reduce=settings.head_reduce,
            )
            expected = reference.select_tokens(scores, len(IDS), 24, settings)
            assert np.array_equal(kept[row] if settings.heads == "each" else kept, expected)


@pytest.mark.parametrize(
    ("flags", "file"),
    [({}, "compress.onnx"), ({}, "compress_given.onnx"), ({"chunkkv_value_norm": "on"}, "compress.onnx")],
    ids=["attention", "given", "values"],
)
def test_whole_caches_are_not_made_float32_to_be_compressed(flags: dict[str, Any], file: str) -> None:
    """Scales are multiplied with the few queries; only norms of values need the values themselves."""
    nodes = onnx.load(engines.engine_dir("llama3", **FLAGS, **flags) / file).graph.node

    def read_by(value: str) -> set[str]:
        return {node.op_type for node in nodes if value in node.input} - {"Shape"}

    def floats(cache: str) -> list[set[str]]:
        return [read_by(node.output[0]) for node in nodes if node.op_type == "Cast" and cache in node.input]

    scores = {"Cast"} if file == "compress.onnx" else set()
    assert read_by("key.0") == {functions.COMPACT} | scores
    assert floats("key.0") == [{"Transpose"}] * len(scores)  # a product reads them as they are
    assert read_by("value.0") == {functions.COMPACT} | ({"Cast"} if flags else set())
    assert floats("value.0") == [{"Mul"}] * len(flags)


def test_a_second_reading_scores_what_the_keys_mean() -> None:
    session = engines.session("llama3", **FLAGS)
    assert session.settings is not None
    sinks, length = session.settings.sinks, 40
    cache, *_ = filled(session, IDS[:length], spare=16)
    reread = session.executor.reread()  # type: ignore[attr-defined]
    piece = Piece(5, 33, IDS[50:60])
    scores = reread.no_scores(length)
    assert list(reread.read(cache, length, [piece], scores)) == [10]
    queries = session.executor.step.append_block(  # type: ignore[attr-defined]
        cache, piece.ids, length, length, query_count=10
    )[1]
    for part, query in queries.items():
        keys = cache.float_keys(part)[0]
        seen = np.concatenate([keys[:, :sinks], keys[:, 5:33], keys[:, length : length + 10]], axis=1)
        logits = query[0].reshape(len(keys), -1, 10, keys.shape[2]) @ seen[:, None].swapaxes(2, 3)
        logits /= np.sqrt(keys.shape[2])
        hidden = np.arange(seen.shape[1]) > sinks + 28 + np.arange(10)[:, None]
        weights = np.exp(np.where(hidden, -np.inf, logits) - logits.max())
        weights /= weights.sum(axis=-1, keepdims=True)
        received = weights.max(axis=(1, 2))[:, sinks : sinks + 28]
        np.testing.assert_allclose(scores[part][:, 5:33], received, rtol=1e-3, atol=1e-6)


def test_rows_of_unequal_lengths_answer_as_they_do_alone() -> None:
    session = engines.session("qwen3", **FLAGS)
    greedy = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [IDS, IDS[:33], IDS[5:50]]
    together = session.generate(prompts, greedy, keep_ratio=0.5)
    for prompt, answer in zip(prompts, together, strict=True):
        assert session.generate(prompt, greedy, keep_ratio=0.5).token_ids == answer.token_ids


def test_layers_may_fill_unequal_numbers_of_slots() -> None:
    executor = engines.session("llama3", **FLAGS).executor
    cache, *_ = filled(engines.session("llama3", **FLAGS), spare=1)
    layers = len(cache.keys)
    same = executor.layer_lengths_decoder(cache).step([0], [9], [61], np.full((layers, 1), 61))
    expected = executor.decoder(cache).step([0], [9], [61], [61])
    assert np.array_equal(same, expected)
    fewer = np.array([[61], [20], [61]][:layers])
    assert np.abs(executor.layer_lengths_decoder(cache).step([0], [9], [61], fewer) - expected).max() > 1e-3


def test_heads_of_unequal_lengths_are_refused() -> None:
    executor = engines.session("llama3", **FLAGS).executor
    assert not executor.capabilities.head_lengths
    with pytest.raises(BackendUnavailableError, match="hold another number of tokens in every head"):
        executor.head_scorer()


@pytest.mark.parametrize("variant", ["llama3", "smollm3"])
def test_scales_reach_a_quarter_beyond_the_calibration(variant: str) -> None:
    eight, exact = engines.session(variant, **FLAGS), engines.session(variant)
    scales = eight.executor.new_cache(1, 1).scales
    assert scales is not None and exact.tokenizer is not None
    prompts = calibration_prompts(exact.tokenizer, exact.limits.vocab_size, exact.limits.max_seq_len)
    caches = [filled(exact, ids)[0] for ids in prompts]
    for part in range(len(caches[0].keys)):
        values = np.max([np.abs(cache.values[part][0]).max(axis=1) for cache in caches], axis=0)
        np.testing.assert_allclose(scales.values[part] * 127, 1.25 * values, rtol=1e-3)
        keys = np.max([np.abs(cache.keys[part][0]).max(axis=1) for cache in caches], axis=0)
        assert (scales.keys[part] * 127 > 1.2499 * keys).all()
        half = keys.shape[1] // 2
        is_rotated = variant == "llama3" or part != 1  # the middle layer of this small SmolLM3 is not
        assert np.array_equal(scales.keys[part][:, :half], scales.keys[part][:, half:]) == is_rotated


def test_what_is_calibrated_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(engines.engine_dir("llama3"))
    random, text = calibration_prompts(tokenizer, 400, 4096)
    assert len(random) == len(text) == TOKENS and len(np.unique(random)) > 250
    assert tokenizer.decode(text).startswith("To the Senate")
    assert [len(ids) for ids in calibration_prompts(None, 400, 100)] == [100]


def test_scales_survive_as_text() -> None:
    rng = np.random.default_rng(0)
    keys, values = ([rng.uniform(0, 9, (heads, 8)) for heads in (1, 3)] for _ in range(2))
    keys[0][0, 0] = 0
    scales = CacheScales.for_largest(keys, values)
    assert (scales.keys[0] > 0).all(), "a channel that was 0 can be divided by its scale"
    again = CacheScales.from_text(scales.to_text(), (1, 3), 8)
    for one, two in ((scales.keys, again.keys), (scales.values, again.values)):
        assert all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="64 scales, expected 80"):
        CacheScales.from_text(scales.to_text(), (1, 4), 8)


def test_an_earlier_onnx_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = engines.engine_dir("llama3", **FLAGS)
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(EngineMismatchError, match=r"int8, which onnxruntime 1\.26\.0 cannot read: install 1\.27"):
        ChunkKVSession.from_dir(folder)
    ChunkKVSession.from_dir(engines.engine_dir("llama3"))
