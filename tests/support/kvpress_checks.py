"""What must hold between a recording of kvpress, its restatement and the reference; golden and live tests share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv import reference
from support import kvpress_restatement as restatement
from support.kvpress_restatement import PressSettings, Recording

GOLDEN = Path(__file__).parent.parent / "golden" / "kvpress_float32.npz"


def load_golden(path: Path = GOLDEN) -> tuple[dict[str, str], dict[str, tuple[PressSettings, Recording]]]:
    """Return the package versions the golden file was made with, and its recordings by name."""
    with np.load(path, allow_pickle=False) as stored:
        index = json.loads(str(stored["index"]))
        recordings = {}
        for number, case in enumerate(index["cases"]):
            arrays = [stored.get(f"{number}.{field}") for field in Recording._fields]
            name = case.pop("name")
            recordings[name] = (PressSettings(**case), Recording(*arrays))
    return index["made_with"], recordings


def score_tolerance(press: PressSettings) -> float:
    """1e-6 relative per token with the window and the pooling that docs/method.md names.

    A smaller window or no pooling averages fewer probabilities, so more of kvpress's own float32 rounding is left.
    Logits stay below about 40 in size: rounding them alone moves a probability by |logit| * 2**-24.
    """
    return 1e-6 if (press.window_size, press.kernel_size) == (64, 5) else 1e-5


def check_scores(press: PressSettings, recorded: Recording) -> None:
    """The restatement's scores per KV head and the reference's token scores are kvpress's."""
    tolerance = score_tolerance(press)
    restated = restatement.head_scores(recorded.query, recorded.key, press)
    np.testing.assert_allclose(restated, recorded.scores, rtol=tolerance, atol=0)
    ranked = recorded.key.shape[2] - press.window_size
    for row, mine in enumerate(reference_scores(press, recorded)):
        theirs = recorded.scores[row].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(mine[:ranked], theirs[:ranked], rtol=tolerance, atol=0)


def reference_scores(press: PressSettings, recorded: Recording) -> list[NDArray[np.float32]]:
    """Return the op's token scores [T] of every row."""
    rows = zip(recorded.query, recorded.key, strict=True)
    options = {"pooling": press.kernel_size, "head_reduce": "mean"}
    return [reference.token_scores(query, key, press.window_size, **options) for query, key in rows]


def check_restated_choice(press: PressSettings, recorded: Recording) -> bool:
    """The restatement keeps what kvpress keeps; returns True where that was left to kvpress's order of ties."""
    restated = restatement.kept_indices(recorded.query, recorded.key, press)
    if press.compression_ratio == 0 or recorded.key.shape[2] < press.chunk_length:
        assert np.array_equal(restated, recorded.kept)
        return False
    scores = restatement.head_scores(recorded.query, recorded.key, press)[0].sum(axis=0)
    return _same_choice(press, scores, restated[0, 0], recorded)


def check_reference_choice(press: PressSettings, recorded: Recording) -> bool:
    """The reference's scores under kvpress's budget rule keep what kvpress keeps; returns as check_restated_choice.

    Row 0 decides for a batch, as in kvpress.
    """
    scores = restatement.with_window(reference_scores(press, recorded)[0], press.window_size)
    return _same_choice(press, scores, restatement.keep_chunks(scores, press), recorded)


def _same_choice(press: PressSettings, scores: NDArray[Any], mine: NDArray[Any], recorded: Recording) -> bool:
    assert (recorded.kept == recorded.kept[:1, :1]).all()
    theirs = recorded.kept[0, 0]
    if np.array_equal(mine, theirs):
        return False
    assert restatement.order_is_arbitrary(scores, press), f"kvpress keeps {theirs}, restated {mine}: not a tie"
    means = reference.chunk_scores(scores, restatement.chunk_bounds(len(scores), press), len(scores))
    chosen = [np.sort(means[np.unique(kept // press.chunk_length)]) for kept in (mine, theirs)]
    np.testing.assert_allclose(chosen[0], chosen[1], rtol=reference.NEAR_CUT)
    return True
