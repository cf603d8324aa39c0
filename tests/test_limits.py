"""The allowed values of settings are the same in C++ as in Python: limits.h is what its generator writes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_header_of_the_plugins_is_generated_from_the_table() -> None:
    generator = runpy.run_path(str(ROOT / "plugins" / "generate_limits.py"))
    header = generator["HEADER"].read_text(encoding="utf-8")
    assert header == generator["header_text"](), "limits.h is out of date: run python plugins/generate_limits.py"
