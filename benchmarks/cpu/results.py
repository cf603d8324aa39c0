"""What was measured: medians over rounds, and ratios of neighbours in one round."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.machine import QUIET_CORES, ROOT
from benchmarks.cpu.variants import FULL, PART, PRODUCT, VARIANTS, Cell, Variant

FOLDER = ROOT / "docs" / "benchmarks" / "cpu"  # one JSON file for each kind of processor
LEVEL = 0.05  # shares of a value that count as level
Row = dict[str, Any]
Value = Callable[[Row], float | None]


def compact(result: dict[str, Any]) -> str:
    """Return the JSON text with one line for each measurement."""
    head = json.dumps({key: value for key, value in result.items() if key != "measurements"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["measurements"])
    return f'{head[:-2]},\n "measurements": [\n{rows}\n ]\n}}\n'


def file_of(machine: dict[str, Any]) -> Path:
    """Return the JSON file of a kind of processor; `machine` is what benchmarks.cpu.machine.describe returns."""
    name = re.sub(r"\(.*?\)|@.*|\b(processor|cpu)\b", " ", machine["processor"].lower())
    return FOLDER / f"{'-'.join(re.findall('[a-z0-9]+', name)) or 'unknown'}.json"


def prefill_s(row: Row) -> float:
    """Return the seconds to the first token without compression."""
    return float(row["first_token_s"] - (row["compress_s"] or 0.0))


@dataclass(frozen=True)
class Quantity:
    """Something that is compared.

    Parameters
    ----------
    name : str
        What it is called.
    value : callable
        Returns it from a measurement, None where it was not measured.
    kept : tuple of int
        Shares of the cache whose variants are compared.
    product : int or None
        The product's share of the cache, where it is to be one of them.
    """

    name: str
    value: Value
    kept: tuple[int, ...] = (FULL, PART)
    product: int | None = None


QUANTITIES = (
    Quantity("prefill", prefill_s, product=PART),
    Quantity("first token", lambda row: float(row["first_token_s"]), product=PART),
    Quantity("a token, full cache", lambda row: float(row["step_ms"]), (FULL,)),
    Quantity("a token, 20 % kept", lambda row: float(row["step_ms"]), product=PART),
    Quantity("peak memory, 20 % kept", lambda row: float(row["peak_mb"]), product=PART),
    Quantity("compression", lambda row: row["compress_s"], (PART,)),
)


@dataclass(frozen=True)
class Comparison:
    """The best variant of the product beside the best peer, for one quantity of one cell.

    Parameters
    ----------
    cell : Cell
        Where it was measured.
    quantity : str
        What was measured.
    ours, peer : Variant
        The best of each.
    ratio : float
        The peer's value divided by ours, the median over rounds: below 1 the peer is ahead.
    """

    cell: Cell
    quantity: str
    ours: Variant
    peer: Variant
    ratio: float


class Measurements:
    """The content of a JSON file.

    Parameters
    ----------
    result : dict
        As `compact` writes it.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.file = result, file_of(result["machine"])
        self._rows: dict[tuple[Cell, str], dict[int, Row]] = {}
        for row in result["measurements"]:
            cell = Cell(row["tokens"], row["threads"], row["rows"])
            self._rows.setdefault((cell, row["variant"]), {})[row["round"]] = row

    @property
    def picture(self) -> Path:
        """The file of the picture."""
        return self.file.with_suffix(".png")

    @property
    def cells(self) -> list[Cell]:
        """The cells with measurements: one prompt and one thread first."""
        found = {cell for cell, _ in self._rows}
        return sorted(found, key=lambda cell: (cell.rows, cell.threads, cell.tokens))

    @property
    def rounds(self) -> dict[Cell, int]:
        """In how many rounds each cell was measured, wholly or in part."""
        return {
            cell: max(len(found) for (other, _), found in self._rows.items() if other == cell) for cell in self.cells
        }

    @property
    def measurements(self) -> list[Row]:
        """Every single measurement."""
        return [row for rounds in self._rows.values() for row in rounds.values()]

    @property
    def quiet(self) -> int:
        """How many measurements ran on a quiet machine."""
        return sum(row["other_cores"] <= QUIET_CORES for row in self.measurements)

    def median(self, cell: Cell, variant: Variant, value: Value) -> float | None:
        """Return the median over rounds, None where there is none."""
        found = [value(row) for row in self._rows.get((cell, variant.key), {}).values()]
        known = [number for number in found if number is not None]
        return statistics.median(known) if known else None

    def ratio(self, cell: Cell, first: Variant, second: Variant, value: Value) -> float | None:
        """Return the median over rounds of the first's value divided by the second's, both of one round."""
        ours, theirs = (self._rows.get((cell, variant.key), {}) for variant in (first, second))
        pairs = [(value(ours[number]), value(theirs[number])) for number in ours if number in theirs]
        ratios = [above / below for above, below in pairs if above is not None and below]
        return statistics.median(ratios) if ratios else None

    def best(self, cell: Cell, variants: Iterable[Variant], value: Value) -> Variant | None:
        """Return the variant with the smallest median."""
        known = [(median, variant) for variant in variants if (median := self.median(cell, variant, value)) is not None]
        return min(known, key=lambda pair: pair[0])[1] if known else None

    def compare(self, cell: Cell, group: str, quantity: Quantity) -> Comparison | None:
        """Return the product's best beside the best peer of the same group; None where one is missing."""
        inside = [one for one in VARIANTS if one.group == group and one.keep in quantity.kept]
        shares = quantity.kept if quantity.product is None else (quantity.product,)
        ours = self.best(cell, (one for one in inside if one.engine == PRODUCT and one.keep in shares), quantity.value)
        peer = self.best(cell, (one for one in inside if one.engine != PRODUCT), quantity.value)
        if ours is None or peer is None or (ratio := self.ratio(cell, peer, ours, quantity.value)) is None:
            return None
        return Comparison(cell, quantity.name, ours, peer, ratio)

    def comparisons(self, group: str) -> list[Comparison]:
        """Return all comparisons of a group."""
        found = [self.compare(cell, group, quantity) for cell in self.cells for quantity in QUANTITIES]
        return [one for one in found if one is not None]

    def agreeing_tokens(self, cell: Cell, group: str) -> int:
        """Return how many of the first tokens all variants of a group with the full cache have in common."""
        answers = [
            row["answer"]
            for one in VARIANTS
            if one.group == group and one.keep == FULL
            for row in self._rows.get((cell, one.key), {}).values()
        ]
        common = 0
        for tokens in zip(*answers, strict=True):
            if len(set(tokens)) > 1:
                break
            common += 1
        return common


def all_measurements() -> list[Measurements]:
    """Return what was measured on every kind of processor, the newest first."""
    return newest_first(Measurements(json.loads(path.read_text("utf-8"))) for path in FOLDER.glob("*.json"))


def newest_first(every: Iterable[Measurements]) -> list[Measurements]:
    """Return measurements in the order of the page; a date may end with a time."""
    return sorted(every, key=lambda one: str(one.result["date"]), reverse=True)
