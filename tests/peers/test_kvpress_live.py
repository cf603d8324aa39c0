"""The real kvpress, run now in float32, against its restatement, the reference and the golden file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from golden.make_kvpress_golden import record
from support.kvpress_checks import check_reference_choice, check_restated_choice, check_scores, load_golden
from support.kvpress_live import MODEL_CONFIGS, run_model, run_press
from support.kvpress_restatement import PressSettings, budget_is_inside_window

RANDOM_CASES = 300


class Drawn(NamedTuple):
    """A random direct call."""

    press: PressSettings
    query: np.ndarray
    key: np.ndarray


def _draw(number: int) -> Drawn:
    rng = np.random.default_rng([1502, number])
    window, kernel = ((64, 5), (int(rng.integers(1, 65)), int(rng.choice([1, 3, 5, 7]))))[number % 2]
    chunk = int(rng.choice([3, 5, 10, 16, 20, 32]))
    press = PressSettings(float(rng.choice([0.1, 0.3, 0.5, 0.75, 0.8, 0.9])), window, kernel, chunk)
    kv_heads, per_kv_head = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    length, dim = int(rng.integers(max(window + 1, chunk), 700)), int(rng.choice([8, 16, 64]))
    query = rng.normal(size=(1, kv_heads * per_kv_head, window, dim)) * rng.choice([0.3, 1.0, 2.0])
    key = rng.normal(size=(1, kv_heads, length, dim))
    return Drawn(press, query.astype(np.float32), key.astype(np.float32))


def test_random_calls(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(("budget inside the window", "of these another choice", "another choice near the cut"), 0)
    for number in range(RANDOM_CASES):
        press, query, key = _draw(number)
        recorded = run_press(query, key, press)
        check_scores(press, recorded)
        restated = check_restated_choice(press, recorded)
        differs = check_reference_choice(press, recorded) or restated
        inside = budget_is_inside_window(key.shape[2], press)
        counts["budget inside the window"] += inside
        counts["of these another choice"] += inside and differs
        counts["another choice near the cut"] += differs and not inside
    for name, count in counts.items():
        record_property(name, count)
    with capsys.disabled():
        print(f"\n{RANDOM_CASES} kvpress runs: {counts}")
    assert counts["budget inside the window"] < RANDOM_CASES // 2
    assert counts["another choice near the cut"] <= 2


@pytest.mark.parametrize("family", MODEL_CONFIGS)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("press", [PressSettings(0.5), PressSettings(0.7, 32, 5, 10)], ids=str)
def test_layers_of_a_model(family: str, seed: int, press: PressSettings) -> None:
    for recorded in run_model(family, 260, press, seed):
        check_scores(press, recorded)
        assert not check_restated_choice(press, recorded)
        assert not check_reference_choice(press, recorded)


def test_the_golden_file_is_what_kvpress_does_today() -> None:
    _, golden = load_golden()
    made = record()
    assert [name for name, _, _ in made] == list(golden)
    for name, press, recorded in made:
        stored_press, stored = golden[name]
        assert press == stored_press
        np.testing.assert_allclose(recorded.query, stored.query, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(recorded.key, stored.key, rtol=1e-5, atol=1e-5)
        if stored.scores is not None:
            np.testing.assert_allclose(recorded.scores, stored.scores, rtol=1e-4)
        assert recorded.kept.shape == stored.kept.shape
