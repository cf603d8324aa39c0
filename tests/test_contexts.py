"""Contexts: a prompt is compressed once and asked many times; what a context answers is what the whole prompt would."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import engines
from support.messages import naming

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.contexts import Context, context_of_row, longest_prefix
from chunkkv.errors import BackendUnavailableError, RequestError
from chunkkv.executors.interface import Capabilities

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
WITH_LOGPROBS = dataclasses.replace(GREEDY, logprobs=True)
TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 384, length).tolist()


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter")


@pytest.fixture(scope="module")
def plain_session() -> ChunkKVSession:
    return engines.session("llama3", chunkkv=False)


def forced_logits(session: ChunkKVSession, context: Context, tokens: list[int]) -> np.ndarray:
    """Return the logits behind each token of a text that is appended one by one with decode steps."""
    executor = session.executor
    cache = executor.new_cache(1, executor.capacity_for(context.kept_tokens + len(tokens)))
    executor.continuer().copy(context.cache, context.slots, cache)
    decoder, logits = executor.decoder(cache), []
    for done, token in enumerate(tokens):
        logits.append(decoder.step([0], [token], [len(context) + done], [context.kept_tokens + done])[0])
    return np.array(logits)


@pytest.mark.parametrize("question_length", [1, 7, 16, 17, 40])
def test_keep_ratio_one_equals_the_whole_prompt(session, plain_session, question_length: int) -> None:
    document, question = prompt(61), prompt(question_length, seed=1)
    context = session.compress(document, keep_ratio=1.0)
    behind = session.generate(question, WITH_LOGPROBS, context=context)
    for whole in (
        session.generate(document + question, WITH_LOGPROBS, keep_ratio=1.0),
        plain_session.generate(document + question, WITH_LOGPROBS),
    ):
        assert behind.token_ids == whole.token_ids
        np.testing.assert_allclose(behind.logprobs, whole.logprobs, atol=TOLERANCE)


def test_a_question_in_blocks_equals_one_token_at_a_time_behind_the_kept_tokens(session) -> None:
    context = session.compress(prompt(100), keep_ratio=0.3)
    assert (len(context), context.kept_tokens, context.slots) == (100, 30, (30,))
    question = prompt(37, seed=1)
    executor = session.executor
    cache = executor.new_cache(1, executor.capacity_for(30 + 37))
    continuer = executor.continuer()
    continuer.copy(context.cache, context.slots, cache)
    last = [
        continuer.append(cache, np.array(question[a:b]), [30 + a], 100 + a) for a, b in ((0, 16), (16, 32), (32, 37))
    ]
    expected = forced_logits(session, context, question)
    np.testing.assert_allclose(last, expected[[15, 31, 36]], atol=TOLERANCE)


def test_the_kept_tokens_are_those_of_a_compressed_prompt(session) -> None:
    ids = prompt(100)
    context = session.compress(ids, keep_ratio=0.3)
    tail = session.generate(ids, GREEDY, keep_ratio=0.3).token_ids
    logits = forced_logits(session, context, list(tail[:-1]))
    assert tuple(int(row.argmax()) for row in logits) == tail[1:]


def test_many_questions_at_once_equal_each_alone_and_leave_the_context_as_it_is(session) -> None:
    context = session.compress(prompt(100))
    before = [array.copy() for array in (*context.cache.keys, *context.cache.values)]
    questions = [prompt(length, seed=2) for length in (5, 17, 1, 33)]
    together = session.generate(questions, GREEDY, context=context)
    alone = [session.generate(question, GREEDY, context=context) for question in questions]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    with ThreadPoolExecutor(4) as pool:
        threads = pool.map(lambda question: session.generate(question, GREEDY, context=context), questions)
    assert [result.token_ids for result in threads] == [result.token_ids for result in alone]
    for array, old in zip((*context.cache.keys, *context.cache.values), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_statistics_count_the_context_and_what_was_prefilled(session) -> None:
    context = session.compress(prompt(100), budget_tokens=25)
    progress: list[tuple[int, int]] = []
    result = session.generate(prompt(20), GREEDY, context=context, on_prefill=lambda *at: progress.append(at))
    stats = result.statistics
    assert (stats.prompt_tokens, stats.context_tokens, stats.kept_tokens, stats.new_tokens) == (120, 100, 45, 12)
    assert progress[0] == (0, 20) and progress[-1] == (20, 20)
    assert stats.full_cache_bytes == 120 * session.executor.kv_bytes_per_token
    assert context.nbytes == 25 * session.executor.kv_bytes_per_token
    assert 0 <= context.age_s < 60
    assert session.generate(prompt(20), GREEDY).statistics.context_tokens == 0


@pytest.mark.parametrize("turn_length", [1, 16, 50])
def test_a_turn_that_stays_whole_is_a_longer_prompt(session, turn_length: int) -> None:
    document, turn, question = prompt(61), prompt(turn_length, seed=1), prompt(9, seed=2)
    context = session.compress(document, keep_ratio=0.5)
    longer = context.extend(turn)
    assert (len(longer), longer.slots) == (61 + turn_length, (30 + turn_length,))
    assert (len(context), context.slots) == (61, (30,))
    expected = session.generate(turn + question, WITH_LOGPROBS, context=context)
    behind = session.generate(question, WITH_LOGPROBS, context=longer)
    assert behind.token_ids == expected.token_ids
    np.testing.assert_allclose(behind.logprobs, expected.logprobs, atol=TOLERANCE)


def test_a_compressed_turn_keeps_its_share_and_its_sinks_and_window(session) -> None:
    context = session.compress(prompt(61), keep_ratio=0.5)
    whole, less = (context.extend(prompt(50, seed=1), keep_ratio=ratio) for ratio in (1.0, 0.4))
    assert less.slots == (30 + 20,)
    for key, full in zip(less.cache.keys, whole.cache.keys, strict=True):
        np.testing.assert_array_equal(key[:, :, :32], full[:, :, :32])  # the context, and the turn's sinks
        np.testing.assert_array_equal(key[:, :, -4:], full[:, :, -4:])
        rows = {row.tobytes() for row in full[0, 0]}
        assert all(row.tobytes() in rows for row in key[0, 0])
    assert session.generate(prompt(5), GREEDY, context=less).statistics.prompt_tokens == 116


def test_what_a_row_holds_after_an_answer_goes_on_without_prefilling_it_again(session) -> None:
    context = session.compress(prompt(61))
    held: dict[int, Context] = {}
    questions = [prompt(9, seed=1), prompt(20, seed=2)]
    params = [dataclasses.replace(GREEDY, max_new_tokens=count) for count in (12, 1)]
    results = session.generate(questions, params[0], context=context, on_context=held.__setitem__)
    for row, (question, result) in enumerate(zip(questions, results, strict=True)):
        answer = list(result.token_ids[:-1])
        np.testing.assert_array_equal(held[row].token_ids, [*prompt(61), *question, *answer])
        again = session.generate([*question, *answer, 7], GREEDY, context=context)
        assert session.generate([result.token_ids[-1]], GREEDY, context=held[row]).token_ids is not None
        assert session.generate([7], GREEDY, context=held[row]).token_ids == again.token_ids
    session.generate(questions[0], params[1], on_context=held.__setitem__, keep_ratio=1.0)
    np.testing.assert_array_equal(held[0].token_ids, questions[0])


def test_a_cancelled_question_ends_and_the_context_stays_usable(session) -> None:
    context, cancel = session.compress(prompt(61)), threading.Event()
    cancel.set()
    assert session.generate(prompt(40), GREEDY, context=context, cancel=cancel).finish_reason == "cancelled"
    assert session.generate(prompt(40), GREEDY, context=context).finish_reason == "length"


def test_the_repetition_penalty_counts_the_tokens_of_the_context(session) -> None:
    params = dataclasses.replace(GREEDY, repetition_penalty=1.8)
    document, question = prompt(61), prompt(5, seed=1)
    context = session.compress(document, keep_ratio=1.0)
    whole = session.generate(document + question, params, keep_ratio=1.0)
    assert session.generate(question, params, context=context).token_ids == whole.token_ids


def test_streams_of_text_behind_a_text(session) -> None:
    context = session.compress("The door of the old house is green. " * 3, keep_ratio=1.0)
    question = " What colour is the door of the house?"
    events = list(session.generate(question, GREEDY, context=context, stream=True))
    whole = session.generate("The door of the old house is green. " * 3 + question, GREEDY, keep_ratio=1.0)
    assert events[-1].finished is not None and events[-1].finished.token_ids == whole.token_ids
    assert "".join(event.text for event in events) == whole.text


def test_the_longest_context_that_a_prompt_begins_with(session) -> None:
    ids = prompt(61)
    short, long, other = (session.compress(each, keep_ratio=1.0) for each in (ids[:20], ids[:40], ids[1:50]))
    assert longest_prefix([short, other, long], ids) is long
    assert longest_prefix([short, other, long], ids[:40]) is short
    assert longest_prefix([short, other, long], ids[:20]) is None


def test_a_context_of_a_row_is_a_copy(session) -> None:
    context = session.compress(prompt(61))
    copy = context_of_row(session, context.cache, context.token_ids, context.slots)
    for array in copy.cache.keys:
        array[:] = 0
    assert all(np.any(array) for array in context.cache.keys)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, c: s.generate([5], context=c, keep_ratio=0.5), ["budget", "compress"]),
        (lambda s, c: s.generate([5], context=c, budget_tokens=5), ["budget", "compress"]),
        (lambda s, c: s.generate([], context=c), ["0 questions", "1 to 4"]),
        (lambda s, c: s.generate([[5]] * 5, context=c), ["5 questions", "1 to 4", "--max_batch_size"]),
        (lambda s, c: s.generate([384], context=c), ["384", "383"]),
        (lambda s, c: s.generate(prompt(100), context=c), ["100", "128", "256", "--max_seq_len"]),
        (lambda s, c: s.generate([{"role": "user", "content": "Hi"}], context=c), ["messages", "token ids"]),
        (lambda s, c: s.compress([5], scorer="nobody"), ["nobody", "window"]),
        (lambda s, c: s.compress(""), ["empty"]),
        (lambda s, c: s.compress([]), ["empty"]),
        (lambda s, c: s.compress(prompt(61), keep_ratio=2.0), ["keep_ratio", "2.0"]),
        (lambda s, c: c.extend([]), ["no token"]),
        (lambda s, c: c.extend(prompt(230)), ["230", "256", "--max_seq_len"]),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused_before_any_work(session, call, words: list[str]) -> None:
    context = session.compress(prompt(61))
    with pytest.raises(RequestError, match=naming(*words)):
        call(session, context)


def test_a_context_belongs_to_its_engine(session, plain_session) -> None:
    context = session.compress(prompt(61))
    with pytest.raises(RequestError, match="another engine"):
        plain_session.generate([5], context=context)
    same = ChunkKVSession.from_dir(engines.engine_dir("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries="delimiter"))
    assert same.generate([5], GREEDY, context=context) is not None


def test_engines_that_cannot_continue_are_refused_by_name(session, monkeypatch: pytest.MonkeyPatch) -> None:
    context = session.compress(prompt(61))
    without = dataclasses.replace(session.executor.capabilities, compresses_turns=False)
    monkeypatch.setattr(type(session.executor), "capabilities", without)
    with pytest.raises(BackendUnavailableError, match="cannot compress a turn"):
        context.extend(prompt(50), keep_ratio=0.4)
    monkeypatch.setattr(type(session.executor), "capabilities", Capabilities(True, True, True, True))
    for call in (
        lambda: session.compress(prompt(61)),
        lambda: session.generate([5], context=context),
        lambda: session.generate([5], on_context=lambda row, held: None),
    ):
        with pytest.raises(BackendUnavailableError, match="cannot continue a context"):
            call()
