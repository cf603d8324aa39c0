"""The results page says what was measured: page and pictures from the JSON, and the JSON again from the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.results import pictures, tables
from benchmarks.results import runs as plans
from benchmarks.results.__main__ import JSON_FILE
from benchmarks.results.measure import engine, text
from benchmarks.results.page import PAGE, render
from benchmarks.results.trials import compact, difference, shares, summary
from chunkkv.evaluation.evaluator import Evaluator
from chunkkv.evaluation.statistics import wilson

MEASURED = json.loads(JSON_FILE.read_text(encoding="utf-8"))
RUNS = {run["name"]: run for run in MEASURED["runs"]}


def test_the_page_is_what_the_json_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(MEASURED)
    assert text(MEASURED) == JSON_FILE.read_text(encoding="utf-8")


def test_the_page_links_what_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (PAGE.parent / link).exists()] == []


@pytest.mark.parametrize("name", pictures.pictures(MEASURED))
def test_the_pictures_are_drawn_from_the_json(name: str) -> None:
    content = (pictures.FOLDER / name).read_bytes()
    assert f"Data\0{pictures.mark(pictures.pictures(MEASURED)[name][1])}".encode() in content
    assert len(content) < 200_000


def test_drawing_again_marks_the_same_data(tmp_path: Path) -> None:
    for path in pictures.draw(MEASURED, tmp_path):
        assert path.read_bytes()[:150].count(pictures.mark(pictures.pictures(MEASURED)[path.name][1]).encode()) == 1


def test_the_json_holds_every_planned_run() -> None:
    for run in plans.RUNS:
        header = RUNS[run.name]["header"]
        assert header["suites"] == list(run.suites) and header["examples"] == run.examples >= 20
        assert [policy["name"] for policy in header["policies"]] == ["full", *run.policies]
        assert (header["keeps"], header["lengths"], header["modes"]) == (
            *map(list, (run.keeps, run.lengths, run.modes)),
        )
    assert MEASURED["engine_flags"] == plans.ENGINE_FLAGS
    assert sum(run["seconds"] for run in MEASURED["runs"]) < 15 * 60


@pytest.mark.parametrize("run", plans.RUNS, ids=lambda run: run.name)
def test_measuring_again_gives_the_committed_outcomes(
    run: plans.Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    session = engine(tmp_path_factory.getbasetemp() / "results-engine")
    plan = run.plan(session, examples=1)
    assert session.settings is not None
    again = compact(plan.header(session.settings), Evaluator(session, plan).run(tmp_path))
    for group, committed in zip(again["groups"], RUNS[run.name]["groups"], strict=True):
        assert [group[name] for name in ("suite", "mode", "cell", "pieces")] == [
            committed[name] for name in ("suite", "mode", "cell", "pieces")
        ]
        for row, known in zip(group["outcomes"], committed["outcomes"], strict=True):
            assert (row["policy"], row["keep"]) == (known["policy"], known["keep"])
            assert known["through"].startswith(row["through"])


def test_compacting_loses_nothing_that_is_counted() -> None:
    for run in RUNS.values():
        for row in summary(run)["suites"]:
            keep = round(row["keep_ratio"] * 10_000)
            found = shares(run, row["policy"], keep, row["mode"], suite=row["suite"])
            assert len(found) == row["n"] and round(sum(found) / len(found), 4) == row["accuracy"]
            assert (row["low"], row["high"]) == tuple(round(end, 4) for end in wilson(sum(found), len(found)))


def test_a_difference_is_marked_where_its_interval_leaves_out_zero() -> None:
    assert tables.signed((0.1, -0.05, 0.25)) == "+10.0 (−5.0 to +25.0)"
    assert tables.signed((0.1, 0.05, 0.15)) == "**+10.0 (+5.0 to +15.0)**"
    assert tables.signed((-0.1, -0.15, -0.05)) == "**−10.0 (−15.0 to −5.0)**"


def sign(one: str, other: str, keep: int, mode: str, run: str = "recall", **where: str) -> int:
    """Return +1 or -1 where the interval of the difference leaves out zero, else 0."""
    _, low, high = difference(RUNS[run], one, other, keep, mode, **where)
    return (low > 0) - (high < 0)


SHARES = (5_000, 2_000, 1_000)
LOOKUPS = [(keep, mode) for keep in SHARES for mode in ("in", "after")]


@pytest.mark.parametrize(("keep", "mode"), LOOKUPS)
def test_what_the_page_says_of_methods_and_settings_holds(keep: int, mode: str) -> None:
    for tokens in (plans.TOKENS_1, plans.TOKENS, plans.TOKENS_7, plans.PYRAMID, plans.STREAMING, plans.RANDOM):
        assert sign(plans.FIXED, tokens, keep, mode) > 0
    assert sign(plans.CLAUSES, plans.FIXED_20, keep, mode) > 0
    assert sign(plans.CLAUSES_10, plans.FIXED, keep, mode) < 0 or mode == "after"
    assert sign(plans.reuse(2, "last"), plans.reuse(2, "first"), keep, mode) > 0
    assert sign(plans.reuse(2, "last"), plans.FIXED, keep, mode) == 0
    assert sign(plans.reuse(2, "first"), plans.FIXED, keep, mode) < 0
    for leader in ("first", "last"):
        assert sign(plans.reuse(4, leader), plans.FIXED, keep, mode) < 0
    assert sign(plans.GATED, plans.FIXED, keep, mode) < 0
    assert sign(plans.LOGITS, plans.FIXED, keep, mode) < 0


@pytest.mark.parametrize(("answer", "ahead"), [("home", -1), ("code", 1), ("sentence", 1)])
def test_what_the_page_says_of_short_and_long_answers_holds(answer: str, ahead: int) -> None:
    assert sign(plans.FIXED, plans.TOKENS, 2_000, "in", answer=answer) == ahead


def test_the_readme_quotes_the_page() -> None:
    readme = (plans.ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row for row in summary(RUNS["recall"])["suites"] if row["keep_ratio"] in (0.2, 1.0)]
    by_policy = {(row["policy"], row["mode"]): tables.percent(row) for row in rows}
    for policy, name in {**tables.NAMES, plans.TOKENS: "SnapKV, pooling 5, heads sharing"}.items():
        if f"| {name} |" in readme:
            assert f"| {name} | {by_policy[policy, 'in']} | {by_policy[policy, 'after']} |" in readme
    assert readme.count("ChunkKV, fixed chunks of 10 |") == 1


def test_what_the_page_says_of_dense_facts_holds() -> None:
    for chunks in (plans.FIXED, plans.FIXED_20, plans.CLAUSES):
        assert sign(chunks, plans.TOKENS, 1_250, "in", "others", suite="dense") < 0
    assert sign(plans.FIXED_20, plans.FIXED, 1_250, "in", "others", suite="dense") < 0
    assert sign(plans.GATED, plans.FIXED, 1_250, "in", "others", suite="dense") > 0
    assert sign(plans.FIXED, plans.TOKENS, 2_000, "in", "others", suite="dense") == 0
    assert sign(plans.FIXED_20, plans.TOKENS, 2_000, "after", "others", suite="rule") < 0
    for keep in (2_000, 1_250):
        assert sign(plans.FIXED, plans.TOKENS, keep, "after", "others", suite="rule") <= 0
        for suite in ("questions", "distractors"):
            assert sign(plans.FIXED, plans.TOKENS, keep, "in", "others", suite=suite) >= 0
            assert sign(plans.CLAUSES, plans.TOKENS, keep, "in", "others", suite=suite) >= 0
