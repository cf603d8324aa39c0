"""Policies against oracles of their own, equal kept tokens, and the runner that decodes them together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import needle_engine
from support.messages import naming

from chunkkv import SamplingParams, reference, reference_layers
from chunkkv.cache_layout import uniform_layout
from chunkkv.errors import ConfigError, RequestError
from chunkkv.evaluation import policies as rules
from chunkkv.evaluation.policies import make_policy, parse_policies, pyramid_budgets
from chunkkv.evaluation.prefilled import PrefilledPrompt
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.texts.questions import Question
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.settings import ChunkKVSettings

TEXT = (needle_engine.MODEL.parent / "prompts" / "short.txt").read_text(encoding="utf-8")
SETTINGS = ChunkKVSettings(window=6, sinks=3, chunk_size=5, min_tokens=14, layer_groups=((0,), (1,), (2,)))
LENGTH, KEPT = 83, 31
COMPRESSING = [name for name in rules.RULES if name not in ("full", "engine")]


@pytest.fixture(scope="module")
def prompt() -> PrefilledPrompt:
    """Random keys and queries: 3 layers, 4 query heads, 2 KV heads."""
    random = np.random.default_rng(5)
    keys = tuple(random.normal(size=(1, 2, LENGTH, 8)).astype(np.float32) for _ in range(3))
    queries = {layer: (random.normal(size=(4, 8, 8)) * 3).astype(np.float32) for layer in range(3)}

    cache = HostKVCache(keys, keys, uniform_layout(3, 2))
    table = random.random(50) < 0.2
    ids = random.integers(0, 50, LENGTH)
    return PrefilledPrompt(ids, np.zeros(50, np.float32), cache, queries, table, seed=3)


LOGITS = {"score": "logits", "head_reduce": "mean"}


def always(settings: ChunkKVSettings = SETTINGS) -> set[int]:
    return {*range(settings.sinks), *range(LENGTH - settings.window, LENGTH)}


def best(scores: np.ndarray, count: int) -> list[int]:
    """The best single tokens between sinks and window, lower positions first among equals; the rest stays anyway."""
    ranked = sorted(range(SETTINGS.sinks, LENGTH - SETTINGS.window), key=lambda t: (-scores[t], t))
    return sorted({*always(), *ranked[: count - SETTINGS.sinks - SETTINGS.window]})


def own_scores(prompt: PrefilledPrompt, layer: int, pooling: int) -> np.ndarray:
    query = prompt.queries[layer][:, -SETTINGS.window :]
    return reference.token_scores(query, prompt.key(layer), SETTINGS.window, pooling, head_reduce="mean")


@pytest.mark.parametrize("name", COMPRESSING)
def test_every_policy_keeps_as_many_ascending_distinct_tokens(prompt: PrefilledPrompt, name: str) -> None:
    kept = make_policy(name, SETTINGS).keep(prompt, KEPT)
    assert len(kept) == 3 and sum(map(len, kept)) == 3 * KEPT
    assert name == "pyramidkv" or {len(positions) for positions in kept} == {KEPT}
    for positions in kept:
        assert (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < LENGTH
        assert always() <= set(positions.tolist())


@pytest.mark.parametrize("name", rules.RULES)
def test_a_prompt_that_fits_is_kept_whole(prompt: PrefilledPrompt, name: str) -> None:
    for positions in make_policy(name, SETTINGS).keep(prompt, LENGTH):
        assert positions.tolist() == list(range(LENGTH))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chunkkv", {}),
        ("chunkkv-delimiter", {"boundaries": "delimiter"}),
        ("chunkkv:chunk_size=9:pooling=3:score=logits", {"chunk_size": 9, "pooling": 3, **LOGITS}),
        ("chunkkv:window=4:sinks=0", {"window": 4, "sinks": 0}),
        ("chunkkv:layer_reuse=0-1+2:leader=first", {"layer_groups": ((0, 1), (2,)), "leader": "first"}),
        ("chunkkv:layer_reuse=3", {"layer_groups": ((0, 1, 2),)}),
    ],
)
def test_chunk_policies_are_the_op_of_the_contract(prompt: PrefilledPrompt, name: str, change: dict) -> None:
    settings = replace(SETTINGS, **{"min_tokens": 20, **change})
    expected = reference_layers.select_layers(
        {layer: query[None, :, -settings.window :] for layer, query in prompt.queries.items()},
        [key for key in prompt.cache.keys],
        np.array([LENGTH]),
        settings,
        budget_tokens=np.array([KEPT]),
        is_delimiter=prompt.is_delimiter[None],
    )
    kept = make_policy(name, SETTINGS).keep(prompt, KEPT)
    assert [positions.tolist() for positions in kept] == [found.kept_indices[0].tolist() for found in expected]


def test_snapkv_keeps_the_best_pooled_tokens(prompt: PrefilledPrompt) -> None:
    for name, pooling in (("snapkv", 5), ("snapkv:pooling=1", 1), ("snapkv:pooling=7", 7)):
        for layer, positions in enumerate(make_policy(name, SETTINGS).keep(prompt, KEPT)):
            assert positions.tolist() == best(own_scores(prompt, layer, pooling), KEPT)


def test_streaming_keeps_the_first_and_the_most_recent(prompt: PrefilledPrompt) -> None:
    for positions in make_policy("streaming_llm", SETTINGS).keep(prompt, KEPT):
        assert positions.tolist() == [0, 1, 2, *range(LENGTH - (KEPT - 3), LENGTH)]


def test_pyramid_gives_the_first_layers_more(prompt: PrefilledPrompt) -> None:
    budgets = pyramid_budgets(3, LENGTH, KEPT, 9)
    assert budgets == [9 + 43, 9 + 22, 9 + 1]  # 22 on average beyond the 9, the last layer 22 // 20
    kept = make_policy("pyramidkv", SETTINGS).keep(prompt, KEPT)
    for layer, (positions, budget) in enumerate(zip(kept, budgets, strict=True)):
        assert positions.tolist() == best(own_scores(prompt, layer, 5), budget)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 16, 32])
@pytest.mark.parametrize("kept", [10, 31, 60, 97, 99])
def test_pyramid_budgets_fill_the_average_exactly_and_never_exceed_the_prompt(layers: int, kept: int) -> None:
    budgets = pyramid_budgets(layers, 100, kept, 9)
    assert sum(budgets) == layers * kept and budgets == sorted(budgets, reverse=True)
    assert min(budgets) >= 9 and max(budgets) <= 100


def test_random_chunks_follow_the_seed(prompt: PrefilledPrompt) -> None:
    policy = make_policy("random", SETTINGS)
    first, again = policy.keep(prompt, KEPT), policy.keep(prompt, KEPT)
    other = policy.keep(replace(prompt, seed=4), KEPT)
    assert [a.tolist() for a in first] == [b.tolist() for b in again] != [c.tolist() for c in other]
    for positions in first:
        drawn = sorted(set(positions.tolist()) - always())
        whole = [
            start for start in range(3, LENGTH - 6, 5) if set(range(start, min(start + 5, LENGTH - 6))) <= set(drawn)
        ]
        assert len(drawn) - sum(min(5, LENGTH - 6 - start) for start in whole) < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkw", "policies names 'snapkw'; there are full, engine, chunkkv"),
        ("full,full", "policies lists full twice"),
        (
            "chunkkv:size=3",
            "where 'size=3' is no setting of chunkkv; give name=value, with a name of window, chunk_size",
        ),
        ("chunkkv:chunk_size", "where 'chunk_size' is no setting"),
        ("chunkkv:chunk_size=x", "where chunk_size is 'x'; give a whole number"),
        ("chunkkv:chunk_size=0", "chunk_size is 0; allowed is 1 to 256"),
        ("chunkkv:pooling=4", "pooling is 4; allowed are odd values"),
        ("chunkkv:leader=middle", "leader is 'middle'; allowed is first or last"),
        ("chunkkv:layer_reuse=0-1", "layer 2 is missing"),
    ],
)
def test_a_policy_that_is_not_offered_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_policies(text, SETTINGS)
    assert message in str(error.value)


def test_a_policy_says_what_the_engine_lacks(prompt: PrefilledPrompt) -> None:
    with pytest.raises(ConfigError, match=naming("window 9 8")):
        make_policy("chunkkv:window=9", SETTINGS).keep(prompt, KEPT)
    with pytest.raises(ConfigError, match=naming("layer 0 --chunkkv_layer_reuse 1")):
        make_policy("chunkkv", SETTINGS).keep(replace(prompt, queries={1: prompt.queries[1]}), KEPT)
    with pytest.raises(ConfigError, match=naming("6 3 8 tokens")):
        make_policy("chunkkv", SETTINGS).keep(prompt, 8)
    with pytest.raises(ConfigError, match=naming("engine --chunkkv")):
        make_policy("engine", SETTINGS).keep(prompt, KEPT)


@pytest.fixture(scope="module")
def runner() -> PromptRunner:
    return PromptRunner(needle_engine.session())


@pytest.fixture(scope="module")
def prefilled(runner: PromptRunner) -> PrefilledPrompt:
    tokenizer = runner.session.tokenizer
    assert tokenizer is not None
    return runner.prefill(np.array(tokenizer.encode(TEXT)))


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_engine_policy_is_the_product_and_equals_its_reference(
    runner: PromptRunner, prefilled: PrefilledPrompt, keep: float
) -> None:
    settings = runner.session.settings
    assert settings is not None
    kept = settings.kept_tokens(len(prefilled), round(keep * 10_000))
    assert kept < len(prefilled)
    engine = make_policy("engine", settings).keep(prefilled, kept)
    own = make_policy("chunkkv", settings).keep(prefilled, kept)
    for layer, (given, expected) in enumerate(zip(engine, own, strict=True)):
        scores = prefilled.token_scores(layer, make_policy("chunkkv", settings).settings)
        flags = prefilled.is_delimiter if settings.boundaries == "delimiter" else None
        near = np.flatnonzero(reference.near_cut(scores, len(prefilled), kept, settings, flags))
        assert set(given.tolist()) ^ set(expected.tolist()) <= set(near.tolist())
    answers = runner.answer(prefilled, [engine], [Question((), "", (), 6, "contains")])
    params = SamplingParams(max_new_tokens=6)
    assert tuple(answers[0][0]) == runner.session.generate(prefilled.ids, params, keep_ratio=keep).token_ids


def test_rows_of_one_decode_answer_as_each_alone(runner: PromptRunner, prefilled: PrefilledPrompt) -> None:
    """Different lengths, a question of several tokens, and two questions on one cache."""
    tokenizer, settings = runner.session.tokenizer, runner.session.settings
    assert tokenizer is not None and settings is not None
    asked = tuple(tokenizer.encode("the keeper of the", False))
    questions = [Question(asked, "", (), 4, "contains"), Question(asked[:2], "", (), 3, "contains")]
    named = ["full", "chunkkv", "snapkv", "streaming_llm", "pyramidkv"]
    choices = [policy.keep(prefilled, 80) for policy in parse_policies(",".join(named), settings)]
    together = runner.answer(prefilled, choices, questions)
    for choice, found in zip(choices, together, strict=True):
        for question, tokens in zip(questions, found, strict=True):
            assert runner.answer(prefilled, [choice], [question]) == [[tokens]]
    full = runner.session.generate([*prefilled.ids, *asked], SamplingParams(max_new_tokens=4), keep_ratio=1.0)
    assert together[0][0] == list(full.token_ids)


def test_answers_on_the_engines_own_choice_need_no_view_of_caches(
    runner: PromptRunner, prefilled: PrefilledPrompt
) -> None:
    settings = runner.session.settings
    assert settings is not None
    question = Question(tuple(prefilled.ids[5:9].tolist()), "", (), 4, "contains")
    choice = make_policy("engine", settings).keep(prefilled, 80)
    seen = runner.answer(prefilled, [choice], [question])
    assert runner.answer_compressed(prefilled.ids, 80, [question]) == seen[0]
    full = runner.answer(prefilled, [[np.arange(len(prefilled))] * 4], [question])
    assert runner.answer_compressed(prefilled.ids, len(prefilled), [question]) == full[0]
    with pytest.raises(RequestError, match=naming("3 tokens 64")):
        runner.answer_compressed(prefilled.ids, 3, [question])


def test_layers_of_different_lengths_attend_to_their_own_tokens_only(
    runner: PromptRunner, prefilled: PrefilledPrompt
) -> None:
    """A layer that keeps fewer tokens equals one of full length whose other keys no query of this step can reach."""
    executor = runner.session.executor
    short, long, layer = 40, 60, 2
    lengths = np.full((4, 1), long, np.int32)  # [layers,rows]
    lengths[layer] = short
    caches = [executor.new_cache(1, long + 1) for _ in range(2)]
    for cache in caches:
        for kind in ("keys", "values"):
            for index in range(4):
                getattr(cache, kind)[index][:, :, :long] = getattr(prefilled.cache, kind)[index][:, :, :long]
    caches[0].values[layer][:, :, short:] = np.nan  # must never be read
    uneven = executor.layer_lengths_decoder(caches[0])
    even = executor.decoder(caches[1])
    found = uneven.step([0], [7], [long], lengths)
    # The layers before this one are of full length, so a step over full layers has the same query here.
    queries = executor.step.append_block(caches[1], np.array([7], np.int64), long, long, query_count=1)[1]
    query = queries[layer][0, :, 0]  # [4,64], two heads to a key
    for head in range(2):
        unreachable = np.linalg.lstsq(query[2 * head : 2 * head + 2], np.full(2, -1e5, np.float32), rcond=None)[0]
        caches[1].keys[layer][0, head, short:long] = unreachable
    np.testing.assert_allclose(found, even.step([0], [7], [long], [long]), rtol=1e-4, atol=1e-4)
