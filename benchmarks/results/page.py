"""Writes docs/results.md from its template and the committed trials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.real import page as real_page
from benchmarks.results import pictures, tables
from benchmarks.results.runs import ROOT
from benchmarks.results.trials import runs_by_name
from chunkkv.files import write_whole

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = ROOT / "docs" / "results.md"


def parts(measured: dict[str, Any]) -> dict[str, str]:
    """Return the texts for the template's places."""
    by_name = runs_by_name(measured)
    recall, other = by_name["recall"], by_name["others"]
    return {
        "real model": real_page.render(real_page.outcomes()),
        "methods in": tables.methods(recall, "in"),
        "methods after": tables.methods(recall, "after"),
        "questions in": tables.questions(recall, "in"),
        "questions after": tables.questions(recall, "after"),
        "answers in": tables.answers(recall, "in", 2_000),
        "answers after": tables.answers(recall, "after", 5_000),
        "answers against tokens": tables.answers_against_tokens(recall, 2_000),
        "positions": tables.positions(recall, 2_000),
        "straddle": tables.straddle(by_name["straddle"]),
        "others in": tables.others(other, "in", 1_250),
        "others after": tables.others(other, "after", 1_250),
        "against tokens": tables.against_tokens(other, 2_000),
        "against tokens, tight": tables.against_tokens(other, 1_250),
        "neighbours": tables.neighbours(recall),
        "engine flags": measured["engine_flags"],
        "minutes": f"{sum(run['seconds'] for run in measured['runs']) / 60:.1f}",
        "device": measured["device"],
    }


def render(measured: dict[str, Any]) -> str:
    """Return the page; raises KeyError for a place in the template that has no text."""
    texts = parts(measured)
    return re.sub(r"\{\{([^}]+)\}\}", lambda place: texts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def write_page(measured: dict[str, Any]) -> list[Path]:
    """Write the page and its pictures; returns the files."""
    files = pictures.draw(measured)
    write_whole(PAGE, render(measured))
    return [PAGE, *files]
