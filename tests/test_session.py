"""The runtime: batches, streams, budgets, statistics, cancelling, and errors before any work."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import engines
from support.checkpoints import random_tensors, write_checkpoint, write_tensors
from support.messages import naming

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.errors import EngineMismatchError, EngineRunError, RequestError
from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefiller
from chunkkv.executors.onnxruntime.prompt_blocks import block_sizes, text_blocks
from chunkkv.sampling import Sampler, TokenChoice
from chunkkv_builder import build as build_engine

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


@pytest.fixture(scope="module")
def session():
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


@pytest.fixture(scope="module")
def plain_session():
    return engines.session("llama3", chunkkv=False)


@given(length=st.integers(1, 400), window=st.integers(1, 16), extra=st.integers(0, 30))
def test_blocks_cover_the_prompt_and_the_last_holds_the_window(length: int, window: int, extra: int) -> None:
    block = window + extra
    sizes = block_sizes(length, block, window)
    assert sum(sizes) == length
    assert all(0 < size <= block for size in sizes)
    assert sizes[-1] >= min(window, length)
    assert len(sizes) == -(-length // block)


@given(length=st.integers(1, 400), window=st.integers(0, 16), extra=st.integers(1, 30))
def test_a_long_prompt_may_end_with_a_block_of_its_window_alone(length: int, window: int, extra: int) -> None:
    block, end = window + extra, max(window, 1)
    blocks = text_blocks(length, block, window, has_graph=True)
    sizes = [one.stop - one.start for one in blocks]
    assert sum(sizes) == length == blocks[-1].stop
    assert all(0 < size <= block for size in sizes)
    if length < end + 64:
        assert sizes == block_sizes(length, block, window) and all(one.needs_logits for one in blocks)
        assert [one.is_last for one in blocks] == [False] * (len(blocks) - 1) + [True]
    else:
        assert sizes[-1] == end and len(sizes) == 1 - (end - length) // block
        assert [one.needs_logits for one in blocks] == [False] * (len(blocks) - 1) + [True]
        assert [one.is_last for one in blocks] == [False] * (len(blocks) - 2) + [True, True]


def test_rows_of_a_ragged_batch_equal_their_own_runs(session) -> None:
    prompts = [prompt(61), prompt(7), prompt(40), prompt(23)]
    batch = session.generate(prompts, GREEDY, keep_ratio=[0.4, None, 1.0, 0.6])
    for ids, ratio, together in zip(prompts, [0.4, None, 1.0, 0.6], batch, strict=True):
        alone = session.generate(ids, GREEDY, keep_ratio=ratio)
        assert together.token_ids == alone.token_ids
        assert together.statistics.kept_tokens == alone.statistics.kept_tokens


@pytest.mark.parametrize("block", [4, 5, 16, 256])
def test_block_size_changes_nothing(block: int) -> None:
    ids = prompt(61)
    expected = engines.session("qwen3", max_num_tokens=64).generate(ids, GREEDY)
    assert engines.session("qwen3", max_num_tokens=block).generate(ids, GREEDY).token_ids == expected.token_ids


def test_keep_ratio_one_equals_an_engine_without_chunkkv_bit_for_bit(session, plain_session) -> None:
    params = dataclasses.replace(GREEDY, logprobs=True)
    for length in (61, 10, 3):
        kept = session.generate(prompt(length), params, keep_ratio=1.0)
        plain = plain_session.generate(prompt(length), params)
        assert kept.token_ids == plain.token_ids
        assert kept.logprobs == plain.logprobs


def test_compression_changes_the_cache_and_the_statistics_say_so(session) -> None:
    result = session.generate(prompt(100), GREEDY)
    stats = result.statistics
    assert (stats.prompt_tokens, stats.kept_tokens, stats.new_tokens) == (100, 40, 12)
    per_token = stats.full_cache_bytes // 100
    assert per_token == 2 * 3 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
    assert stats.cache_bytes == 40 * per_token
    assert stats.allocated_cache_bytes == 52 * per_token
    assert stats.peak_cache_bytes == (100 + 52) * per_token
    whole = session.generate(prompt(100), GREEDY, keep_ratio=1.0).statistics
    assert whole.peak_cache_bytes == whole.allocated_cache_bytes == 112 * per_token
    assert 0 < stats.compress_s < stats.ttft_s and 0 < stats.prefill_s < stats.ttft_s and stats.tpot_s > 0


def test_a_row_counts_the_room_of_its_whole_batch(session) -> None:
    long, short = (r.statistics for r in session.generate([prompt(100), prompt(8)], GREEDY))
    per_token = long.full_cache_bytes // 100
    assert long.allocated_cache_bytes == short.allocated_cache_bytes == (40 + 12) * per_token


def test_the_whole_prompts_cache_is_given_back_before_decode(session, monkeypatch) -> None:
    made: list[weakref.ref] = []
    new_cache = OnnxRuntimePrefiller.new_cache

    def recorded(self, rows, capacity):
        cache = new_cache(self, rows, capacity)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(OnnxRuntimePrefiller, "new_cache", recorded)
    gc.disable()  # a reference cycle would be found sooner or later, and until then hold the memory
    try:
        events = session.generate(prompt(200), SamplingParams(max_new_tokens=4), keep_ratio=0.5, stream=True)
        next(events)
        next(events)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": None}, "prompts NoneType"),
        ({"prompts": 5}, "prompts int"),
        ({"prompts": {"a": 1}}, "prompts dict"),
        ({"prompts": b"text"}, "prompts bytes"),
        ({"prompts": "ok", "sampling": 3}, "sampling int SamplingParams"),
        ({"prompts": "ok", "cancel": True}, "cancel bool threading.Event"),
        ({"prompts": "ok", "keep_ratio": np.array(2.0)}, "keep_ratio array(2.)"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(session, arguments: dict, named: str) -> None:
    with pytest.raises(RequestError, match=naming(named)):
        session.generate(**arguments)


def test_a_ratio_may_be_any_real_number(session) -> None:
    expected = session.generate(prompt(61), GREEDY, keep_ratio=0.5)
    assert session.generate(prompt(61), GREEDY, keep_ratio=np.float32(0.5)).token_ids == expected.token_ids


def test_budgets_per_request(session) -> None:
    ids = prompt(100)
    budgets = [None, 20, 10, 99]
    kept = [r.statistics.kept_tokens for r in session.generate([ids] * 4, GREEDY, budget_tokens=budgets)]
    assert kept == [40, 20, 10, 99]
    short = session.generate(prompt(8), GREEDY, keep_ratio=0.01)
    assert short.statistics.kept_tokens == 8


def test_stream_gives_the_same_answer_in_pieces(session) -> None:
    prompts = ["the key of the cache is in the token", "a token. "]
    whole = session.generate(prompts, GREEDY)
    events = list(session.generate(prompts, GREEDY, stream=True))
    for row, expected in enumerate(whole):
        mine = [event for event in events if event.row == row]
        assert "".join(event.text for event in mine) == expected.text
        assert tuple(token for event in mine for token in event.token_ids) == expected.token_ids
        assert [event.finished is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].finished.text == expected.text


def test_logprobs_are_those_of_the_chosen_tokens(session) -> None:
    params = dataclasses.replace(GREEDY, logprobs=True)
    result = session.generate(prompt(30), params)
    assert len(result.logprobs) == len(result.token_ids) and max(result.logprobs) <= 0
    assert session.generate(prompt(30), GREEDY).logprobs is None


def test_sampling_is_repeatable_alone_and_in_a_batch(session) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    alone = session.generate(prompt(30), params)
    batch = session.generate([prompt(61), prompt(30)], params)
    assert alone.token_ids == batch[1].token_ids
    assert alone.token_ids != session.generate(prompt(30), dataclasses.replace(params, seed=6)).token_ids


def test_stop_strings_end_the_answer_before_them(session) -> None:
    ids = prompt(40)
    text = session.generate(ids, GREEDY).text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    result = session.generate(ids, dataclasses.replace(GREEDY, stop=(stop,)))
    assert result.finish_reason == "stop"
    assert result.text == text[: text.index(stop)]


def test_end_token_stops_unless_ignored(session) -> None:
    ids = prompt(40)
    tokens = session.generate(ids, GREEDY).token_ids
    ended = type(session)(session.executor, session.settings, session.limits, session.tokenizer, [tokens[3]])
    first = tokens.index(tokens[3])
    result = ended.generate(ids, dataclasses.replace(GREEDY, ignore_eos=False))
    assert result.finish_reason == "stop" and result.token_ids == tokens[: first + 1]
    assert ended.generate(ids, GREEDY).token_ids == tokens


def test_cancel_stops_within_one_token(session) -> None:
    cancel = threading.Event()
    seen = []
    long = dataclasses.replace(GREEDY, max_new_tokens=200)
    for event in session.generate(prompt(40), long, stream=True, cancel=cancel):
        seen.append(event)
        if len(seen) == 3:
            cancel.set()
    assert seen[-1].finished.finish_reason == "cancelled"
    assert len(seen[-1].finished.token_ids) == 3


def test_cancel_before_and_during_prefill_does_no_decoding(session) -> None:
    cancel = threading.Event()
    cancel.set()
    results = session.generate([prompt(40), prompt(9)], GREEDY, cancel=cancel)
    assert [r.finish_reason for r in results] == ["cancelled"] * 2
    assert all(r.token_ids == () and r.text == "" for r in results)


def test_threads_may_share_a_session(session) -> None:
    prompts = [prompt(length) for length in (61, 40, 23, 90)]
    expected = [session.generate(ids, GREEDY).token_ids for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: session.generate(ids, GREEDY).token_ids, prompts * 5))
    assert found == expected * 5


def test_two_runs_give_the_same_bits(session) -> None:
    params = dataclasses.replace(GREEDY, logprobs=True)
    first, second = (session.generate(prompt(61), params) for _ in range(2))
    assert first.token_ids == second.token_ids and first.logprobs == second.logprobs


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ("", "prompt 0 empty"),
        ("   \n", "prompt 0 empty"),
        ([], "0 prompts"),
        ([[]], "prompt 0 empty"),
        (["ok", ""], "prompt 1 empty"),
        ([[5, 384]], "token 384 position 1 0 383"),
        ([[-1]], "token -1 position 0"),
        ([[1.5, 2.0]], "text list ids"),
        ([[1, [2]]], "text list ids"),
        ([None], "text list ids"),
        (["ok"] * 5, "5 prompts 1 4"),
        ([prompt(256)], "max_new_tokens 12 268"),
        ([prompt(300)], "300 tokens"),
        ("bad \ud800 text", "surrogate U+D800"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(session, monkeypatch, prompts, named: str) -> None:
    monkeypatch.setattr(session.executor, "new_cache", None)
    with pytest.raises(RequestError, match=naming(named)):
        session.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio 0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio 1.5"),
        ({"keep_ratio": "half"}, "keep_ratio 'half'"),
        ({"keep_ratio": [0.5, 0.5]}, "2 entries 1 prompts"),
        ({"budget_tokens": 0}, "budget_tokens 0"),
        ({"budget_tokens": 2.5}, "budget_tokens 2.5"),
        ({"keep_ratio": 0.5, "budget_tokens": 20}, "keep_ratio budget_tokens"),
    ],
)
def test_bad_budgets_are_refused_before_any_work(session, monkeypatch, options, named: str) -> None:
    monkeypatch.setattr(session.executor, "new_cache", None)
    with pytest.raises(RequestError, match=naming(named)):
        session.generate(prompt(40), GREEDY, **options)


def test_the_engine_limits_what_a_request_may_keep() -> None:
    limited = engines.session("llama3", chunkkv_max_keep_ratio=0.5)
    assert limited.generate(prompt(100), GREEDY, keep_ratio=0.5).statistics.kept_tokens == 50
    with pytest.raises(RequestError, match=naming("keep_ratio 0.6 60 100 50")):
        limited.generate(prompt(100), GREEDY, keep_ratio=0.6)
    with pytest.raises(RequestError, match=naming("budget_tokens 51 51")):
        limited.generate(prompt(100), GREEDY, budget_tokens=51)


def test_an_engine_without_chunkkv_refuses_a_budget(plain_session) -> None:
    with pytest.raises(EngineMismatchError, match=naming("without ChunkKV")):
        plain_session.generate(prompt(40), GREEDY, keep_ratio=0.5)
    with pytest.raises(EngineMismatchError, match=naming("--chunkkv")):
        plain_session.inspect(prompt(40))


def test_inspection_shows_what_generation_keeps(session) -> None:
    ids = prompt(61)
    found = session.inspect(ids, keep_ratio=0.4)
    assert found.token_ids == tuple(ids) and len(found.tokens) == 61 and found.kept_tokens == 24
    assert [group.layers for group in found.groups] == [(0, 1), (2,)]
    for group in found.groups:
        assert len(group.kept_indices) == 24 and len(group.token_scores) == 61
        assert group.leader == group.layers[-1]
        assert group.chunk_starts[0] == session.settings.sinks
    whole = session.inspect(ids, keep_ratio=1.0)
    assert all(len(group.kept_indices) == 61 for group in whole.groups)


@pytest.mark.parametrize("precision", ["int8", "int4", "w8a8"])
def test_weight_only_engines_run_and_stay_close(precision: str) -> None:
    params = dataclasses.replace(GREEDY, logprobs=True, max_new_tokens=1)
    exact = engines.session("llama3").generate(prompt(61), params)
    packed = engines.session("llama3", use_weight_only=True, weight_only_precision=precision)
    result = packed.generate(prompt(61), params)
    limit = {"int8": 0.2, "int4": 2.0, "w8a8": 0.5}[precision]  # random weights are the hardest case for quantisation
    assert abs(result.logprobs[0] - exact.logprobs[0]) < limit


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.uint8, np.int32, np.int64])
def test_numpys_integers_make_results_of_plain_numbers(session, kind: type) -> None:
    expected = session.generate(prompt(100), GREEDY, budget_tokens=99)
    result = session.generate(prompt(100), dataclasses.replace(GREEDY, max_new_tokens=kind(12)), budget_tokens=kind(99))
    assert result.token_ids == expected.token_ids
    assert result.statistics.cache_bytes == expected.statistics.cache_bytes
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["statistics"]["kept_tokens"] == 99


@pytest.fixture(scope="module")
def overflowing_session(tmp_path_factory):
    """An engine whose weights are finite, and whose hidden states are not."""
    folder = tmp_path_factory.mktemp("overflow")
    checkpoint = write_checkpoint(folder / "checkpoint", "llama3")
    tensors = random_tensors(json.loads((checkpoint / "config.json").read_text()))
    for name in ("gate", "up", "down"):
        tensors[f"model.layers.2.mlp.{name}_proj.weight"] *= np.float32(1e16)
    write_tensors(checkpoint, tensors)
    flags = {"checkpoint_dir": checkpoint, "output_dir": folder / "engine", "max_seq_len": 256, "log_level": "error"}
    build_engine.main(engines.command_line({**flags, **engines.SMALL_CHUNKKV, "chunkkv": True}))
    return ChunkKVSession.from_dir(folder / "engine", threads=1)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.7, seed=1)], ids=["greedy", "sampled"])
def test_overflow_in_the_model_is_an_error_at_the_first_token(overflowing_session, sampling) -> None:
    events = overflowing_session.generate(prompt(40), sampling, stream=True)
    with pytest.raises(EngineRunError, match=naming("logits 384 infinite NaN")):
        next(events)
    with pytest.raises(EngineRunError, match=naming("logits 384 infinite NaN")):
        overflowing_session.inspect(prompt(40))


@pytest.mark.parametrize("stop", ["<|pad|>", ["never", "<|pad|>"]], ids=str)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_special_token_as_stop_string_ends_the_answer(session, monkeypatch, stop, ignore_eos: bool) -> None:
    planned = [session.tokenizer.encode("the", False)[0], 2, 40, 41]
    steps = iter(planned)
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: TokenChoice(next(steps)))
    result = session.generate(prompt(20), SamplingParams(max_new_tokens=4, stop=stop, ignore_eos=ignore_eos))
    assert result.token_ids == tuple(planned[:2]) and result.finish_reason == "stop"
    assert result.text == session.tokenizer.decode(planned[:1])


def test_stop_tokens_end_the_answer_although_end_tokens_do_not(session) -> None:
    free = session.generate(prompt(61), GREEDY)
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    result = session.generate(prompt(61), dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    assert result.token_ids == free.token_ids[: first + 1] and result.finish_reason == "stop"


def test_messages_and_the_text_of_their_template_give_the_same_answer(session) -> None:
    talk = [{"role": "user", "content": "the key of the cache"}]
    text = session.tokenizer.apply_chat_template(talk)
    answers = [session.generate(talk, GREEDY), *session.generate([talk, text], GREEDY)]
    answers.append(session.generate(text, GREEDY, add_special_tokens=False))
    assert len({answer.token_ids for answer in answers}) == 1
    assert {answer.statistics.prompt_tokens for answer in answers} == {len(session.tokenizer.encode_chat(talk))}


def test_prefill_is_told_between_blocks(session) -> None:
    told: list[tuple[int, int]] = []
    session.generate([prompt(61), prompt(20)], GREEDY, on_prefill=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 81) and told[-1] == (81, 81) and (61, 81) in told
    assert told == sorted(told) and len(told) > 5
    told.clear()
    session.inspect(prompt(61), on_prefill=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 61) and told[-1] == (61, 61) and len(told) == 5
