"""Records of a run in a form small enough to commit, from which every number of the page is computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
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
        row = {"policy": outcome["policy"], "keep": outcome["keep"], "kept": _mean([trial["kept"] for trial in same])}
        if "useful" in outcome:
            row["useful"] = round(float(np.mean([trial["useful"] for trial in same])), 4)
        row["through"] = "".join(_DIGITS[count] for trial in same for count in trial["through"])
        outcomes.append(row)
    names = ("suite", "mode", "cell", "pieces")
    return {
        **{name: first[name] for name in names},
        "tokens": _mean([record["tokens"] for record in records]),
        "outcomes": outcomes,
    }


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 1)


def _through(row: Record, pieces: Sequence[int]) -> list[list[int]]:
    """Return per prompt how many parts of each answer are right."""
    counts = [int(digit, 36) for digit in row["through"]]
    return [counts[start : start + len(pieces)] for start in range(0, len(counts), len(pieces))]


def _right(through: Sequence[int], pieces: Sequence[int]) -> list[int]:
    return [int(count == size) for count, size in zip(through, pieces, strict=True)]


def _records(group: Record) -> list[Record]:
    pieces = group["pieces"]
    labels = {name: value for name, value in group.items() if name != "outcomes"}
    columns = [
        [{**row, "through": through, "right": _right(through, pieces)} for through in _through(row, pieces)]
        for row in group["outcomes"]
    ]
    return [
        {**labels, "index": index, "outcomes": list(outcomes)}
        for index, outcomes in enumerate(zip(*columns, strict=True))
    ]


class MeasuredRun:
    """The committed trials of one run, as compact() returns them, and what is computed from them."""

    def __init__(self, values: Record) -> None:
        self._groups, self.header, self.agreement = values["groups"], values["header"], values["agreement"]

    @property
    def keeps(self) -> list[int]:
        """Shares kept, per 10,000, in the order of the page's columns."""
        return [int(keep) for keep in self.header["keeps"]]

    @cached_property
    def summary(self) -> Record:
        """The tables of the run (see summarize)."""
        records = [record for group in self._groups for record in _records(group)]
        return {**summarize(self.header, records), "agreement": self.agreement}

    def shares(self, policy: str, keep: int, mode: str, **where: Any) -> list[float]:
        """Return the share of right answers of every prompt of a policy, of the suite or cell that `where` names."""
        shares = []
        for group in self._groups:
            labels, pieces = {"suite": group["suite"], **group["cell"]}, group["pieces"]
            if group["mode"] == mode and all(labels.get(name) == value for name, value in where.items()):
                row = next(row for row in group["outcomes"] if (row["policy"], row["keep"]) == (policy, keep))
                shares += [sum(_right(through, pieces)) / len(pieces) for through in _through(row, pieces)]
        return shares

    def difference(self, policy: str, other: str, keep: int, mode: str, **where: Any) -> tuple[float, float, float]:
        """Return accuracy of `policy` minus that of `other` on the same prompts, with its 95 % interval."""
        pairs = zip(self.shares(policy, keep, mode, **where), self.shares(other, keep, mode, **where), strict=True)
        return paired_difference([first - second for first, second in pairs])


def runs_by_name(measured: Record) -> dict[str, MeasuredRun]:
    """Return the runs of results.json."""
    return {run["name"]: MeasuredRun(run) for run in measured["runs"]}
