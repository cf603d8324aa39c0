"""Writes the part of docs/results.md about the real model from its template and the measured outcomes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.real.measure import AFTER, IN
from benchmarks.real.policies import (
    BUILT,
    FULL,
    METHODS,
    PRESSES,
    RANKED_TOKENS,
    READING_24,
    RECIPE,
    SMALL_KEEPS,
    STATIC,
    STREAMING,
    VARIANTS,
)
from benchmarks.real.tables import (
    FEWEST,
    TASKS,
    Outcomes,
    against_openvino,
    by_length,
    count,
    differences,
    kept_note,
    losses,
    methods,
    perplexities,
    right_tokens,
)
from benchmarks.results.runs import ROOT

TEMPLATE = Path(__file__).with_name("page.md")
JSON_FILE = ROOT / "docs" / "benchmarks" / "results-real.json"
BASE = "ChunkKV"
BY_LENGTH = (FULL, BASE, "kvpress SnapKV, window 16", "kvpress KeyDiff", "kvpress ChunkKV", "kvpress KVzip", STREAMING)
SMALL = (FULL, BASE, READING_24)  # in the table of the smallest caches
POLICIES = (FULL, BASE, *BUILT, *METHODS[1:], *PRESSES)


def outcomes() -> Outcomes:
    """Return the committed outcomes."""
    return Outcomes(json.loads(JSON_FILE.read_text(encoding="utf-8")))


def render(measured: Outcomes) -> str:
    """Return the text; raises KeyError for a place in the template that has no text."""
    texts = {
        "contexts": kept_note(measured),
        "methods in": methods(measured, IN, POLICIES),
        "methods after": methods(measured, AFTER, POLICIES),
        "losses in": losses(measured, IN, (BASE,)),
        "losses after": losses(measured, AFTER, (BASE, *BUILT, "kvpress KVzip")),
        "differences in": differences(measured, IN, POLICIES, BASE),
        "differences after": differences(measured, AFTER, POLICIES, BASE),
        "against KVzip": differences(measured, AFTER, BUILT, "kvpress KVzip"),
        "smallest": methods(measured.only(2_000), IN, SMALL, SMALL_KEEPS),
        "smallest differences": differences(measured.only(2_000), IN, SMALL, BASE, keeps=SMALL_KEEPS),
        "lengths in": by_length(measured, IN, BY_LENGTH, 2_000),
        "lengths after": by_length(measured, AFTER, BY_LENGTH, 2_000),
        "openvino": against_openvino(measured, BASE),
        "variants": differences(measured, IN, VARIANTS, BASE),
        "perplexities": perplexities(measured, POLICIES),
    }
    return re.sub(r"\{\{(.+?)\}\}", lambda place: texts[place[1]], TEMPLATE.read_text(encoding="utf-8")).rstrip()


README = (
    FULL,
    BASE,
    RANKED_TOKENS,
    RECIPE,
    STATIC,
    "kvpress SnapKV, window 16",
    "kvpress ChunkKV",
    "kvpress KVzip",
    STREAMING,
)


def readme_table(measured: Outcomes) -> str:
    """Return README's table: right tokens in %, code / keeper / copy, 20 % kept."""
    lines = []
    for policy in README:
        cells = []
        for mode in (IN, AFTER):
            values = [measured.mean(mode, task, policy, 2_000, right_tokens) for task in TASKS]
            known = count(measured, mode, policy, 10_000 if policy == FULL else 2_000) >= FEWEST
            cells.append(" / ".join(f"{value:.0f}" for value in values if value is not None) if known else "–")
        if set(cells) != {"–"}:
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)
