"""The scorer "reread": what a prompt is read again with, the scores of that reading, and the tokens that it keeps."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from support import engines
from support.class_engines import CLASSES, LIMITS, session, settings_of
from support.tiny_tokenizers import write_tokenizer

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.contexts.scorers import REREAD, WINDOW, with_scorer
from chunkkv.errors import BackendUnavailableError, EngineMismatchError, RequestError
from chunkkv.executors.interface import Capabilities, Choice
from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefillRun
from chunkkv.reference import select_batch
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
    assert set(run._scores) == set(queries)
    for part, query in queries.items():
        key = cache.keys[part][0].astype(np.float64)
        logits = query[0].reshape(len(key), -1, extra, key.shape[2]) @ key[:, None].swapaxes(2, 3)
        logits /= np.sqrt(key.shape[2])
        logits[..., length:][..., np.triu(np.ones((extra, extra), bool), 1)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(run._scores[part], weights.max(axis=(1, 2))[:, :length], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPLITS)
def test_the_tokens_kept_are_those_of_the_reference(name: str, tokenizer: Tokenizer) -> None:
    engine, ids = engine_of(tokenizer, **SPLITS[name]), tokens(90, 1)
    request, run, choice, out = prefilled(engine, ids)
    settings, length = engine.settings, len(ids)
    assert settings is not None
    given = settings.with_score("given")
    of_choice = {p: s if settings.heads == "each" else s.max(axis=0) for p, s in run._scores.items()}
    layout = engine.executor.cache_layout
    if settings.budget_split == "ranked":
        pooled = np.stack([choice.token_scores[part] for part in sorted(of_choice)])
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
