"""The probe in every order of threads, and under ThreadSanitizer, which here knows CUDA's barriers and warps."""

from __future__ import annotations

import pytest

from native import probe
from native.build import emulated_library

pytestmark = pytest.mark.deep


@pytest.mark.parametrize("copies", probe.ASYNC)
@pytest.mark.parametrize("order", probe.ORDERS)
def test_every_order_is_right(order: str, copies: str) -> None:
    outcome = probe.run(emulated_library(), order=order, copies=copies)
    assert outcome.status == 0, outcome.text


@pytest.mark.parametrize(
    ("check", "copies"),
    [(check, "late") for check in probe.CHECKS if check != "garbage"] + [("score", "early"), ("score_types", "early")],
)
def test_no_thread_races_with_another(check: str, copies: str) -> None:
    """Garbage is left out: it may let rows share a page. Copies that land late hide that a stage is overwritten."""
    outcome = probe.run(emulated_library("tsan"), check, copies=copies, preload="libtsan.so")
    assert outcome.status == 0, outcome.text
