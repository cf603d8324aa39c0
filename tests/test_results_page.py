"""The results page says what was measured: page and pictures from the JSON, and the JSON again from the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import pictures, tables
from benchmarks.results import runs as plans
from benchmarks.results.__main__ import JSON_FILE
from benchmarks.results.measure import engine, text
from benchmarks.results.page import PAGE, render
from benchmarks.results.trials import compact, runs_by_name
from chunkkv.evaluation.evaluator import Evaluator, Plan
from chunkkv.evaluation.statistics import wilson
from chunkkv.evaluation.texts.suites import Cell, Suite
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings

MEASURED = json.loads(JSON_FILE.read_text(encoding="utf-8"))
COMMITTED = {run["name"]: run for run in MEASURED["runs"]}
RUNS = runs_by_name(MEASURED)


@pytest.fixture(scope="module")
def drawings() -> dict[str, tuple[str, dict[str, Any]]]:
    """What each picture is drawn from."""
    return pictures.pictures(MEASURED)


def test_the_page_says_what_the_json_gives() -> None:
    page, rendered = PAGE.read_text(encoding="utf-8"), render(MEASURED)

    def tables_of(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    assert tables_of(page) == tables_of(rendered)
    assert page.split() == rendered.split()  # wherever the lines of the prose break


def test_the_json_text_holds_all_that_was_measured() -> None:
    assert json.loads(text(MEASURED)) == MEASURED


def test_the_page_links_what_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (PAGE.parent / link).exists()] == []


def test_the_pictures_are_drawn_from_the_json(drawings: dict[str, tuple[str, dict[str, Any]]]) -> None:
    for name, (_, data) in drawings.items():
        content = (pictures.FOLDER / name).read_bytes()
        assert f"Data\0{pictures.mark(data)}".encode() in content, (
            f"{name}: run python -m benchmarks.results --page_only"
        )
        assert len(content) < 200_000


def test_drawing_again_marks_the_same_data(
    drawings: dict[str, tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "results-needle.png"
    monkeypatch.setattr(pictures, "pictures", lambda measured: {name: drawings[name]})
    (path,) = pictures.draw(MEASURED, tmp_path)
    assert path.name == name and path.read_bytes()[:150].count(pictures.mark(drawings[name][1]).encode()) == 1


def test_the_json_holds_every_planned_run() -> None:
    for run in plans.RUNS:
        header = COMMITTED[run.name]["header"]
        assert header["suites"] == list(run.suites) and header["examples"] == run.examples >= 20
        measured = [policy["name"] for policy in header["policies"]]
        assert [name for name in measured if name in ("full", *run.policies)] == ["full", *run.policies]
        assert (header["keeps"], header["lengths"], header["modes"]) == (
            *map(list, (run.keeps, run.lengths, run.modes)),
        )
    assert MEASURED["engine_flags"] == plans.ENGINE_FLAGS
    assert sum(run["seconds"] for run in MEASURED["runs"]) < 15 * 60


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ChunkKVSession:
    """The engine that the page reports on."""
    return engine(tmp_path_factory.mktemp("results") / "engine")


def first_cell(suite: Suite, lengths: Sequence[int], settings: ChunkKVSettings) -> list[Cell]:
    return suite.cells(lengths, settings)[:1]


def check_against_committed(run: plans.Run, plan: Plan, session: ChunkKVSession, folder: Path) -> None:
    """Measure a part of a run again: every outcome is the beginning of the committed one of its cell and policy."""
    assert session.settings is not None
    again = compact(plan.header(session.settings), Evaluator(session, plan).run(folder))
    committed = {
        json.dumps([group["suite"], group["mode"], group["cell"]]): group for group in COMMITTED[run.name]["groups"]
    }
    assert again["groups"]
    for group in again["groups"]:
        known = committed[json.dumps([group["suite"], group["mode"], group["cell"]])]
        assert group["pieces"] == known["pieces"]
        through = {(row["policy"], row["keep"]): row["through"] for row in known["outcomes"]}
        for row in group["outcomes"]:
            place = (run.name, group["suite"], group["mode"], group["cell"], row["policy"], row["keep"])
            assert through[row["policy"], row["keep"]].startswith(row["through"]), place


@pytest.mark.parametrize("run", plans.RUNS, ids=lambda run: run.name)
def test_measuring_again_gives_the_committed_outcomes(run: plans.Run, session: ChunkKVSession, tmp_path: Path) -> None:
    """The first prompt of each suite and mode, at the smallest share kept, with all policies."""
    plan = run.plan(session)
    suites = tuple(replace(suite, cells=partial(first_cell, suite)) for suite in plan.suites)
    plan = replace(plan, suites=suites, examples=1, keeps=(min(run.keeps),))
    check_against_committed(run, plan, session, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("run", plans.RUNS, ids=lambda run: run.name)
def test_measuring_all_lengths_and_shares_again_gives_the_committed_outcomes(
    run: plans.Run, session: ChunkKVSession, tmp_path: Path
) -> None:
    plan = replace(run.plan(session), examples=2)
    check_against_committed(run, plan, session, tmp_path)


def test_compacting_loses_nothing_that_is_counted() -> None:
    for run in RUNS.values():
        for row in run.summary["suites"]:
            keep = round(row["keep_ratio"] * 10_000)
            shares = run.shares(row["policy"], keep, row["mode"], suite=row["suite"])
            assert len(shares) == row["n"] and round(sum(shares) / len(shares), 4) == row["accuracy"]
            assert (row["low"], row["high"]) == tuple(round(end, 4) for end in wilson(sum(shares), len(shares)))


def test_a_difference_is_marked_where_its_interval_leaves_out_zero() -> None:
    assert tables.signed((0.1, -0.05, 0.25)) == "+10.0 (−5.0 to +25.0)"
    assert tables.signed((0.1, 0.05, 0.15)) == "**+10.0 (+5.0 to +15.0)**"
    assert tables.signed((-0.1, -0.15, -0.05)) == "**−10.0 (−15.0 to −5.0)**"


def sign(policy: str, other: str, keep: int, mode: str, run: str = "recall", **where: str) -> int:
    """Return +1 or -1 where the interval of the difference leaves out zero, else 0."""
    _, low, high = RUNS[run].difference(policy, other, keep, mode, **where)
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
    assert sign(plans.LOGITS, plans.FIXED, keep, mode) < 0


@pytest.mark.parametrize(("answer", "ahead"), [("home", -1), ("code", 1), ("sentence", 1)])
def test_what_the_page_says_of_short_and_long_answers_holds(answer: str, ahead: int) -> None:
    assert sign(plans.FIXED, plans.TOKENS, 2_000, "in", answer=answer) == ahead


def test_what_the_page_says_of_dense_facts_holds() -> None:
    for chunks in (plans.FIXED, plans.FIXED_20, plans.CLAUSES):
        assert sign(chunks, plans.TOKENS, 1_250, "in", "others", suite="dense") < 0
    assert sign(plans.FIXED_20, plans.FIXED, 1_250, "in", "others", suite="dense") < 0
    assert sign(plans.FIXED, plans.TOKENS, 2_000, "in", "others", suite="dense") == 0
    assert sign(plans.FIXED_20, plans.TOKENS, 2_000, "after", "others", suite="rule") < 0
    for keep in (2_000, 1_250):
        assert sign(plans.FIXED, plans.TOKENS, keep, "after", "others", suite="rule") <= 0
        for suite in ("questions", "distractors"):
            assert sign(plans.FIXED, plans.TOKENS, keep, "in", "others", suite=suite) >= 0
            assert sign(plans.CLAUSES, plans.TOKENS, keep, "in", "others", suite=suite) >= 0
