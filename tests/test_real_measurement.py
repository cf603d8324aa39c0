"""The measurement on a real model: its fast choices are the reference's, and its scores are the session's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import engines

from benchmarks.real import tables
from benchmarks.real.__main__ import PASSES, compact, plan
from benchmarks.real.choices import Attention, Rule
from benchmarks.real.contexts import Asked, Context
from benchmarks.real.full_cache import Engine, FullCache
from benchmarks.real.measure import AFTER, FOLLOWS, IN, Wanted, measure_context, measured, wanted
from benchmarks.real.policies import (
    FULL,
    KEEPS,
    LEAST,
    METHODS,
    ONLY_AFTER,
    OWN,
    PRESSES,
    RANDOM,
    RANKED,
    RULES,
    STREAMING,
    random_chunks,
    streaming,
)
from benchmarks.real.products import Product
from benchmarks.real.tables import Outcomes
from chunkkv import reference
from chunkkv.sampling import SamplingParams
from chunkkv.settings import ChunkKVSettings

LAYERS, KV_HEADS, HEADS, LENGTH, WINDOW = 3, 2, 6, 150, 12
TASKS = ("code", "copy")


@pytest.fixture(scope="module")
def attention() -> Attention:
    random = np.random.default_rng(4)
    shape = (KV_HEADS, LENGTH, 8)
    keys, values = ([random.normal(size=shape).astype(np.float32) for _ in range(LAYERS)] for _ in range(2))
    queries = (random.normal(size=(LAYERS, HEADS, WINDOW, 8)) * 3).astype(np.float32)
    return Attention(FullCache(random.integers(0, 50, LENGTH), keys, values, queries), random.random(LENGTH) < 0.2)


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
@pytest.mark.parametrize(("window", "pooling", "chunk_size"), [(12, 5, 10), (12, 1, 7), (6, 3, 20)])
def test_what_a_rule_keeps_is_what_the_reference_keeps(attention, boundaries, window, pooling, chunk_size):
    rule = Rule(window=window, pooling=pooling, chunk_size=chunk_size, boundaries=boundaries)
    settings = ChunkKVSettings(window=window, pooling=pooling, chunk_size=chunk_size, boundaries=boundaries)
    full, kept = attention.full, attention.kept(rule, 64)
    for layer in range(LAYERS):
        query = full.queries[layer][:, WINDOW - window :]
        scores = reference.token_scores(query, full.keys[layer], window, pooling)
        flags = attention.is_delimiter if boundaries == "delimiter" else None
        expected = reference.select_tokens(scores, LENGTH, 64, settings, flags)
        for head in range(KV_HEADS):
            assert kept[layer, head].tolist() == expected.tolist()


@pytest.mark.parametrize("window_reduce", ["mean", "max"])
@pytest.mark.parametrize("head_reduce", ["mean", "max"])
@pytest.mark.parametrize("value_norm", [False, True])
@pytest.mark.parametrize("heads", ["shared", "each"])
def test_every_reduction_is_the_references(attention, window_reduce, head_reduce, value_norm, heads):
    rule = Rule(12, 7, window_reduce=window_reduce, head_reduce=head_reduce, value_norm=value_norm, heads=heads)
    ours, full = attention.token_scores(rule), attention.full
    for layer in range(LAYERS):
        expected = reference.token_scores(
            full.queries[layer], full.keys[layer], 12, 5, observed=7, heads=heads, window_reduce=window_reduce,
            head_reduce=head_reduce, value=full.values[layer] if value_norm else None,
        )  # fmt: skip
        assert np.allclose(ours[layer], expected.reshape(-1, LENGTH)[:, : LENGTH - 12], rtol=1e-5, atol=0)


def test_reductions_are_what_their_names_say(attention):
    weights = attention.weights[1].astype(np.float64)
    plain = Rule(window=WINDOW, pooling=1, head_reduce="mean")
    ranked = LENGTH - WINDOW
    norms = np.linalg.norm(attention.full.values[1], axis=2)[:, :ranked]
    grouped = weights.reshape(KV_HEADS, -1, WINDOW, LENGTH)[..., :ranked]
    for rule, expected in (
        (plain, grouped.mean(axis=(0, 1, 2))),
        (replace(plain, window_reduce="max"), grouped.max(axis=2).mean(axis=(0, 1))),
        (replace(plain, head_reduce="max"), grouped.mean(axis=2).max(axis=(0, 1))),
        (replace(plain, value_norm=True), (grouped.mean(axis=2) * norms[:, None]).mean(axis=(0, 1))),
        (replace(plain, request_window=5), grouped[:, :, -5:].mean(axis=(0, 1, 2))),
    ):
        assert np.allclose(attention.token_scores(rule)[1, 0], expected, rtol=1e-5)
    each = attention.token_scores(replace(plain, heads="each", head_reduce="max"))[1]
    assert np.allclose(each, grouped.mean(axis=2).max(axis=1), rtol=1e-5)


def test_a_group_takes_its_leaders_choice(attention):
    alone, grouped = (attention.kept(replace(Rule(window=12), groups=groups), 64) for groups in ((), ((2, (1, 2)),)))
    assert np.array_equal(grouped[1], alone[2]) and np.array_equal(grouped[0], alone[0])


def test_baselines_keep_the_number_they_are_given():
    for kept in (streaming(500, 80, (3, 2)), random_chunks(500, 80, (3, 2), seed=1)):
        assert kept.shape == (3, 2, 80) and (np.diff(kept, axis=2) > 0).all()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(engines.session("llama3", chunkkv_window=16, chunkkv_min_tokens=32, max_seq_len=512))


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 200, count).tolist())


def test_a_prompt_that_goes_on_has_the_cache_of_the_whole_prompt(engine):
    once = engine.prefill(ids(90, 1))
    twice = engine.append(engine.prefill(ids(90, 1)[:85]), ids(90, 1)[85:])
    assert np.array_equal(once.ids, twice.ids)
    for pair in ((once.keys, twice.keys), (once.values, twice.values), (once.queries, twice.queries)):
        assert all(np.allclose(first, second, atol=1e-5) for first, second in zip(*pair, strict=True))


def test_a_choice_of_everything_scores_as_the_full_cache(engine):
    full, answer = engine.prefill(ids(90, 1)), ids(9, 2)
    everything = np.broadcast_to(np.arange(90), (len(full.keys), full.keys[0].shape[0], 90))
    whole, kept = (engine.score(full, choice, ids(7, 3), answer, 2) for choice in (None, everything))
    assert whole == kept and len(whole.right) == 7
    longer = engine.prefill(ids(90, 1) + ids(7, 3) + answer[:1])
    again = engine.score(longer, None, (), answer[1:], 1)
    assert np.allclose(again.log_probabilities, whole.log_probabilities, atol=1e-4)


def context() -> Context:
    asked = tuple(Asked(name, ids(18, number), ids(9, 10 + number), 4) for number, name in enumerate(TASKS))
    return Context("200-0", "novel", 200, ids(200, 5), asked, ids(12, 6))


def test_a_measurement_goes_on_where_it_stopped(engine, tmp_path: Path):
    names = ("ChunkKV, window 8", STREAMING, RANDOM)
    everything = [Wanted(mode, task, name, 2_000) for mode, task in ((IN, "code"), (AFTER, "copy")) for name in names]
    everything += [Wanted(FOLLOWS, FOLLOWS, FULL, 10_000)]
    from benchmarks.real.measure import Measurement

    run, path, steps = Measurement(engine), tmp_path / "outcomes.jsonl", []
    measure_context(run, context(), everything[:4], path, steps.append)
    with path.open("a") as file:
        file.write('{"context": "200-0", "outcomes": {"cut')
    first = measured(path)["200-0"]["outcomes"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    measure_context(run, context(), everything, path, steps.append)
    second = measured(path)["200-0"]["outcomes"]
    assert list(second) == [one.key for one in everything] and first.items() <= second.items()
    assert steps == [0, 1, 1, 1, 1, 4, 1, 1, 1]
    kept, right, _ = second["in|code|ChunkKV, window 8|2000"]
    assert kept == LEAST and len(right) == 5


def test_all_policies_are_measured_where_they_can_be():
    everything = wanted(TASKS, (*OWN, *PRESSES, RANKED))
    assert len({one.key for one in everything}) == len(everything)
    for name in OWN:
        assert {one.keep for one in everything if (one.mode, one.task, one.policy) == (IN, "code", name)} == {*KEEPS}
    assert {one.mode for one in everything if one.policy in ONLY_AFTER} == {AFTER, FOLLOWS}
    assert set(RULES) | set(METHODS) == set(OWN) and not set(PRESSES) & set(OWN)


def test_every_context_of_the_plan_has_its_turn():
    listed = [(length, number) for _, length, number in plan(PASSES[:1], 3)]
    assert listed[:3] == [(1_000, 3), (2_000, 3), (1_000, 4)]
    assert len(set(listed)) == len(listed) == sum(PASSES[0].contexts.values())


@pytest.mark.parametrize(
    "flags",
    [{}, {"chunkkv_budget_split": "ranked"}, {"chunkkv_budget_split": "ranked", "chunkkv_heads": "each"}],
    ids=["uniform", "ranked", "ranked heads"],
)
def test_a_product_scores_what_its_session_would_answer(flags):
    """The greedy answer behind a context is right in every token, and any other token is wrong."""
    session = engines.session("llama3", chunkkv_window=16, chunkkv_min_tokens=32, max_seq_len=512, **flags)
    product = Product(session, "window")
    prompt, fed = np.array(ids(120, 8)), ids(7, 3)
    context = session.compress(prompt.tolist(), keep_ratio=0.3, scorer="window")
    result = session.generate(list(fed), SamplingParams(max_new_tokens=6, ignore_eos=True), context=context)
    answer = tuple(result.token_ids)
    kept, scored = product.score(prompt, 3_000, fed, answer, 0)
    assert kept == context.kept_tokens and scored.right == (1,) * 6
    wrong = (*answer[:5], (answer[5] + 1) % 200)
    again = product.score(prompt, 3_000, fed, wrong, 4)[1]
    assert again.right == (1, 0) and again.log_probabilities[0] == scored.log_probabilities[4]


def test_the_engine_keeps_what_the_measurement_chooses(engine):
    """The session's own compression and the fast rules, on the same prompt: the same tokens in every layer."""
    prompt = ids(200, 9)
    full = engine.prefill(prompt)
    settings = engine.session.settings
    rule = Rule(
        settings.window, 0, settings.chunk_size, settings.sinks, settings.boundaries, settings.pooling,
        settings.window_reduce, settings.head_reduce,
    )  # fmt: skip
    table = engine.tokenizer.delimiter_token_table(vocab_size=engine.session.limits.vocab_size)
    chosen = Attention(full, table[full.ids]).kept(rule, 60)
    context = engine.session.compress(list(prompt), budget_tokens=60, scorer="window")
    for layer, positions in enumerate(chosen):
        for head, kept in enumerate(positions):
            assert np.array_equal(context.cache.keys[layer][0, head, :60], full.keys[layer][head, kept])


