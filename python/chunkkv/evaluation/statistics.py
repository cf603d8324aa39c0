"""Statistics of an evaluation: confidence intervals, one trial per prompt, and how far layers agree on what to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.96


def wilson(right: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson interval of a proportion.

    Parameters
    ----------
    right : float
        Number of successes, or the sum of one share in [0, 1] per trial. For shares the interval is at least as wide
        as necessary, because a share varies no more than a yes or no.
    count : int
        Number of trials, at least 1.
    z : float
        Quantile of the normal distribution; the default gives 95 %.
    """
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_mean(values: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Return the mean of values, one per prompt, and the ends of its 95 % interval over resampled prompts."""
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(np.asarray(values)[drawn].mean(axis=1), [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def paired_difference(differences: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """Return the mean of differences in [-1, 1], one per prompt, and the ends of its interval.

    `z` is the quantile of the normal distribution; the default gives 95 %. This is Agresti and Min's interval for
    matched pairs: half a pair is added to each of the four outcomes, so that prompts which all agree do not give an
    interval of no width.
    """
    count = len(differences) + 2
    total = math.fsum(differences)
    squares = math.fsum(d * d for d in differences) + 1
    centre = total / count
    spread = z * math.sqrt(max(squares - total * total / count, 0.0)) / count
    return total / len(differences), max(-1.0, centre - spread), min(1.0, centre + spread)


def jaccard(kept: Sequence[np.ndarray], first: int, end: int) -> np.ndarray:
    """Return the Jaccard index of every two layers' kept positions, float64 [layers,layers].

    `kept` holds the positions of each layer. Only those in [first, end) count: sinks and window lie outside, and every
    layer keeps them. Two layers without any position in there agree fully (1).
    """
    is_kept = np.zeros((len(kept), max(end - first, 0)), dtype=np.int64)
    for layer, positions in enumerate(kept):
        inside = positions[(positions >= first) & (positions < end)]
        is_kept[layer, inside - first] = 1
    intersection = is_kept @ is_kept.T
    sizes = is_kept.sum(axis=1)
    union = sizes[:, None] + sizes[None, :] - intersection
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))
