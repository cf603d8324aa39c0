"""The tables of the results page as Markdown, every number computed from the committed trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.results import runs
from benchmarks.results.runs import reuse
from benchmarks.results.trials import MeasuredRun
from chunkkv.limits import KEEP_SCALE

Row = dict[str, Any]
NAMES = {
    "full": "full cache",
    runs.FIXED: "ChunkKV, fixed chunks of 10",
    runs.FIXED_20: "ChunkKV, fixed chunks of 20",
    runs.CLAUSES: "ChunkKV, delimiter chunks up to 20",
    runs.CLAUSES_10: "ChunkKV, delimiter chunks up to 10",
    runs.LOGITS: "ChunkKV, fixed 10, raw logits",
    runs.TOKENS_1: "SnapKV, no pooling",
    runs.TOKENS: "SnapKV, pooling 5",
    runs.TOKENS_7: "SnapKV, pooling 7",
    runs.PYRAMID: "PyramidKV-style, pooling 5",
    runs.STREAMING: "StreamingLLM",
    runs.RANDOM: "random chunks of 10",
}
MODES = {"in": "in the prompt", "after": "afterwards"}
QUESTIONS = (
    ("fixed chunks − SnapKV, no pooling", runs.FIXED, runs.TOKENS_1),
    ("fixed chunks − SnapKV, pooling 5", runs.FIXED, runs.TOKENS),
    ("fixed chunks − SnapKV, pooling 7", runs.FIXED, runs.TOKENS_7),
    ("fixed chunks − PyramidKV-style", runs.FIXED, runs.PYRAMID),
    ("fixed chunks − StreamingLLM", runs.FIXED, runs.STREAMING),
    ("fixed chunks − random chunks", runs.FIXED, runs.RANDOM),
    ("delimiter − fixed, chunks of (up to) 20", runs.CLAUSES, runs.FIXED_20),
    ("delimiter − fixed, chunks of (up to) 10", runs.CLAUSES_10, runs.FIXED),
    ("fixed chunks of 20 − of 10", runs.FIXED_20, runs.FIXED),
    ("leader last − first, groups of 2", reuse(2, "last"), reuse(2, "first")),
    ("leader last − first, one group of 4", reuse(4, "last"), reuse(4, "first")),
    ("reuse 2 − none, leader last", reuse(2, "last"), runs.FIXED),
    ("reuse 2 − none, leader first", reuse(2, "first"), runs.FIXED),
    ("reuse 4 − none, leader last", reuse(4, "last"), runs.FIXED),
    ("reuse 4 − none, leader first", reuse(4, "first"), runs.FIXED),
    ("raw logits − softmax", runs.LOGITS, runs.FIXED),
)
SUITES = {
    "dense": "2 or 4 facts of one token each",
    "questions": "each of 2 or 8 facts asked for",
    "rule": "an instruction at the start",
    "distractors": "one code among near-duplicates",
    "store": "key-value store without filler",
}
_PARTS = ("keeper", "home", "code", "sentence")
_PART_NAMES = ("keeper, 2 words", "home, 3 words", "code, 5 digits", "sentence, 14 tokens")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(row: Row) -> str:
    """Return an accuracy with its interval."""
    return f"{row['accuracy'] * 100:.1f} ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})"


def signed(value: tuple[float, float, float]) -> str:
    """Return a difference in points with its interval, bold where the interval leaves zero out."""
    mean, low, high = (f"{number * 100:+.1f}".replace("-", "−") for number in value)
    text = f"{mean} ({low} to {high})"
    return f"**{text}**" if value[1] > 0 or value[2] < 0 else text


def _find(rows: Iterable[Row], **known: Any) -> Row:
    return next(row for row in rows if all(row[name] == value for name, value in known.items()))


def methods(run: MeasuredRun, mode: str) -> str:
    """Return accuracy by method and share kept."""
    rows = [row for row in run.summary["suites"] if row["mode"] == mode]
    full = _find(rows, policy="full")
    lines = []
    for policy in (name for name in NAMES if name != "full"):
        by_keep = [_find(rows, policy=policy, keep_ratio=keep / KEEP_SCALE) for keep in run.keeps]
        lines.append([NAMES[policy], percent(full), *map(percent, by_keep)])
    columns = [_find(rows, policy=runs.FIXED, keep_ratio=keep / KEEP_SCALE) for keep in run.keeps]
    heads = [f"keep {row['keep_ratio'] * 100:g} % ({row['kept']:g} tokens)" for row in columns]
    return table([f"question {MODES[mode]}, n = {full['n']}", "full cache", *heads], lines)


def questions(run: MeasuredRun, mode: str) -> str:
    """Return the paired differences that answer which setting or method is better."""
    keeps = run.keeps
    lines = [
        [text, *(signed(run.difference(policy, other, keep, mode)) for keep in keeps)]
        for text, policy, other in QUESTIONS
    ]
    return table([f"question {MODES[mode]}", *(f"keep {keep / 100:g} %" for keep in keeps)], lines)


def answers(run: MeasuredRun, mode: str, keep: int) -> str:
    """Return accuracy by what is asked for, at one share kept."""
    cells = [row for row in run.summary["cells"] if row["mode"] == mode]
    lines = []
    for policy in ("full", runs.FIXED, runs.FIXED_20, runs.CLAUSES, runs.TOKENS_1, runs.TOKENS, runs.TOKENS_7):
        ratio = 1.0 if policy == "full" else keep / KEEP_SCALE
        inside = [row for row in cells if (row["policy"], row["keep_ratio"]) == (policy, ratio)]
        by_part = {row["cell"]["answer"]: row for row in inside}
        lines.append([NAMES[policy], *(percent(by_part[part]) for part in _PARTS)])
    return table([f"question {MODES[mode]}, keep {keep / 100:g} %, n = {cells[0]['n']}", *_PART_NAMES], lines)


def answers_against_tokens(run: MeasuredRun, keep: int) -> str:
    """Return the paired differences by what is asked for, the question in the prompt, at one share kept."""
    pairs = (
        ("fixed chunks of 10 − SnapKV, pooling 5", runs.FIXED, runs.TOKENS),
        ("fixed chunks of 20 − SnapKV, pooling 5", runs.FIXED_20, runs.TOKENS),
        ("delimiter chunks up to 20 − SnapKV, pooling 5", runs.CLAUSES, runs.TOKENS),
    )
    lines = [
        [text, *(signed(run.difference(policy, other, keep, "in", answer=part)) for part in _PARTS)]
        for text, policy, other in pairs
    ]
    return table([f"question in the prompt, keep {keep / 100:g} %", *_PART_NAMES], lines)


def positions(run: MeasuredRun, keep: int) -> str:
    """Return the share of codes that are right through their first, second, … digit, the question in the prompt."""
    cells = [row for row in run.summary["cells"] if row["mode"] == "in" and row["cell"]["answer"] == "code"]
    lines = []
    for policy in ("full", runs.FIXED, runs.CLAUSES, runs.TOKENS_1, runs.TOKENS, runs.TOKENS_7, runs.STREAMING):
        row = _find(cells, policy=policy, keep_ratio=1.0 if policy == "full" else keep / KEEP_SCALE)
        lines.append([NAMES[policy], *(f"{share * 100:.0f}" for share in row["through"])])
    heads = [*(f"digit {place}" for place in range(1, 6)), "end"]
    return table([f"keep {keep / 100:g} %, n = {cells[0]['n']}, % right through", *heads], lines)


def straddle(run: MeasuredRun) -> str:
    """Return accuracy by where the fact begins within a chunk of the fixed grid."""
    rows = run.summary["cells"]
    offsets = sorted({row["cell"]["offset"] for row in rows})
    by_cell = {(row["policy"], row["cell"]["offset"]): row for row in rows}
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [
        [NAMES[policy], *(f"{by_cell[policy, at]['accuracy'] * 100:.0f}" for at in offsets)] for policy in policies
    ]
    keep, count = run.keeps[0], rows[0]["n"]
    return table([f"keep {keep / 100:g} %, n = {count}, % right", *(f"+{at}" for at in offsets)], lines)


def others(run: MeasuredRun, mode: str, keep: int) -> str:
    """Return accuracy on the other tasks, by method, at one share kept."""
    shown = (1.0, keep / KEEP_SCALE)
    rows = [row for row in run.summary["suites"] if row["mode"] == mode and row["keep_ratio"] in shown]
    # The recording also holds a method that the program does not have.
    policies = [policy for policy in dict.fromkeys(row["policy"] for row in rows) if policy in NAMES]
    lines = []
    for suite, about in SUITES.items():
        inside = [row for row in rows if row["suite"] == suite]
        accuracies = [percent(_find(inside, policy=policy)) for policy in policies]
        lines.append([f"`{suite}`: {about} (n = {inside[0]['n']})", *accuracies])
    heads = [NAMES[policy] for policy in policies]
    return table([f"question {MODES[mode]}, keep {keep / 100:g} %", *heads], lines)


def against_tokens(run: MeasuredRun, keep: int) -> str:
    """Return the paired differences on the other tasks at one share kept."""
    pairs = (
        (runs.FIXED, runs.TOKENS_1),
        (runs.FIXED, runs.TOKENS),
        (runs.FIXED_20, runs.TOKENS),
        (runs.CLAUSES, runs.TOKENS),
    )
    lines = []
    for suite in SUITES:
        for mode, text in MODES.items():
            differences = [signed(run.difference(policy, other, keep, mode, suite=suite)) for policy, other in pairs]
            lines.append([f"`{suite}`, question {text}", *differences])
    heads = (
        "fixed 10 − no pooling",
        "fixed 10 − pooling 5",
        "fixed 20 − pooling 5",
        "delimiter 20 − pooling 5",
    )
    return table([f"keep {keep / 100:g} %", *heads], lines)


def neighbours(run: MeasuredRun, mode: str = "in") -> str:
    """Return how far the choices of neighbouring layers agree (mean Jaccard of kept positions)."""
    lines = []
    for policy in (runs.TOKENS_1, runs.TOKENS, runs.FIXED, runs.FIXED_20, runs.CLAUSES):
        rows = [row for row in run.agreement if (row["policy"], row["mode"]) == (policy, mode)]
        by_keep = {round(row["keep_ratio"] * KEEP_SCALE): np.array(row["jaccard"]) for row in rows}
        means = [float(np.diagonal(by_keep[keep], offset=1).mean()) for keep in run.keeps]
        lines.append([NAMES[policy], *(f"{mean * 100:.0f}" for mean in means)])
    return table(["neighbouring layers, Jaccard in %", *(f"keep {keep / 100:g} %" for keep in run.keeps)], lines)
