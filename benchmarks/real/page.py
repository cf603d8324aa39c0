"""Writes the page of the real model from its template and the measured outcomes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.real.measure import AFTER, IN
from benchmarks.real.tables import Outcomes, differences, kept_note, methods, perplexities

TEMPLATE = Path(__file__).with_name("page.md")
BASE = "ChunkKV"


def render(values: dict[str, Any]) -> str:
    """Return the page for the values of results-real.json."""
    outcomes = Outcomes(values)
    parts = {
        "contexts": kept_note(outcomes),
        "methods in": methods(outcomes, IN),
        "methods after": methods(outcomes, AFTER),
        "differences in": differences(outcomes, IN, BASE),
        "differences after": differences(outcomes, AFTER, BASE),
        "perplexities": perplexities(outcomes),
    }
    return re.sub(r"\{\{(.+?)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def render_file(path: Path) -> str:
    """Return the page for a file of outcomes."""
    return render(json.loads(path.read_text(encoding="utf-8")))
