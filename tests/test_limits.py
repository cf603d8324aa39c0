"""The allowed values of settings are the same in C++ as in Python: limits.h is what its generator writes."""

from __future__ import annotations

import runpy
from pathlib import Path

from chunkkv.limits import CHOICES, KERNEL_CHOICES

ROOT = Path(__file__).resolve().parent.parent


def test_the_header_of_the_plugins_is_generated_from_the_table() -> None:
    generator = runpy.run_path(str(ROOT / "plugins" / "generate_limits.py"))
    header = generator["HEADER"].read_text(encoding="utf-8")
    assert header == generator["header_text"](), "limits.h is out of date: run python plugins/generate_limits.py"


def test_kernels_compute_a_part_of_the_words_of_settings() -> None:
    assert all(set(words) <= set(CHOICES[name]) for name, words in KERNEL_CHOICES.items())
