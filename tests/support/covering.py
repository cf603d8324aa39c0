"""Few combinations of settings in which every two values meet: where two settings disturb each other, one shows it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(row: Row) -> set[Pair]:
    """Return every two settings of a combination with their values."""
    return set(itertools.combinations(row.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Return every two values of different settings."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }


def covering_set(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return combinations that cover all_pairs(factors), the same ones in every process.

    Greedy: the next combination is the one with most pairs that have not met, the first of them in the product's order.
    """
    every = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    candidates = [(row, pairs_of(row)) for row in every]
    rows, apart = [], all_pairs(factors)
    while apart:
        row, pairs = max(candidates, key=lambda candidate: len(candidate[1] & apart))
        rows.append(row)
        apart -= pairs
    return rows
