"""Reading heads: probes keep what built engines keep, proposals add up, and no proposal rests on no evidence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engines
from support.builds import CommandLine
from support.class_engines import CLASSES, KV_HEADS, LAYERS, LIMITS, RANKED_HEADS, session, settings_of
from support.tiny_tokenizers import write_tokenizer

from chunkkv import ChunkKVSession
from chunkkv.cli.main import main
from chunkkv.engine.recipe import read_recipe, write_recipe
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.evaluation import head_search
from chunkkv.evaluation.head_proposals import proposals_after, proposals_in_prompt, shortened
from chunkkv.evaluation.head_report import decisions, demand_picture, measurements
from chunkkv.evaluation.head_search import HeadSearchResult, search_heads
from chunkkv.evaluation.measured_heads import HeadCandidate, MeasuredHeads, scorer_name
from chunkkv.evaluation.probes import Probe, Prober, check_prober_settings
from chunkkv.evaluation.settings_search import better, group_fields, groupings, variations
from chunkkv.evaluation.texts.calibration_texts import (
    AnswerTask,
    CalibrationPrompt,
    calibration_prompt,
    calibration_texts,
)
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer

SPLITS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "max over heads": {"head_reduce": "max", "value_norm": "on"},
    "pairs": {"layer_groups": ((0, 1), (2,)), "leaders": (1, 2)},
    "classes": CLASSES,
    "classes of chunks": {**CLASSES, "local_policy": "chunks"},
    "ranked": {"budget_split": "ranked"},
    "ranked heads": RANKED_HEADS,
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys, main)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "byte_level")
    return Tokenizer.from_dir(folder)


def engine_of(tokenizer: Tokenizer, **changes: Any) -> ChunkKVSession:
    made = session(settings_of(**changes))
    return ChunkKVSession(made.executor, made.settings, LIMITS, tokenizer)


def prompt(seed: int, length: int = 90) -> CalibrationPrompt:
    def ids(count: int, salt: int) -> tuple[int, ...]:
        return tuple(np.random.default_rng([seed, salt]).integers(10, 250, count).tolist())

    tasks = (AnswerTask("code", ids(6, 1), ids(5, 2), 2), AnswerTask("copy", ids(4, 3), ids(7, 4), 1))
    return CalibrationPrompt(ids(length, 0), tasks)


@pytest.mark.parametrize("scorer", ["window", "reread"])
@pytest.mark.parametrize("name", SPLITS)
def test_a_probe_keeps_and_answers_as_a_built_engine(name: str, scorer: str, tokenizer: Tokenizer) -> None:
    made = engine_of(tokenizer, **SPLITS[name])
    prober, asked = Prober(engine_of(tokenizer)), prompt(1)
    assert made.settings is not None
    probe = prober.probe(asked)
    kept = probe.kept(made.settings, 4_000, scorer == "reread")
    context = made.compress(list(asked.ids), keep_ratio=0.4, scorer=scorer)
    counts = {len(kept[part.layer][head]) for part in context.cache.layout.parts for head in part.kv_heads}  # type: ignore[attr-defined]
    assert counts == set(context.slots)
    for number, part in enumerate(made.executor.cache_layout.parts):
        for place, head in enumerate(part.kv_heads):
            positions = kept[part.layer][head]
            held = context.cache.keys[number][0, place, : len(positions)]  # type: ignore[attr-defined]
            np.testing.assert_array_equal(held, probe.keys[part.layer][head][positions])
    for task, answered in zip(asked.tasks, prober.answers(probe, kept), strict=True):
        block = np.array([*task.question, *task.answer[:-1]])
        executor = made.executor
        cache = executor.new_cache(1, executor.capacity_for(tuple(count + len(block) for count in context.slots)))
        executor.continuer().copy(context.cache, context.slots, cache)
        logits = executor.score_block(cache, block, context.slots, len(context))
        scored = logits[len(task.question) + task.first_scored - 1 :].astype(np.float64)
        expected = list(task.answer[task.first_scored :])
        log_p = scored[np.arange(len(expected)), expected] - np.log(np.exp(scored).sum(axis=1))
        assert answered.right == (scored.argmax(axis=1) == expected).mean()
        np.testing.assert_allclose(answered.log_probability, log_p.mean(), rtol=1e-4)


def test_everything_kept_is_the_full_cache(tokenizer: Tokenizer) -> None:
    prober, asked = Prober(engine_of(tokenizer)), prompt(2)
    probe = prober.probe(asked, reread=False)
    everything = [[np.arange(len(probe))] * KV_HEADS] * LAYERS
    assert prober.answers(probe, None) == prober.answers(probe, everything)


def test_demand_is_the_share_that_a_head_wins() -> None:
    probe = object.__new__(Probe)
    probe.received = np.zeros((2, 2, 10), np.float32)
    probe.received[0, 0] = 0.9
    probe.received[1, 1, :4] = 0.8
    probe.received[1, 0] = np.linspace(0, 0.1, 10)
    np.testing.assert_allclose(probe.demand(3_500), [[1.0, 0.0], [0.0, 0.4]])
    np.testing.assert_allclose(probe.demand(4_000).sum() * 10, 16)


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(3_000, ((12, 18, 23), ())), (2_000, ((8, 12, 15), (22,))), (1_000, ((4, 6), (11, 22)))],
)
def test_proposals_keep_what_was_asked_for_in_total(keep: int, counts: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    engine = ChunkKVSettings(layer_groups=tuple((layer,) for layer in range(30)), boundaries="delimiter", chunk_size=20)
    demand = np.random.default_rng(0).random((30, 3))
    found = proposals_after(engine, demand, keep, 2_000)
    keeping_all, choosing = counts
    assert sorted({int(one.name.split(" of")[0]) for one in found[:-3]}) == sorted((*keeping_all, *choosing))
    for one in (*found, *proposals_in_prompt(engine, demand, keep, 2_000)):
        assert one.settings is not None
        if one.settings.budget_split != "classes":
            continue
        assert one.settings.min_tokens == (22 if "of 10" in one.name else 40)
        reading, local = one.settings.class_lengths(2_000, keep)
        count = sum(map(len, one.settings.reading_heads))
        assert (reading == 2_000) == (count in keeping_all), "as many as can keep everything do"
        assert local == one.settings.min_tokens or count in keeping_all
        assert 0 <= 90 * 2_000 * keep // 10_000 - (count * reading + (90 - count) * local) < 90
        assert scorer_name(one) == ("reread" if one.reread else "none" if count in keeping_all else "window")
        chosen = {demand[layer, head] for layer, heads in enumerate(one.settings.reading_heads) for head in heads}
        assert chosen == set(np.sort(demand.ravel())[-count:])


def test_layers_and_heads_are_ranked_and_so_are_single_tokens() -> None:
    engine = ChunkKVSettings(layer_groups=((0,), (1,)), boundaries="delimiter", chunk_size=20)
    demand = np.random.default_rng(0).random((2, 3))
    layers, heads, tokens = (one.settings for one in proposals_after(engine, demand, 2_000, 2_000)[-3:])
    assert layers is not None and heads is not None and tokens is not None
    assert all(one.budget_split == "ranked" for one in (layers, heads, tokens))
    assert (layers.ranks_heads, heads.ranks_heads, tokens.ranks_heads) == (False, True, True)
    assert (heads.chunk_size, heads.pooling, heads.min_tokens) == (20, 5, 40)
    assert (tokens.chunk_size, tokens.pooling, tokens.min_tokens) == (1, 1, 21)


def test_a_search_writes_a_recipe_that_builds(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with random weights answers nothing, so the check of the full cache is left out here."""
    monkeypatch.setattr(head_search, "check_full_cache", lambda full: None)
    steps: list[tuple[str, int]] = []

    def begin(name: str, total: int) -> Any:
        steps.append((name, total))
        return lambda: None

    engine = engine_of(tokenizer)
    result = search_heads(engine, [prompt(3), prompt(4)], [prompt(5), prompt(6)], 4_000, begin)
    assert steps == [("second reading", 2), ("question in the prompt", 2), ("asked after compression", 2)]
    assert result.demand.shape == (LAYERS, KV_HEADS)
    best = max(np.mean(one.log_probability) for one in result.measured[1:] if "all heads" not in one.candidate.name)
    assert np.mean(result.chosen.log_probability) == best
    assert decisions(result)[1].startswith("layer groups: none")
    values = measurements(result, result.chosen, ["docstrings"], 90, 1, True)
    json.dumps(values)
    assert values["rows"][1]["gain"] == 0 and values["found_on_prompts"] == 2
    write_recipe(tmp_path / "r.json", result.recipe_settings(result.chosen), LAYERS, values)
    read = read_recipe(tmp_path / "r.json", LAYERS)
    assert read["budget_split"] == result.chosen.candidate.settings.budget_split  # type: ignore[union-attr]
    picture = demand_picture(result)
    assert len([line for line in picture.splitlines() if line.startswith("head ")]) == KV_HEADS
    assert head_search.scorer_name(result.best(reread=False).candidate) != "reread"
    static = search_heads(engine, [prompt(3)], [prompt(5)], 4_000, second_reading=False)
    assert {row["scorer"] for row in static.rows()} == {"none", "window"}
    asked_in = search_heads(engine, [prompt(3)], [prompt(5)], 4_000, asked_later=False)
    assert asked_in.measured == asked_in.in_prompt and not asked_in.chosen.candidate.reread
    assert "rows" not in measurements(asked_in, asked_in.chosen, ["docstrings"], 90, 1, True)


