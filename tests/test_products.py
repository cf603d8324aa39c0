"""Products of whole numbers: the exact but slow kernel is asked for only where the fast one is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from chunkkv.executors.onnxruntime import graphs, products
from chunkkv.executors.onnxruntime.products import has_vnni, one_product_overflows, products_overflow

EXACT = "session.x64quantprecision"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    products_overflow.cache_clear()
    yield
    products_overflow.cache_clear()


def test_a_processor_with_vnni_does_not_overflow() -> None:
    if not has_vnni():
        pytest.skip("this processor has no VNNI, or the system does not say so")
    assert not one_product_overflows()


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_vnni_is_what_the_system_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, has: bool
) -> None:
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text, "utf-8")
    assert has_vnni() is has


def test_a_product_is_tried_only_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "one_product_overflows", lambda: True)
    monkeypatch.setattr(products, "has_vnni", lambda: True)
    assert not products_overflow()
    products_overflow.cache_clear()
    monkeypatch.setattr(products, "has_vnni", lambda: False)
    assert products_overflow()


@pytest.mark.parametrize(("sum_of_products", "overflows"), [(64 * 255 * 127, False), (32 * (2**15 - 1), True)])
def test_sums_that_saturate_are_found(monkeypatch: pytest.MonkeyPatch, sum_of_products: int, overflows: bool) -> None:
    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((1, 16), sum_of_products, np.int32)]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    assert one_product_overflows() is overflows


@pytest.mark.parametrize("overflows", [True, False])
def test_graphs_ask_for_exact_products_only_there(monkeypatch: pytest.MonkeyPatch, overflows: bool) -> None:
    monkeypatch.setattr(graphs, "products_overflow", lambda: overflows)
    options = graphs.session_options(1)
    if overflows:
        assert options.get_session_config_entry(EXACT) == "1"
    else:
        with pytest.raises(RuntimeError, match=EXACT):
            options.get_session_config_entry(EXACT)
