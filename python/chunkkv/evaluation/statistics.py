"""Statistics of an evaluation: confidence intervals, one trial per prompt, and how far layers agree on what to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.96


def wilson(right: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion; `right` may be a sum of shares, one per prompt.

    For shares in [0, 1] the interval is at least as wide as it need be, as no share varies more than a yes or no.
    """
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_difference(differences: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """Return the mean of per-prompt differences in [-1, 1], and its 95 % interval.

    Agresti and Min's interval for matched pairs: half a pair is added to each of the four outcomes, so that prompts
    which all agree do not give an interval of no width.
    """
    count = len(differences) + 2
    total = math.fsum(differences)
    squares = math.fsum(d * d for d in differences) + 1
    centre = total / count
    spread = z * math.sqrt(max(squares - total * total / count, 0.0)) / count
    return total / len(differences), max(-1.0, centre - spread), min(1.0, centre + spread)


def jaccard(kept: Sequence[np.ndarray], first: int, end: int) -> np.ndarray:
    """Return [layers,layers]: shared over joint positions of every two layers' choices, of those in [first, end).

    Outside stand the sinks and the window, which all keep anyway. Two choices without any position agree fully.
    """
    chosen = np.zeros((len(kept), max(end - first, 0)), dtype=np.int64)
    for layer, positions in enumerate(kept):
        inside = positions[(positions >= first) & (positions < end)]
        chosen[layer, inside - first] = 1
    shared = chosen @ chosen.T
    sizes = chosen.sum(axis=1)
    joint = sizes[:, None] + sizes[None, :] - shared
    return np.where(joint == 0, 1.0, shared / np.maximum(joint, 1))
