"""The scorer "reread": what a prompt is read again with, the scores of that reading, and the tokens that it keeps."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from support import engines
from support.class_engines import CLASSES, LIMITS, RANKED_HEADS, session, settings_of
from support.tiny_tokenizers import write_tokenizer

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.contexts.scorers import REREAD, WINDOW, with_scorer
from chunkkv.errors import BackendUnavailableError, EngineMismatchError, RequestError
from chunkkv.executors.interface import Capabilities, Choice
from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefillRun
from chunkkv.reference import given_scores, select_batch
from chunkkv.reference_layers import head_classes, select_ranked
from chunkkv.requests import Request, make_requests
from chunkkv.rereading import PIECE_TOKENS, RepeatWords, pieces_of
from chunkkv.text.repeat_words import repeat_words
from chunkkv.text.tokenizer import Tokenizer

WORDS = RepeatWords(whole=(1, 2), part=(3, 4), turn=(5, 6), frame=(7, 8))
SPLITS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "each head": {"heads": "each"},
    "pairs": {"layer_groups": ((0, 1), (2,)), "leader": "last"},
    "classes": CLASSES,
    "classes of chunks": {**CLASSES, "local_policy": "chunks"},
    "ranked": {"budget_split": "ranked"},
    "ranked heads": RANKED_HEADS,
    "scores given": {"score": "given"},
}


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 300, count).tolist()


def test_pieces_cover_the_text_between_the_template_s_tokens() -> None:
    text = np.array([7, 8, *range(20, 20 + 3 * 100 + 7), 5, 6])
    pieces = pieces_of(text, WORDS, room=100 + 2 + 8 + 2)
    assert [(piece.start, piece.stop) for piece in pieces] == [(2, 102), (102, 202), (202, 302), (302, 309)]
    assert pieces[0].ids.tolist() == [1, 2, 5, 6, *text[2:102]]
    assert pieces[1].ids.tolist() == [3, 4, *text[94:102], 5, 6, *text[102:202]]
    (whole,) = pieces_of(text[2:-2], WORDS, room=10_000)
    assert (whole.start, whole.stop) == (0, 307), "text without the template is repeated whole"
    assert len(pieces_of(np.arange(PIECE_TOKENS + 1) + 9, WORDS, room=10_000)) == 2
    with pytest.raises(RequestError, match="has 20 positions"):
        pieces_of(text, WORDS, room=20)


def test_the_instruction_is_in_the_words_of_the_chat_template() -> None:
    tokenizer = engines.session("llama3").tokenizer
    assert tokenizer is not None and tokenizer.chat_template is not None
    words = repeat_words(tokenizer)
    assert tokenizer.decode(words.frame, False) == "<|begin|>[user]\n"
    assert tokenizer.decode(words.turn, False) == "<|end|>\n[assistant]\n"
    chat = np.array(tokenizer.encode_chat([{"role": "user", "content": "some text to keep"}]))
    (piece,) = pieces_of(chat, words, room=1000)
    assert tokenizer.decode(chat[piece.start : piece.stop].tolist()) == "some text to keep"


def test_without_a_chat_template_a_line_ends_the_instruction(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is None
    words = repeat_words(tokenizer)
    assert words.turn == tuple(tokenizer.encode("\n", False)) and words.frame == ()
    assert tokenizer.decode(words.whole) == "\n\nRepeat the previous context exactly."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "byte_level")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": None}), encoding="utf-8")
    return Tokenizer.from_dir(folder)


def engine_of(tokenizer: Tokenizer | None, **changes: Any) -> ChunkKVSession:
    """Return an engine with a tokenizer, whose words are not those of the prompts here."""
    made = session(settings_of(**changes))
    return ChunkKVSession(made.executor, made.settings, LIMITS, tokenizer)


def prefilled(engine: ChunkKVSession, ids: list[int]) -> tuple[Request, OnnxRuntimePrefillRun, Choice, Any]:
    """Return the request, its finished prefill with scorer "reread", the choice, and the cache that it filled."""
    (request,) = make_requests([ids], None, engine.limits, engine.settings, None, None, 0)
    request, _ = with_scorer(engine, request, "reread")
    executor: Any = engine.executor
    out = executor.new_cache(1, executor.capacity_for(request.class_lengths))
    run = executor.prefiller().start([request], out)
    results = None
    while results is None:
        results = run.step()
    assert results[0].choice is not None
    return request, run, results[0].choice, out


@pytest.mark.parametrize("name", SPLITS)
def test_scores_are_the_largest_attention_of_a_second_reading(name: str, tokenizer: Tokenizer) -> None:
    """The prompt is run in one go behind itself, and the attention is computed in float64."""
    engine, ids = engine_of(tokenizer, **SPLITS[name]), tokens(90)
    request, run, _, _ = prefilled(engine, ids)
    (piece,) = request.reread
    step = engine.executor.step  # type: ignore[attr-defined]
    length, extra = len(ids), len(piece.ids)
    cache = step.new_cache(1, length + extra)
    step.append_block(cache, np.array(ids), 0, 0)
    queries = step.append_block(cache, piece.ids, length, length, query_count=extra)[1]
    assert set(run._state.scores) == set(queries)
    for part, query in queries.items():
        received = attention(query[0], cache.keys[part][0], extra)[:, :length]
        np.testing.assert_allclose(run._state.scores[part], received, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPLITS)
def test_the_tokens_kept_are_those_of_the_reference(name: str, tokenizer: Tokenizer) -> None:
    engine, ids = engine_of(tokenizer, **SPLITS[name]), tokens(90, 1)
    request, run, choice, out = prefilled(engine, ids)
    settings, length = engine.settings, len(ids)
    assert settings is not None
    given = settings.with_score("given")
    each = settings.heads == "each" and settings.budget_split != "ranked"
    of_choice = {p: s if each else s.max(axis=0) for p, s in run._state.scores.items()}
    layout = engine.executor.cache_layout
    if settings.budget_split == "ranked":
        pooled = np.stack([choice.token_scores[part] for part in sorted(of_choice)]).reshape(3, -1, length)
        expected = select_ranked(pooled, length, request.kept_tokens, settings)
        assert len({len(kept) for kept in expected}) > 1
        for part, kept in enumerate(expected):
            np.testing.assert_array_equal(choice.kept_indices[part], kept)
        assert choice.kept_lengths == tuple(map(len, expected))
    for part, scores in of_choice.items() if settings.budget_split != "ranked" else ():
        head_class = layout.parts[part].head_class
        assert head_class in [one for one, _ in head_classes(settings, layout.parts[part].layer, 3)]
        key = np.zeros((1, len(layout.parts[part].kv_heads), length, 8), np.float32)
        expected_part = select_batch(None, key, np.array([length]), given, scores=scores[None], head_class=head_class)
        np.testing.assert_array_equal(choice.kept_indices[part], expected_part.kept_indices[0])
        np.testing.assert_allclose(choice.token_scores[part], expected_part.token_scores[0], rtol=1e-6)
    full = engine.executor.step.new_cache(1, length)  # type: ignore[attr-defined]
    engine.executor.blockwise_prefiller().fill(np.array(ids), full, _Never())
    for part in of_choice:
        kept = choice.kept_indices[part]
        rows = np.take_along_axis(full.keys[part][0], np.atleast_2d(kept)[..., None], axis=1)
        np.testing.assert_array_equal(out.keys[part][0, :, : kept.shape[-1]], rows)


@pytest.mark.parametrize("name", SPLITS)
def test_inspect_shows_what_a_second_reading_keeps(name: str, tokenizer: Tokenizer) -> None:
    engine, ids = engine_of(tokenizer, **SPLITS[name]), tokens(90, 1)
    _, _, choice, _ = prefilled(engine, ids)
    told: list[tuple[int, int]] = []
    found = engine.inspect(ids, scorer="reread", on_prefill=lambda *at: told.append(at))
    assert found.scorer == "reread" and told[-1][0] == told[-1][1] > 2 * len(ids)
    layout, groups = engine.executor.cache_layout, iter(found.groups)
    for number in sorted(choice.kept_indices):
        heads, kept = len(layout.parts[number].kv_heads), choice.kept_indices[number]
        scores = choice.token_scores.get(number)
        for head in range(heads) if kept.ndim == 2 else (...,):
            group = next(groups)
            np.testing.assert_array_equal(group.kept_indices, kept[head])
            if scores is not None:
                np.testing.assert_array_equal(group.token_scores, scores[head])
    assert next(groups, None) is None
    by_window = name != "scores given" and engine.inspect(ids, scorer="window")
    assert not by_window or (by_window.scorer, by_window.groups) != ("reread", found.groups)


def test_inspect_takes_the_scorer_that_the_engine_would_take(tokenizer: Tokenizer) -> None:
    ids = tokens(90, 4)
    for changes, of_prompt, of_context in (
        ({}, "window", "window"),
        ({"budget_split": "ranked"}, "window", "reread"),
        (RANKED_HEADS, "window", "reread"),
        ({"score": "given"}, "reread", "reread"),
    ):
        engine = engine_of(tokenizer, **changes)
        shown = [engine.inspect(ids, as_context=later) for later in (False, True)]
        assert [one.scorer for one in shown] == [of_prompt, of_context]
        context = engine.compress(ids)
        assert context.scorer == of_context
        kept = [len(group.kept_indices) for group in shown[1].groups]
        assert len(context.slots) == 1 or tuple(kept) == context.slots, "lengths per layer"


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
@pytest.mark.parametrize("name", SPLITS)
def test_a_turn_is_chosen_as_its_context_was(name: str, keep_ratio: float, tokenizer: Tokenizer) -> None:
    """The turn's second reading sees the context's sinks, the turn and itself, and repeats the turn alone."""
    engine, turn = engine_of(tokenizer, **SPLITS[name]), tokens(70, 6)
    context = engine.compress(tokens(50, 5), keep_ratio=keep_ratio, scorer="reread")
    told: list[tuple[int, int]] = []
    longer = context.extend(turn, keep_ratio=0.4, on_prefill=lambda *at: told.append(at))
    assert longer.scorer == "reread" and told[-1][0] == told[-1][1] > 140
    settings, layout, executor = engine.settings, engine.executor.cache_layout, engine.executor
    assert settings is not None
    step = executor.step  # type: ignore[attr-defined]
    (piece,) = pieces_of(np.array(turn), repeat_words(tokenizer), 1_000, context.token_ids)
    extra = len(piece.ids)
    assert piece.ids[-len(turn) :].tolist() == turn and context.token_ids[-1] in piece.ids[:-70]
    row = step.new_cache(1, tuple(count + 70 + extra for count in context.slots))
    executor.continuer().copy(context.cache, context.slots, row)
    step.append_block(row, np.array(turn), context.slots, 50)
    queries = step.append_block(row, piece.ids, tuple(n + 70 for n in context.slots), 120, query_count=extra)[1]
    scores = {}
    for part, query in queries.items():
        start = context.slots[layout.parts[part].length_class]
        seen = [*range(settings.sinks), *range(start, start + 70 + extra)]
        received = attention(query[0], row.keys[part][0][:, seen], extra)[:, settings.sinks :][:, :70]
        each = settings.heads == "each" and settings.budget_split != "ranked"
        scores[part] = received if each else received.max(axis=0)
    for part, kept in kept_by(settings, layout, scores, turn).items():
        start = context.slots[layout.parts[part].length_class]
        added = row.keys[part][0][:, start : start + 70]
        rows = np.take_along_axis(added, np.atleast_2d(kept)[..., None], axis=1)
        got = longer.cache.keys[part][0][:, start : longer.slots[layout.parts[part].length_class]]
        np.testing.assert_allclose(got, rows, atol=1e-5)


def attention(query: np.ndarray, key: np.ndarray, extra: int) -> np.ndarray:
    """Return the largest weight [H,K] of keys [H,K,D]; the last `extra` belong to the queries [g*H,S,D]."""
    logits = query.reshape(len(key), -1, extra, key.shape[2]) @ key[:, None].astype(np.float64).swapaxes(2, 3)
    logits /= np.sqrt(key.shape[2])
    logits[..., -extra:][..., np.triu(np.ones((extra, extra), bool), 1)] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).max(axis=(1, 2))


def kept_by(settings: Any, layout: Any, scores: dict[int, np.ndarray], turn: list[int]) -> dict[int, np.ndarray]:
    """Return what the reference keeps of a turn by scores from outside, per part that scores."""
    given, length = settings.with_score("given"), len(turn)
    if settings.budget_split == "ranked":
        pooled = np.stack([given_scores(scores[part], settings.window, settings.pooling) for part in sorted(scores)])
        kept_tokens = settings.kept_tokens(length, 4_000)
        return dict(enumerate(select_ranked(pooled.reshape(3, -1, length), length, kept_tokens, settings)))
    kept = {}
    for part, of_part in scores.items():
        key = np.zeros((1, len(layout.parts[part].kv_heads), length, 8), np.float32)
        kept[part] = select_batch(
            None, key, np.array([length]), given, scores=of_part[None], head_class=layout.parts[part].head_class,
            keep_per_10k=np.array([4_000]),
        ).kept_indices[0]  # fmt: skip
    return kept


def test_a_turn_may_have_another_scorer_and_falls_back_where_there_is_no_room(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, budget_split="ranked")
    context, turn = engine.compress(tokens(60, 5), keep_ratio=1.0, scorer="reread"), tokens(50, 6)
    by_window, by_reread = (context.extend(turn, keep_ratio=0.6, scorer=name) for name in ("window", "reread"))
    assert by_window.slots != by_reread.slots == context.extend(turn, keep_ratio=0.6).slots
    longer = context.extend(tokens(80, 7))
    assert longer.extend(turn, keep_ratio=0.6).slots == longer.extend(turn, keep_ratio=0.6, scorer="window").slots
    with pytest.raises(RequestError, match="again behind it, for which this engine has 66 positions"):
        longer.extend(turn, keep_ratio=0.6, scorer="reread")
    with pytest.raises(EngineMismatchError, match="built with score 'given'"):
        engine_of(tokenizer, score="given").compress(tokens(60)).extend(turn, keep_ratio=0.6, scorer="window")


class _Never:
    def is_set(self) -> bool:
        return False


def test_a_request_names_its_scorer(tokenizer: Tokenizer) -> None:
    engine, params = engine_of(tokenizer), SamplingParams(6, ignore_eos=True)
    ids = tokens(90, 2)
    whole = [engine.generate(ids, params, keep_ratio=1.0, scorer=scorer).token_ids for scorer in ("window", "reread")]
    assert whole[0] == whole[1], "nothing is chosen where everything stays"
    told: list[tuple[int, int]] = []
    result = engine.generate(ids, params, scorer="reread", on_prefill=lambda *at: told.append(at))
    assert result.statistics.kept_tokens == 36 and told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 2 * 90 and told == sorted(told), "both readings are told"
    context = engine.compress(ids, scorer="reread")
    assert context.scorer == "reread"
    alike = engine.generate([7], params, context=context).token_ids
    assert alike == engine.generate([7], params, context=engine.compress(ids, scorer="reread")).token_ids
    with pytest.raises(RequestError, match="scorer is 'rereads'; allowed is 'window' or 'reread'"):
        engine.generate(ids, scorer="rereads")
    with pytest.raises(RequestError, match="give budget and scorer to compress"):
        engine.generate(ids, scorer="reread", context=context)
    with pytest.raises(RequestError, match="reads the prompt of 190 tokens again behind it"):
        engine.generate(tokens(190, 3), params, scorer="reread")


def test_the_default_scorer_is_what_serves_best(tokenizer: Tokenizer) -> None:
    for changes, of_prompt, of_context in (
        ({}, WINDOW, WINDOW),
        (CLASSES, WINDOW, REREAD),
        ({"budget_split": "ranked"}, WINDOW, REREAD),
        ({"score": "given"}, REREAD, REREAD),
    ):
        engine = engine_of(tokenizer, **changes)
        (request,) = make_requests([tokens(90)], None, LIMITS, engine.settings, None, None, 0)
        assert with_scorer(engine, request, None)[1] is of_prompt
        assert with_scorer(engine, request, None, of_context=True)[1] is of_context
    (long,) = make_requests([tokens(190)], None, LIMITS, engine.settings, None, None, 0)
    ranked = engine_of(tokenizer, budget_split="ranked")
    assert with_scorer(ranked, long, None, of_context=True)[1] is WINDOW, "a second reading has no room"


def test_nothing_is_read_again_where_every_scored_part_stays_whole(tokenizer: Tokenizer) -> None:
    reading = {**CLASSES, "reading_share_per_10k": 21_000, "local_share_per_10k": 3_400}
    engine = engine_of(tokenizer, **reading)
    (request,) = make_requests([tokens(90)], None, LIMITS, engine.settings, 0.5, None, 0)
    assert request.class_lengths[0] == 90 > request.class_lengths[1]
    assert with_scorer(engine, request, "reread")[0].reread == ()


def test_an_engine_that_cannot_read_again_says_so(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    (request,) = make_requests([tokens(90)], None, LIMITS, engine.settings, None, None, 0)

    class Other:
        capabilities = dataclasses.replace(engine.executor.capabilities, rereads=False)

    other: Any = Other()
    assert isinstance(other.capabilities, Capabilities)
    with pytest.raises(BackendUnavailableError, match=r"scorer is 'reread'.*build the checkpoint for backend onnx"):
        with_scorer(ChunkKVSession(other, engine.settings, LIMITS, tokenizer), request, "reread")
    with pytest.raises(EngineMismatchError, match="without a tokenizer"):
        with_scorer(engine_of(None), request, "reread")
    with pytest.raises(EngineMismatchError, match="without ChunkKV"):
        with_scorer(ChunkKVSession(engine.executor, None, LIMITS, tokenizer), request, "reread")
    with pytest.raises(EngineMismatchError, match="built with score 'given'"):
        with_scorer(engine_of(tokenizer, score="given"), request, "window")
