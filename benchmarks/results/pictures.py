"""The pictures of the results page, each marked with the data it was drawn from."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import runs
from benchmarks.results.trials import runs_by_name
from chunkkv.evaluation.report import plots
from chunkkv.files import write_whole

FOLDER = runs.ROOT / "docs" / "images"
_SHOWN = (runs.FIXED, runs.CLAUSES, runs.TOKENS, runs.PYRAMID, runs.STREAMING, runs.RANDOM)
_NAMES = {
    "full": "full",
    runs.FIXED: "ChunkKV, fixed 10",
    runs.CLAUSES: "ChunkKV, delimiter 20",
    runs.TOKENS_1: "SnapKV, no pooling",
    runs.TOKENS: "SnapKV, pooling 5",
    runs.PYRAMID: "PyramidKV-style",
    runs.STREAMING: "StreamingLLM",
    runs.RANDOM: "random chunks",
}
_AFTER_HEADER = 33  # bytes: the signature and the first chunk of a PNG


def pictures(measured: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return per file name which of plots.pictures it is, and the summary that it is drawn from."""
    by_name = {name: run.summary for name, run in runs_by_name(measured).items()}
    recall, needle = by_name["recall"], by_name["needle"]

    def long_answer(row: dict[str, Any]) -> bool:
        return row["cell"]["answer"] in ("code", "sentence") and row["keep_ratio"] in (0.2, 1.0)

    few = {"full", runs.FIXED, runs.CLAUSES, runs.TOKENS_1, runs.TOKENS, runs.STREAMING}
    return {
        "results-accuracy.png": ("accuracy.png", _only(recall, {"full", *_SHOWN})),
        "results-positions.png": ("positions.png", _only(recall, few, cells=long_answer)),
        "results-layers.png": ("layers.png", _only(recall, {runs.FIXED, runs.CLAUSES, runs.TOKENS}, keep=0.2)),
        "results-needle.png": ("needle-in.png", _only(needle, {"full", *_SHOWN})),
    }


def _only(
    whole: dict[str, Any],
    policies: set[str],
    cells: Callable[[dict[str, Any]], bool] = lambda row: True,
    keep: float | None = None,
) -> dict[str, Any]:
    """Return the rows of a summary that one picture shows, policies by short readable names."""

    def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = [row for row in rows if row["policy"] in policies]
        return [{**row, "policy": _NAMES[row["policy"]]} for row in shown]

    agreement = [row for row in named(whole["agreement"]) if keep is None or row["keep_ratio"] == keep]
    return {
        "cells": [row for row in named(whole["cells"]) if cells(row)],
        "suites": named(whole["suites"]),
        "agreement": agreement,
    }


def mark(data: dict[str, Any]) -> str:
    """Return the fingerprint of a picture's data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(measured: dict[str, Any], folder: Path = FOLDER) -> list[Path]:
    """Write every picture, with the fingerprint of its data as a text within the file; returns the files."""
    written = []
    for name, (kind, data) in pictures(measured).items():
        write_whole(folder / name, _with_text(plots.pictures(data)[kind](), mark(data)))
        written.append(folder / name)
    return written


def _with_text(png: bytes, value: str) -> bytes:
    body = b"tEXt" + b"Data\0" + value.encode("latin-1")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_AFTER_HEADER] + chunk + png[_AFTER_HEADER:]
