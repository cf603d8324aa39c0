"""What results.md says of the real model holds in the committed outcomes; test_results_page.py compares the tables."""

from __future__ import annotations

import pytest

from benchmarks.real import page
from benchmarks.real.measure import AFTER, FOLLOWS, IN
from benchmarks.real.policies import (
    FULL,
    GREEDY,
    MEAN,
    METHODS,
    OPENVINO,
    PRESSES,
    RANDOM,
    RANKED,
    RANKED_HEADS,
    RANKED_TOKENS,
    RECIPE,
    RECIPE_10,
    STATIC,
    STREAMING,
    VARIANTS,
)
from benchmarks.real.tables import TASKS, count, differences, right_tokens

OUTCOMES = page.outcomes()
SHARES = (2_000, 1_000)
KNOWN = tuple(TASKS[:2])  # codes and names
PEERS = [name for name in PRESSES if name != "kvpress KVzip"]


def sign(mode: str, policy: str, other: str, keep: int, tasks: tuple[str, ...] = TASKS, least: int = 12) -> int:
    """Return +1 or -1 where the interval of `policy` minus `other` leaves out zero, else 0."""
    found = OUTCOMES.difference(mode, policy, other, keep, right_tokens, tasks)
    assert found is not None and found[1] >= least
    _, low, high = found[0]
    return (low > 0) - (high < 0)


def test_twelve_contexts_or_more_are_measured() -> None:
    for keep in SHARES:
        for policy in (FULL, *METHODS, *PEERS):
            assert count(OUTCOMES, IN, policy, keep) >= 12
        assert count(OUTCOMES, AFTER, "kvpress KVzip", keep) >= 12
    assert {context["kind"] for context in OUTCOMES.contexts} == {"novel", "speech", "manual", "code"}


@pytest.mark.parametrize("keep", SHARES)
def test_what_the_page_says_of_questions_in_the_prompt_holds(keep: int) -> None:
    assert sign(IN, page.BASE, FULL, keep, KNOWN) == 0
    assert sign(IN, page.BASE, FULL, keep, ("copy",)) < 0
    assert sign(IN, page.BASE, MEAN, keep) == 0
    for other in (*PEERS, "SnapKV, heads sharing", STREAMING, RANDOM):
        assert sign(IN, page.BASE, other, keep) > 0, other
    for name in ("kvpress SnapKV", "kvpress AdaKV"):
        assert sign(IN, f"{name}, window 16", name, keep) > 0


@pytest.mark.parametrize("keep", SHARES)
def test_what_the_page_says_of_later_questions_holds(keep: int) -> None:
    for policy in (page.BASE, "kvpress SnapKV", "kvpress AdaKV", "kvpress ChunkKV", "kvpress TOVA"):
        assert sign(AFTER, policy, STREAMING, keep) <= 0
    assert sign(AFTER, "kvpress KeyDiff", page.BASE, keep) > 0
    for other in (page.BASE, STREAMING, *PEERS):
        assert sign(AFTER, "kvpress KVzip", other, keep) > 0


def test_what_the_page_says_of_reading_heads_and_of_one_ranking_holds() -> None:
    assert sign(AFTER, STATIC, FULL, 2_000, KNOWN) == 0 > sign(AFTER, STATIC, FULL, 2_000, ("copy",))
    assert (
        sign(AFTER, STATIC, "kvpress KVzip", 2_000, least=7) == 0 > sign(AFTER, STATIC, "kvpress KVzip", 1_000, least=7)
    )
    for other in (RECIPE, STATIC, RANKED):
        assert sign(AFTER, RECIPE_10, other, 1_000) > 0 > sign(AFTER, RECIPE_10, "kvpress KVzip", 1_000, least=7)
    for keep in SHARES:
        assert sign(AFTER, RANKED, page.BASE, keep, least=7) > 0 > sign(AFTER, RANKED, "kvpress KVzip", keep, least=7)
        assert sign(AFTER, RANKED_HEADS, RANKED, keep) > 0 >= sign(AFTER, RANKED_HEADS, "kvpress KVzip", keep, least=7)
        assert sign(AFTER, RANKED_TOKENS, "kvpress KVzip", keep, least=7) >= 0
    for other in (RECIPE, STATIC, RECIPE_10):
        assert sign(AFTER, RANKED_TOKENS, other, 1_000) > 0
    assert sign(AFTER, RANKED_TOKENS, FULL, 2_000, KNOWN) == 0 == sign(AFTER, RANKED_TOKENS, FULL, 2_000, ("copy",))


@pytest.mark.parametrize("keep", SHARES)
def test_what_the_page_says_of_openvino_holds(keep: int) -> None:
    for name in OPENVINO:
        if count(OUTCOMES, GREEDY, name, keep, KNOWN) >= 4:
            assert sign(GREEDY, page.BASE, name, keep, KNOWN) > 0
            for task in KNOWN:
                kept = [
                    (ours.kept, theirs.kept)
                    for ours, theirs in zip(
                        OUTCOMES.of(GREEDY, task, page.BASE, keep), OUTCOMES.of(GREEDY, task, name, keep), strict=True
                    )
                    if ours and theirs
                ]
                assert all(0 <= theirs - ours < 32 for ours, theirs in kept)


def test_what_the_page_says_of_the_text_that_follows_holds() -> None:
    def grown(policy: str, keep: int) -> float:
        found = OUTCOMES.difference(FOLLOWS, STREAMING, policy, keep, lambda one: one.log_probability, (FOLLOWS,))
        assert found is not None
        return found[0][1]  # the lower end

    for keep in SHARES:
        assert grown("kvpress KeyDiff", keep) > 0 and grown(RANDOM, keep) > 0 and grown(page.BASE, keep) < 0
    assert grown("kvpress KVzip", 1_000) > 0 > grown("kvpress KVzip", 2_000)


def test_the_readme_quotes_the_page() -> None:
    readme = (page.ROOT / "README.md").read_text(encoding="utf-8")
    for line in page.readme_table(OUTCOMES).splitlines():
        assert line in readme


def test_every_kept_number_is_the_share_of_its_prompt() -> None:
    for name in (*METHODS, *PEERS):
        for keep in SHARES:
            ours, theirs = (OUTCOMES.of(IN, "code", policy, keep) for policy in (page.BASE, name))
            for first, second in zip(ours, theirs, strict=True):
                if first and second:
                    assert first.kept == second.kept or (
                        name == "kvpress ChunkKV" and 0 < second.kept - first.kept < 40
                    )


def test_what_the_pages_say_of_settings_holds() -> None:
    def of(name: str, keep: int) -> int:
        return sign(IN, f"ChunkKV, {name}", page.BASE, keep, least=8)

    for keep in SHARES:
        assert of("window 8", keep) < 0 and of("pairs of layers, last leads", keep) < 0
        assert of("fixed chunks of 10, window 32, mean over heads", keep) < 0
        for level in ("max over the window, mean over heads", "value norm", "a choice per head", "no pooling"):
            assert of(level, keep) == 0
    assert of("fixed chunks of 20", 1_000) < 0 and of("window 32", 1_000) < 0
    method = (page.ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [
        line for line in differences(OUTCOMES, IN, VARIANTS, page.BASE).splitlines() if line.startswith("| ChunkKV")
    ]
    assert rows and all(row in method for row in rows)
