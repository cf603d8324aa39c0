"""The pictures of a run, drawn from its summary (extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chunkkv.evaluation.report.figures import new_figure, png
from chunkkv.evaluation.report.summary import FULL, Row
from chunkkv.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = TypeVar("Value")
Drawing = Callable[[], bytes]  # draws a picture when it is called, and returns it as PNG
_PANEL = (4.2, 3.2)  # inches
_COLUMNS = 4
_COLUMNS_OF_ONE_SHARE = 3
_MAX_LAYERS_WITH_NUMBERS = 12


def draw_all(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write every picture that the summary (see summarize) has numbers for; returns the files."""
    written = []
    for name, draw in pictures(summary).items():
        write_whole(folder / name, draw())
        written.append(folder / name)
    return written


def pictures(summary: dict[str, Any]) -> dict[str, Drawing]:
    """Return by file name the pictures that the summary has numbers for; calling one draws it and returns a PNG.

    To add a picture: write a function that returns its Drawing, or None without numbers, and give it a line here.
    """
    drawings = {
        "accuracy.png": _accuracy(summary),
        "positions.png": _positions(summary),
        "layers.png": _layers(summary),
        **_heat_maps(summary),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _panels(count: int, draw: Callable[[int, Axes], None], legend: bool = True, columns: int = _COLUMNS) -> Drawing:
    """Return a drawing of `count` panels, each drawn by draw(number, axes), with one legend for all."""
    return lambda: _panels_png(count, draw, legend, columns)


def _panels_png(count: int, draw: Callable[[int, Axes], None], legend: bool, columns: int) -> bytes:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(_PANEL[0] * columns, _PANEL[1] * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axes in enumerate(panels):
        if number < count:
            draw(number, axes)
        else:
            axes.axis("off")
    if legend:
        lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize="small")
    return png(figure)


def _unique(values: Sequence[Value]) -> list[Value]:
    return list(dict.fromkeys(values))


def _accuracy(summary: dict[str, Any]) -> Drawing | None:
    """Accuracy against the share kept, a panel per suite and mode, with 95 % intervals."""
    rows = summary["suites"]
    groups = _unique([(row["suite"], row["mode"]) for row in rows])
    policies = _unique([row["policy"] for row in rows if row["policy"] != FULL])
    if not policies:
        return None

    def draw(number: int, axes: Axes) -> None:
        inside = [row for row in rows if (row["suite"], row["mode"]) == groups[number]]
        for row in inside:
            if row["policy"] == FULL:
                axes.axhline(row["accuracy"], color="black", linestyle="--", linewidth=1, label="full cache")
        for index, policy in enumerate(policies):
            line = sorted((row for row in inside if row["policy"] == policy), key=lambda row: row["keep_ratio"])
            kept = [row["keep_ratio"] * 100 for row in line]
            values = [row["accuracy"] for row in line]
            errors = [[row["accuracy"] - row["low"] for row in line], [row["high"] - row["accuracy"] for row in line]]
            axes.errorbar(
                kept,
                values,
                errors,
                linewidth=1.2,
                label=policy,
                color=f"C{index % 10}",
                marker="os^vD"[index // 10 % 5],
                markersize=4,
                capsize=2,
            )
        axes.set(ylim=(-0.03, 1.03), xlabel="kept, %", ylabel="right answers", xscale="log")
        ticks = sorted({row["keep_ratio"] * 100 for row in inside if row["policy"] != FULL})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{groups[number][0]}, {_mode(groups[number][1])}", fontsize="medium")

    return _panels(len(groups), draw)


def _mode(mode: str) -> str:
    return "question in the prompt" if mode == "in" else "question afterwards"


def _positions(summary: dict[str, Any]) -> Drawing | None:
    """Answers that are right through each part, at the smallest share kept; a panel per cell with several parts."""
    rows = [row for row in summary["cells"] if row["through"] and len(row["through"]) > 1]
    smallest = min((row["keep_ratio"] for row in rows if row["policy"] != FULL), default=None)
    rows = [row for row in rows if row["policy"] == FULL or row["keep_ratio"] == smallest]
    rows_of: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        rows_of.setdefault((row["suite"], row["mode"], len(row["through"])), []).append(row)
    groups = list(rows_of)
    if not groups or smallest is None:
        return None

    def draw(number: int, axes: Axes) -> None:
        suite, mode, parts = groups[number]
        inside = rows_of[groups[number]]
        for policy in _unique([row["policy"] for row in inside]):
            lines = [(row["n"], row["through"]) for row in inside if row["policy"] == policy]
            total = sum(count for count, _ in lines)
            mean = [sum(count * line[part] for count, line in lines) / total for part in range(parts)]
            if policy == FULL:
                axes.plot(range(1, parts + 1), mean, "--", color="black", linewidth=1.2, label="full cache")
            else:
                axes.plot(range(1, parts + 1), mean, "-o", markersize=3, linewidth=1.2, label=policy)
        axes.locator_params(axis="x", integer=True)
        axes.set(ylim=(-0.03, 1.03), xlabel="part of the answer", ylabel="right through it")
        axes.set_title(f"{suite} ({parts} parts), {_mode(mode)}, kept {smallest * 100:g} %", fontsize="small")

    return _panels(len(groups), draw)


def _heat_maps(summary: dict[str, Any]) -> dict[str, Drawing]:
    """Depth against length, a panel per policy and share kept; a file per suite and mode that have depths."""
    rows = [row for row in summary["cells"] if {"depth", "length"} <= set(row["cell"])]
    files = {}
    for suite, mode in _unique([(row["suite"], row["mode"]) for row in rows]):
        files[f"{suite}-{mode}.png"] = _heat_map([row for row in rows if (row["suite"], row["mode"]) == (suite, mode)])
    return files


def _heat_map(rows: list[Row]) -> Drawing:
    compressed = _unique([(row["policy"], row["keep_ratio"]) for row in rows if row["policy"] != FULL])
    shares = max(len({keep for _, keep in compressed}), 1)
    # The full cache stands in a row of its own: None leaves a panel empty.
    panels: list[tuple[str, float] | None] = [(FULL, 1.0), *[None] * (shares - 1), *compressed]
    lengths = sorted({row["cell"]["length"] for row in rows})
    depths = sorted({row["cell"]["depth"] for row in rows})
    accuracy = {
        (row["policy"], row["keep_ratio"], row["cell"]["length"], row["cell"]["depth"]): row["accuracy"] for row in rows
    }

    def draw(number: int, axes: Axes) -> None:
        panel = panels[number]
        if panel is None:
            axes.axis("off")
            return
        values = [[accuracy.get((*panel, length, depth), float("nan")) for length in lengths] for depth in depths]
        axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        # White is legible on the dark ends of the colours.
        _write_numbers(axes, values, lambda value: "white" if value < 0.15 or value > 0.85 else "black")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth * 100:g} %" for depth in depths])
        axes.set(xlabel="prompt tokens", ylabel="depth of the fact")
        policy, keep = panel
        axes.set_title("full cache" if policy == FULL else f"{policy}, kept {keep * 100:g} %", fontsize="small")

    return _panels(len(panels), draw, legend=False, columns=shares if shares > 1 else _COLUMNS_OF_ONE_SHARE)


def _write_numbers(axes: Axes, values: list[list[float]], colour: Callable[[float], str]) -> None:
    """Write each value of a matrix into its cell."""
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour(value))


def _layers(summary: dict[str, Any]) -> Drawing | None:
    """Jaccard index of the kept positions of every two layers, a panel per policy, at the smallest share kept."""
    rows = summary["agreement"]
    smallest = min((row["keep_ratio"] for row in rows), default=None)
    first_mode = rows[0]["mode"] if rows else None
    rows = [row for row in rows if row["keep_ratio"] == smallest and row["mode"] == first_mode]
    if not rows:
        return None

    def draw(number: int, axes: Axes) -> None:
        row = rows[number]
        axes.imshow(row["jaccard"], vmin=0, vmax=1, cmap="viridis")
        if len(row["jaccard"]) <= _MAX_LAYERS_WITH_NUMBERS:
            _write_numbers(axes, row["jaccard"], lambda value: "black" if value > 0.6 else "white")
        axes.locator_params(axis="both", integer=True)
        axes.set(xlabel="layer", ylabel="layer")
        axes.set_title(f"{row['policy']}, kept {row['keep_ratio'] * 100:g} %", fontsize="small")

    return _panels(len(rows), draw, legend=False)
