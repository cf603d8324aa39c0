"""Records to tables: accuracy with intervals, paired differences, agreement between layers; as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.evaluation.records import Record
from chunkkv.evaluation.statistics import paired_difference, wilson
from chunkkv.files import write_whole
from chunkkv.limits import KEEP_SCALE

SUMMARY_FILE, TABLE_FILE = "summary.json", "summary.csv"
FULL = "full"
_COLUMNS = ("suite", "mode", "cell", "policy", "keep_ratio", "n", "tokens", "kept", "accuracy", "low", "high")
_MORE_COLUMNS = ("full_accuracy", "against_full", "against_full_low", "against_full_high", "useful")

Row = dict[str, Any]
_Key = tuple[str, str, str, str, int]  # suite, mode, cell as JSON ("" = the whole suite), policy, keep per 10,000


def summarize(header: Record, records: Sequence[Record]) -> dict[str, Any]:
    """Return the tables of a run as JSON values; `header` and `records` are those of its results file.

    "run" is the header. "cells" has a row per suite, mode, cell, policy and keep ratio; "suites" the same over all
    cells of a suite; "differences" compares every policy with the first that compresses, prompt by prompt; "agreement"
    has the mean Jaccard matrix between layers per policy and keep ratio.
    """
    groups = _grouped(records)
    rows = [_row(key, entries, groups) for key, entries in groups.items()]
    policies = [policy["name"] for policy in header["policies"]]
    return {
        "run": header,
        "cells": [row for row in rows if row["cell"] is not None],
        "suites": [row for row in rows if row["cell"] is None],
        "differences": _differences(groups, policies),
        "agreement": _agreement(records),
    }


def _grouped(records: Iterable[Record]) -> dict[_Key, list[Row]]:
    """Return per key the outcomes with their prompt, in the order of the records."""
    groups: dict[_Key, list[Row]] = {}
    for record in records:
        cell = json.dumps({name: value for name, value in record["cell"].items() if name != "line"})
        prompt = json.dumps([record["cell"], record["index"]])
        for outcome in record["outcomes"]:
            entry = {**outcome, "prompt": prompt, "tokens": record["tokens"], "pieces": record["pieces"]}
            for group in (cell, ""):
                key = (record["suite"], record["mode"], group, outcome["policy"], outcome["keep"])
                groups.setdefault(key, []).append(entry)
    return groups


def _share(entry: Row) -> float:
    return sum(entry["right"]) / len(entry["right"])


def _row(key: _Key, entries: list[Row], groups: dict[_Key, list[Row]]) -> Row:
    suite, mode, cell, policy, keep = key
    shares = [_share(entry) for entry in entries]
    low, high = wilson(sum(shares), len(shares))
    row: Row = {
        "suite": suite,
        "mode": mode,
        "cell": json.loads(cell) if cell else None,
        "policy": policy,
        "keep_ratio": keep / KEEP_SCALE,
        "n": len(entries),
        "tokens": _mean(entry["tokens"] for entry in entries),
        "kept": _mean(entry["kept"] for entry in entries),
        "accuracy": round(float(np.mean(shares)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "through": _through(entries),
    }
    if useful := [entry["useful"] for entry in entries if "useful" in entry]:
        row["useful"] = round(float(np.mean(useful)), 4)
    full = groups.get((suite, mode, cell, FULL, KEEP_SCALE))
    if full:
        row["full_accuracy"] = round(float(np.mean([_share(entry) for entry in full])), 4)
        row["against_full"] = _difference(entries, full)
    return row


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), 1)


def _through(entries: list[Row]) -> list[float] | None:
    """Return the shares of answers that are right through their 1st, 2nd, … part; None where lengths differ."""
    sizes = {size for entry in entries for size in entry["pieces"]}
    if len(sizes) != 1:
        return None
    reached = np.array([count for entry in entries for count in entry["through"]])
    return [round(float((reached > place).mean()), 4) for place in range(sizes.pop())]


def _difference(entries: list[Row], others: list[Row]) -> list[float]:
    """Return mean and interval of accuracy minus the others' accuracy on the same prompts."""
    base = {entry["prompt"]: _share(entry) for entry in others}
    return [
        round(value, 4)
        for value in paired_difference(
            [_share(entry) - base[entry["prompt"]] for entry in entries if entry["prompt"] in base]
        )
    ]


def _differences(groups: dict[_Key, list[Row]], policies: list[str]) -> list[Row]:
    """Compare every policy with the first one that compresses, over all cells of a suite."""
    base = next((name for name in policies if name != FULL), None)
    rows = []
    for (suite, mode, cell, policy, keep), entries in groups.items():
        others = groups.get((suite, mode, cell, base or "", keep))
        if not cell and policy not in (base, FULL) and others:
            mean, low, high = _difference(entries, others)
            rows.append(
                {
                    "suite": suite,
                    "mode": mode,
                    "keep_ratio": keep / KEEP_SCALE,
                    "policy": policy,
                    "minus": base,
                    "difference": mean,
                    "low": low,
                    "high": high,
                }
            )
    return rows


def _agreement(records: Sequence[Record]) -> list[Row]:
    matrices: dict[tuple[str, str, int], list[Any]] = {}
    for record in records:
        for outcome in record["outcomes"]:
            if "jaccard" in outcome:
                key = (record["mode"], outcome["policy"], outcome["keep"])
                matrices.setdefault(key, []).append(outcome["jaccard"])
    return [
        {
            "mode": mode,
            "policy": policy,
            "keep_ratio": keep / KEEP_SCALE,
            "n": len(samples),
            "jaccard": np.round(np.mean(np.array(samples), axis=0), 4).tolist(),
        }
        for (mode, policy, keep), samples in matrices.items()
    ]


def table(summary: dict[str, Any]) -> str:
    """Return the rows of all cells as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*_COLUMNS, *_MORE_COLUMNS))
    for row in summary["cells"]:
        cell = " ".join(f"{name}={value}" for name, value in row["cell"].items())
        against = row.get("against_full", ["", "", ""])
        values = {**row, "cell": cell, **dict(zip(_MORE_COLUMNS[1:4], against, strict=True))}
        writer.writerow(values.get(name, "") for name in (*_COLUMNS, *_MORE_COLUMNS))
    return out.getvalue()


def write_results(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write the tables as JSON and CSV; returns the files."""
    texts = {SUMMARY_FILE: json.dumps(summary, indent=1, allow_nan=False) + "\n", TABLE_FILE: table(summary)}
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]
