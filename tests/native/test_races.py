"""The probe in every order of threads, and under ThreadSanitizer, which here knows CUDA's barriers and warps."""

from __future__ import annotations

import pytest

from native import probe
from native.build import emulated_library
from native.devices import LARGE, SMALL

pytestmark = pytest.mark.deep


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE])
@pytest.mark.parametrize("copies", probe.ASYNC)
@pytest.mark.parametrize("order", probe.ORDERS)
def test_every_order_is_right(order: str, copies: str, multiprocessors: int) -> None:
    outcome = probe.run(emulated_library(), order=order, copies=copies, multiprocessors=multiprocessors)
    assert outcome.status == 0, outcome.text


EARLY = ("score", "score_types", "quantized", "choices")
OF_EVERY_SIZE = ("score", "select", "compact", "compact_large", "packed")  # what a large device divides otherwise


@pytest.mark.parametrize(
    ("check", "copies", "multiprocessors"),
    [
        *((check, "late", SMALL) for check in probe.CHECKS if check != "garbage"),
        *((check, "early", SMALL) for check in EARLY),
        *((check, "late", LARGE) for check in OF_EVERY_SIZE),
    ],
)
def test_no_thread_races_with_another(check: str, copies: str, multiprocessors: int) -> None:
    """Garbage is left out: it may let rows share a page. Copies that land late hide that a stage is overwritten."""
    sizes = {"multiprocessors": multiprocessors}
    outcome = probe.run(emulated_library("tsan"), check, copies=copies, preload="libtsan.so", **sizes)
    assert outcome.status == 0, outcome.text
