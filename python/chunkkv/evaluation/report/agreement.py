"""How much the layers' choices agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