def values() -> dict:
    """Four contexts in which ChunkKV is right everywhere, B in half of the tokens, and C was measured once."""
    outcomes = {}
    for mode, tasks in ((IN, ("code", "keeper", "copy")), (AFTER, ("code", "keeper", "copy")), (FOLLOWS, (FOLLOWS,))):
        for task in tasks:
            outcomes[f"{mode}|{task}|{FULL}|10000"] = [[200, "1111", -0.4]] * 4
            outcomes[f"{mode}|{task}|ChunkKV|2000"] = [[64, "1111", -0.8]] * 4
            outcomes[f"{mode}|{task}|B|2000"] = [
                [64, "1100", -1.2],
                [64, "1010", -1.2],
                [64, "0011", -1.2],
                [64, "1001", -1.2],
            ]
            outcomes[f"{mode}|{task}|C|2000"] = [None, [64, "0000", -4.0], None, None]
    contexts = [
        {"context": f"200-{n}", "kind": "novel", "length": 200, "tokens": 199, "seconds": 1.0} for n in range(4)
    ]
    return {"contexts": contexts, "outcomes": outcomes}


def test_tables_say_what_was_measured():
    outcomes, policies = Outcomes(values()), (FULL, "ChunkKV", "B", "C", "D")
    lines = tables.methods(outcomes, IN, policies).splitlines()
    assert lines[0] == "| question in the prompt | n | keep 20 % |"
    assert lines[2:5] == [
        f"| {FULL} | 4 | 100 (100) / 100 (100) / 100 (100) |",
        "| ChunkKV | 4 | 100 (100) / 100 (100) / 100 (100) |",
        "| B | 4 | 50 (0) / 50 (0) / 50 (0) |",
    ]
    assert len(lines) == 5  # one context is too few for a row
    against = tables.differences(outcomes, AFTER, policies, "ChunkKV").splitlines()
    assert f"| {FULL} | +0.0 (+0.0 to +0.0) |" in against and len(against) == 4  # of C one context is known
    assert "| B | **−50.0 (−50.0 to −50.0)** |" in against
    lost = tables.losses(outcomes, IN, ("B",)).splitlines()
    assert lost[2:] == [f"| B, {name} | **−50.0 (−50.0 to −50.0)** |" for name in ("codes and names", "copying")]
    assert "| B | 4 | +22 % (+22 to +22) |" in tables.perplexities(outcomes, policies)  # exp(0.2)
    assert tables.kept_note(outcomes) == "4 contexts: 4 of about 200 tokens"


