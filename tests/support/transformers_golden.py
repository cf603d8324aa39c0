"""What transformers computed for every variant; tests/golden/make_transformers_golden.py describes the keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "transformers.npz"


class Golden(dict[str, np.ndarray]):
    """The recorded arrays by key."""

    def __missing__(self, key: str) -> np.ndarray:
        variant = key.split("/", maxsplit=1)[0]
        raise KeyError(
            f"{key} is not in {GOLDEN_FILE.name}; record it with: make test-peers; .venv-peers/bin/python "
            f"tests/golden/make_transformers_golden.py --only {variant}"
        )


def load_golden() -> Golden:
    """Return all recorded arrays."""
    with np.load(GOLDEN_FILE, allow_pickle=False) as stored:
        return Golden(stored)
