"""NVIDIA kvpress, recorded in float32 by golden/make_kvpress_golden.py, against its restatement and the reference."""

from __future__ import annotations

import numpy as np
import pytest
from support import kvpress_restatement as restatement
from support.kvpress_checks import (
    GOLDEN,
    check_reference_choice,
    check_restated_choice,
    check_scores,
    load_golden,
    reference_scores,
)
from support.kvpress_restatement import PressSettings

MADE_WITH, RECORDINGS = load_golden()
SCORED = [name for name, (press, _) in RECORDINGS.items() if press.compression_ratio > 0]
CHUNKED = [name for name in SCORED if RECORDINGS[name][1].key.shape[2] >= RECORDINGS[name][0].chunk_length]
TIED = "budget inside the window"


def test_the_file_is_small_and_made_by_the_pinned_kvpress() -> None:
    assert MADE_WITH["kvpress"] == "0.5.5"
    assert GOLDEN.stat().st_size < 300_000
    assert len(RECORDINGS) >= 15


@pytest.mark.parametrize("name", SCORED)
def test_scores_agree(name: str) -> None:
    check_scores(*RECORDINGS[name])


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_restatement_keeps_what_kvpress_keeps(name: str) -> None:
    left_to_ties = check_restated_choice(*RECORDINGS[name])
    assert not left_to_ties or name == TIED


@pytest.mark.parametrize("name", CHUNKED)
def test_reference_scores_under_kvpress_budget_keep_the_same(name: str) -> None:
    left_to_ties = check_reference_choice(*RECORDINGS[name])
    assert not left_to_ties or name == TIED


def test_the_tied_case_is_recognised_as_arbitrary_and_the_others_are_not() -> None:
    for name in CHUNKED:
        press, recorded = RECORDINGS[name]
        scores = restatement.with_window(reference_scores(press, recorded)[0], press.window_size)
        assert restatement.order_is_arbitrary(scores, press) == (name == TIED)
        assert restatement.budget_is_inside_window(len(scores), press) == (name == TIED)


def test_kvpress_underfills_its_budget_where_the_last_chunk_wins() -> None:
    press, recorded = RECORDINGS[TIED]
    assert restatement.chunks_kept(194, press) == 1  # int(20 * (1 - 0.9)) with floats, not 2
    assert recorded.kept.shape[2] <= 10 < int(194 * (1 - press.compression_ratio))


def test_row_0_decides_for_the_batch() -> None:
    press, recorded = RECORDINGS["row 0 decides for the batch"]
    second = recorded._replace(query=recorded.query[1:], key=recorded.key[1:], kept=recorded.kept[1:])
    assert np.array_equal(recorded.kept[0], recorded.kept[1])
    with pytest.raises(AssertionError, match="not a tie"):
        check_reference_choice(press, second)


def test_a_wrong_choice_or_score_is_caught() -> None:
    press, recorded = RECORDINGS["defaults"]
    moved = recorded._replace(kept=np.where(recorded.kept == recorded.kept.min(), 59, recorded.kept))
    assert 59 not in recorded.kept
    for check in (check_restated_choice, check_reference_choice):
        with pytest.raises(AssertionError, match="not a tie"):
            check(press, moved)
    with pytest.raises(AssertionError):
        check_scores(press, recorded._replace(scores=recorded.scores * np.float32(1.00001)))


@pytest.mark.parametrize(
    ("length", "press", "kept"),
    [
        (200, PressSettings(0.5), 5),
        (201, PressSettings(0.5), 5),
        (60, PressSettings(0.9, 8, 5, 20), 1),
        (100, PressSettings(0.3, 8, 5, 10), 7),
        (100, PressSettings(0.8, 8, 5, 10), 1),  # int(1.9999999999999996)
    ],
)
def test_kvpress_counts_its_budget_in_chunks(length: int, press: PressSettings, kept: int) -> None:
    assert restatement.chunks_kept(length, press) == kept
