"""The probe in every order of threads, and under ThreadSanitizer, which here knows CUDA's barriers and launches."""

from __future__ import annotations

import pytest

from native import probe
from native.build import emulated_library
from native.devices import LARGE, SMALL

pytestmark = pytest.mark.deep


COPYING = (*(check.__name__ for check in probe.OF_SCORE), "packed", "garbage_score")  # what copies asynchronously
EARLY = ("score", "score_types", "quantized", "choices")  # of these, with a race of its own
OF_EVERY_SIZE = ("score", "select", "compact", "compact_large", "packed")  # what a large device divides otherwise
# Garbage may let rows share a page; the others do in more places what a check beside them does.
LEFT_OUT = {*(check.__name__ for check in probe.GARBAGE), "compact_layers", "select_special"}


@pytest.mark.parametrize(
    ("copies", "multiprocessors", "checks"),
    [
        ("late", SMALL, tuple(probe.CHECKS)),
        ("early", SMALL, COPYING),
        ("late", LARGE, OF_EVERY_SIZE),
        ("early", LARGE, ("score", "packed")),
    ],
    ids=("late", "early", "late on a large device", "early on a large device"),
)
@pytest.mark.parametrize("order", probe.ORDERS)
def test_every_order_is_right(order: str, copies: str, multiprocessors: int, checks: tuple[str, ...]) -> None:
    library = emulated_library()
    outcome = probe.run(library, *checks, order=order, copies=copies, multiprocessors=multiprocessors)
    assert outcome.status == 0, outcome.text


@pytest.mark.parametrize(
    ("check", "copies", "multiprocessors"),
    [
        *((name, "late", SMALL) for name in probe.CHECKS if name not in LEFT_OUT),
        *((check, "early", SMALL) for check in EARLY),
        *((check, "late", LARGE) for check in OF_EVERY_SIZE),
    ],
)
def test_no_thread_races_with_another(check: str, copies: str, multiprocessors: int) -> None:
    """Copies that land late hide that a stage is overwritten."""
    sizes = {"multiprocessors": multiprocessors}
    outcome = probe.run(emulated_library("tsan"), check, copies=copies, preload="libtsan.so", **sizes)
    assert outcome.status == 0, outcome.text