def test_a_ranking_of_all_heads_is_told_where_it_is_better_than_the_recipe() -> None:
    engine = ChunkKVSettings(layer_groups=((0,), (1,)), boundaries="delimiter", chunk_size=20)
    demand = np.array([[0.9, 0.1, 0.2], [0.1, 0.8, 0.3]])
    layers, chunks, tokens = proposals_after(engine, demand, 2_000, 2_000)[-3:]
    full, own = HeadCandidate("full cache", None), HeadCandidate("the engine's settings", engine)

    def result(*log_p: float) -> HeadSearchResult:
        measured = tuple(
            MeasuredHeads(one, (p / 10,) * 3, (p,) * 3)
            for one, p in zip((full, own, layers, chunks, tokens), (9.0, *log_p), strict=True)
        )
        return HeadSearchResult(demand, demand[None], measured, measured[:2], measured[1], 2_000)

    better_by_heads = result(1.0, 2.0, 3.0, 4.0)
    assert better_by_heads.chosen.candidate is layers, "a recipe holds what flags alone do not say"
    assert decisions(better_by_heads)[-1] == (
        "without a recipe: one ranking of all heads, single tokens by a second reading, +20.0 (+20.0 to +20.0) points "
        "beside the proposal; build with --chunkkv_budget_split ranked --chunkkv_heads each --chunkkv_chunk_size 1 "
        "--chunkkv_pooling 1"
    )
    assert result(1.0, 4.0, 3.0, 2.0).without_recipe() is None


