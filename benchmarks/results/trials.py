"""Records of a run in a form small enough to commit, from which every number of the page is computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.evaluation.report.summary import summarize
from chunkkv.evaluation.statistics import paired_difference

Record = dict[str, Any]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def compact(header: Record, records: Sequence[Record]) -> Record:
    """Return a run with one line per policy, share kept and group of prompts.

    `through` has a character per question of each prompt, in order: how many parts of the answer are right from its
    first on, in base 36. An answer with as many as `pieces` is right.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps([record[name] for name in ("suite", "mode", "cell")]), []).append(record)
    return {
        "header": header,
        "groups": [_group(entries) for entries in groups.values()],
        "agreement": summarize(header, records)["agreement"],
    }


def _group(records: Sequence[Record]) -> Record:
    first = records[0]
    assert all(record["pieces"] == first["pieces"] for record in records), "answers of one cell are of one length"
    outcomes = []
    for number, outcome in enumerate(first["outcomes"]):
        same = [record["outcomes"][number] for record in records]
        row = {"policy": outcome["policy"], "keep": outcome["keep"], "kept": _mean([one["kept"] for one in same])}
        if "useful" in outcome:
            row["useful"] = round(float(np.mean([one["useful"] for one in same])), 4)
        row["through"] = "".join(_DIGITS[count] for one in same for count in one["through"])
        outcomes.append(row)
    names = ("suite", "mode", "cell", "pieces")
    return {
        **{name: first[name] for name in names},
        "tokens": _mean([record["tokens"] for record in records]),
        "outcomes": outcomes,
    }


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 1)


def summary(run: Record) -> Record:
    """Return what results.summarize says of a compacted run."""
    records = [record for group in run["groups"] for record in _records(group)]
    return {**summarize(run["header"], records), "agreement": run["agreement"]}


def _through(row: Record, pieces: Sequence[int]) -> list[list[int]]:
    """Return per prompt how many parts of each answer are right."""
    counts = [int(digit, 36) for digit in row["through"]]
    return [counts[start : start + len(pieces)] for start in range(0, len(counts), len(pieces))]


def _right(through: Sequence[int], pieces: Sequence[int]) -> list[int]:
    return [int(given == wanted) for given, wanted in zip(through, pieces, strict=True)]


def _records(group: Record) -> list[Record]:
    pieces = group["pieces"]
    known = {name: value for name, value in group.items() if name != "outcomes"}
    columns = [
        [{**row, "through": through, "right": _right(through, pieces)} for through in _through(row, pieces)]
        for row in group["outcomes"]
    ]
    return [
        {**known, "index": index, "outcomes": list(outcomes)}
        for index, outcomes in enumerate(zip(*columns, strict=True))
    ]


def shares(run: Record, policy: str, keep: int, mode: str, **where: Any) -> list[float]:
    """Return the share of right answers of every prompt of a policy, of the suite or cell that `where` names."""
    found = []
    for group in run["groups"]:
        known, pieces = {"suite": group["suite"], **group["cell"]}, group["pieces"]
        if group["mode"] == mode and all(known.get(name) == value for name, value in where.items()):
            row = next(one for one in group["outcomes"] if (one["policy"], one["keep"]) == (policy, keep))
            found += [sum(_right(through, pieces)) / len(pieces) for through in _through(row, pieces)]
    return found


def difference(run: Record, one: str, other: str, keep: int, mode: str, **where: Any) -> tuple[float, float, float]:
    """Return accuracy of `one` minus that of `other` on the same prompts, with its 95 % interval."""
    pairs = zip(shares(run, one, keep, mode, **where), shares(run, other, keep, mode, **where), strict=True)
    return paired_difference([first - second for first, second in pairs])