def test_an_interval_of_a_bootstrap_holds_the_mean_and_narrows_with_contexts():
    random = np.random.default_rng(0)
    few, many = (tables.bootstrap(random.normal(1, 1, count)) for count in (10, 1_000))
    for mean, low, high in (few, many):
        assert low < mean < high
    assert many[2] - many[1] < 0.2 < few[2] - few[1]


def test_the_json_goes_round(tmp_path: Path):
    heads = {one["context"]: one for one in values()["contexts"]}
    contexts = {
        name: {**head, "outcomes": {key: row[n] for key, row in values()["outcomes"].items() if row[n] is not None}}
        for n, (name, head) in enumerate(heads.items())
    }
    assert json.loads(compact(contexts)) == values()


@pytest.mark.deep
def test_a_slice_on_the_real_model_has_its_known_order(tmp_path: Path):
    """One context of 1,000 tokens: chunks hold the code at 10 %, and recency alone does not."""
    from support.smollm2 import smollm2

    from benchmarks.real.__main__ import engine as real_engine
    from benchmarks.real.contexts import make_context
    from benchmarks.real.measure import Measurement

    run = Measurement(real_engine(tmp_path / "engine", smollm2()))
    one = make_context(run.engine.tokenizer, 1_000, 0)
    names = ("ChunkKV", STREAMING)
    everything = [Wanted(IN, "code", FULL, 10_000), *(Wanted(IN, "code", name, 1_000) for name in names)]
    measure_context(run, one, everything, tmp_path / "outcomes.jsonl", lambda count: None)
    found = measured(tmp_path / "outcomes.jsonl")[one.name]["outcomes"]
    assert found[everything[0].key][1] == "11111" == found["in|code|ChunkKV|1000"][1]
    assert found[f"in|code|{STREAMING}|1000"][1].count("1") < 3
    assert found["in|code|ChunkKV|1000"][0] == found[f"in|code|{STREAMING}|1000"][0]