def test_a_prompt_that_goes_on_with_a_question_has_the_cache_and_window_of_the_whole_prompt(
    tokenizer: Tokenizer,
) -> None:
    """The question has fewer tokens than the window, so that some before it run again."""
    prober, ids = Prober(engine_of(tokenizer)), prompt(9).ids
    task = dataclasses.replace(prompt(9).tasks[1], question=(20, 21))
    asked = CalibrationPrompt(ids, (task,))
    assert len(task.question) < prober.settings.window
    goes_on = prober.asked(prober.probe(asked, reread=False), task)
    whole = prober.probe(CalibrationPrompt((*asked.ids, *task.question), ()), reread=False)
    assert np.array_equal(goes_on.ids, whole.ids)
    for name in ("keys", "values", "queries"):
        for found, expected in zip(getattr(goes_on, name), getattr(whole, name), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    (answered,) = prober.answers(goes_on, None)
    (later,) = prober.answers(prober.probe(asked, reread=False), None)
    np.testing.assert_allclose(answered.log_probability, later.log_probability, rtol=1e-4)


def test_one_setting_changes_at_a_time_and_no_window_is_larger_than_the_observed_one() -> None:
    engine = ChunkKVSettings(layer_groups=((0,),), boundaries="delimiter", chunk_size=20, window=16)
    found = [one.settings for one in variations(engine)]
    changed = [
        {
            name
            for name in ("window", "chunk_size", "boundaries", "head_reduce")
            if getattr(one, name) != getattr(engine, name)
        }
        for one in found
    ]
    assert all(len(names) == 1 for names in changed) and set().union(*changed) == {
        "window",
        "chunk_size",
        "boundaries",
        "head_reduce",
    }
    assert max(one.window for one in found if one is not None) == 16
    assert shortened(engine).window == 8


def test_layers_that_read_stay_alone_or_lead() -> None:
    engine = ChunkKVSettings(layer_groups=tuple((layer,) for layer in range(7)))
    demand = np.array([[0.1], [0.1], [0.9], [0.1], [0.1], [0.15], [0.1]])
    first, reads, quiet = (one.settings for one in groupings(engine, demand, 2_000))
    assert first is not None and first.leaders == (0, 2, 4, 6)
    assert reads is not None and reads.leaders == (0, 2, 5, 6)
    assert quiet is not None and quiet.layer_groups == ((0, 1), (2,), (3, 4, 5, 6)) and quiet.leaders == (0, 2, 5)
    assert group_fields(groupings(engine, demand, 2_000)[2]) == {"layer_reuse": "0-1,2,3-6", "leaders": [0, 2, 5]}


def test_settings_are_replaced_only_by_surely_better_ones() -> None:
    def measured(name: str, *right: float) -> MeasuredHeads:
        return MeasuredHeads(HeadCandidate(name, None), right, right)

    base = measured("base", *[0.5] * 6)
    lucky, sure = measured("lucky", 1.0, 0.9, 0.5, 0.4, 0.2, 0.5), measured("sure", 0.6, 0.55, 0.6, 0.6, 0.5, 0.6)
    assert better(base, [lucky]) is base and better(base, [lucky, sure]) is sure
    assert better(measured("few", 0.5), [measured("one prompt", 0.6)]).candidate.name == "few"


def test_nothing_is_proposed_where_the_full_cache_answers_too_little(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"the full cache answers .* would rest on no evidence"):
        search_heads(engine_of(tokenizer), [prompt(7)], [prompt(8)], 4_000)


@pytest.mark.parametrize("changes", [{"budget_split": "ranked"}, {"layer_groups": ((0, 1), (2,))}, {"heads": "each"}])
def test_other_engines_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="build the engine with"):
        check_prober_settings(settings_of(**changes))


def test_prompts_are_cut_from_texts_that_no_suite_has(tokenizer: Tokenizer) -> None:
    texts = calibration_texts()
    prompts = [calibration_prompt(tokenizer, texts, 900, number, 1, True) for number in range(2)]
    assert all(500 < len(one.ids) <= 900 for one in prompts) and prompts[0].ids != prompts[1].ids
    assert prompts[0] == calibration_prompt(tokenizer, texts, 900, 0, 1, True)
    for one in prompts:
        assert {task.name for task in one.tasks} == {"code", "keeper", "copy"}
        text = tokenizer.decode(one.ids)
        for task in one.tasks[:2]:
            assert tokenizer.decode(task.answer) in text


def test_the_command_refuses_to_propose_without_evidence(run: CommandLine, tmp_path: Path) -> None:
    model = engines.checkpoint_dir("llama3", max_position_embeddings=4096)
    engine = engines.engine_dir("llama3", checkpoint_dir=model, max_seq_len=4096, max_num_tokens=256)
    output = tmp_path / "r.json"
    words = ["--engine_dir", engine, "--output", output, "--prompts", 1, "--lengths", 2000, "--threads", 1]
    done = run("calibrate", *words)
    assert done.code == 2 and "would rest on no evidence" in done.err and not output.exists()
    assert "calibrate: 3 prompts to find heads, 1 to measure: about" in done.err
    refused = run("calibrate", *words, "--data", "recall", "--no_reread")
    assert refused.code == 2 and "--no_reread has no effect with --data" in refused.err


def test_settings_of_a_probe_are_those_of_the_engine(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    assert engine.settings is not None
    assert Prober(engine).settings == dataclasses.replace(engine.settings)


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        ("blockwise_prefill", "hand out a prompt's whole cache"),
        ("rereads", "read a prompt a second time"),
        ("head_lengths", "hold another number of tokens in every head"),
    ],
)
def test_an_engine_that_cannot_probe_is_refused_before_any_work(lacks: str, named: str, tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    able = engine.executor.capabilities

    class Other:  # has no method at all: only what it declares may be asked
        capabilities = dataclasses.replace(able, **{lacks: False})

    other: Any = Other()
    with pytest.raises(BackendUnavailableError, match=f"cannot {named}.*backend onnxruntime"):
        search_heads(ChunkKVSession(other, engine.settings, LIMITS, tokenizer), [prompt(3)], [prompt(4)], 4_000)
