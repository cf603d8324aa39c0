"""The pictures of a run, drawn from its summary; the only file of this package that knows matplotlib (extra `eval`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chunkkv.errors import BackendUnavailableError
from chunkkv.evaluation.report.summary import FULL, Row
from chunkkv.files import write_whole

_PANEL = (4.2, 3.2)  # inches
_DPI = 110
_COLUMNS = 4
_COLUMNS_OF_ONE_SHARE = 3


def check_plots() -> None:
    """Raise BackendUnavailableError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BackendUnavailableError(
            "pictures need matplotlib: pip install 'chunkkv-trt[eval]', or give --no_plots"
        ) from None


def draw_all(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """Write every picture that the summary has numbers for; returns the files."""
    drawn = [
        ("accuracy.png", _accuracy(summary)),
        ("positions.png", _positions(summary)),
        ("layers.png", _layers(summary)),
        *_heat_maps(summary),
    ]
    written = []
    for name, picture in drawn:
        if picture is not None:
            write_whole(folder / name, picture)
            written.append(folder / name)
    return written


def _grid(count: int, draw: Callable[[int, Any], None], legend: bool = True, columns: int = _COLUMNS) -> bytes:
    """Return a PNG of `count` panels, each drawn by draw(number, axes), with one legend for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axes in enumerate(panels):
        if number < count:
            draw(number, axes)
        else:
            axes.axis("off")
    if legend:
        found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return out.getvalue()


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _accuracy(summary: dict[str, Any]) -> bytes | None:
    """Accuracy against the share kept, a panel per suite and mode, with 95 % intervals."""
    rows = summary["suites"]
    groups = _unique([(row["suite"], row["mode"]) for row in rows])
    policies = _unique([row["policy"] for row in rows if row["policy"] != FULL])
    if not policies:
        return None

    def draw(number: int, axes: Any) -> None:
        inside = [row for row in rows if (row["suite"], row["mode"]) == groups[number]]
        for row in inside:
            if row["policy"] == FULL:
                axes.axhline(row["accuracy"], color="black", linestyle="--", linewidth=1, label="full cache")
        for index, policy in enumerate(policies):
            line = sorted((row for row in inside if row["policy"] == policy), key=lambda row: row["keep_ratio"])
            at = [row["keep_ratio"] * 100 for row in line]
            values = [row["accuracy"] for row in line]
            errors = [[row["accuracy"] - row["low"] for row in line], [row["high"] - row["accuracy"] for row in line]]
            style = {"color": f"C{index % 10}", "marker": "os^vD"[index // 10 % 5], "markersize": 4, "capsize": 2}
            axes.errorbar(at, values, errors, linewidth=1.2, label=policy, **style)
        axes.set(ylim=(-0.03, 1.03), xlabel="kept, %", ylabel="right answers", xscale="log")
        ticks = sorted({row["keep_ratio"] * 100 for row in inside if row["policy"] != FULL})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{groups[number][0]}, {_mode(groups[number][1])}", fontsize="medium")

    return _grid(len(groups), draw)


def _mode(mode: str) -> str:
    return "question in the prompt" if mode == "in" else "question afterwards"


def _positions(summary: dict[str, Any]) -> bytes | None:
    """Answers that are right through each part, at the smallest share kept; a panel per cell with several parts."""
    rows = [row for row in summary["cells"] if row["through"] and len(row["through"]) > 1]
    smallest = min((row["keep_ratio"] for row in rows if row["policy"] != FULL), default=None)
    rows = [row for row in rows if row["policy"] == FULL or row["keep_ratio"] == smallest]
    kinds: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["suite"], row["mode"], len(row["through"])), []).append(row)
    groups = list(kinds)
    if not groups or smallest is None:
        return None

    def draw(number: int, axes: Any) -> None:
        suite, mode, parts = groups[number]
        inside = kinds[groups[number]]
        for policy in _unique([row["policy"] for row in inside]):
            lines = [(row["n"], row["through"]) for row in inside if row["policy"] == policy]
            total = sum(count for count, _ in lines)
            mean = [sum(count * line[part] for count, line in lines) / total for part in range(parts)]
            style = {"color": "black", "linestyle": "--"} if policy == FULL else {"marker": "o", "markersize": 3}
            label = "full cache" if policy == FULL else policy
            axes.plot(range(1, parts + 1), mean, linewidth=1.2, label=label, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(ylim=(-0.03, 1.03), xlabel="part of the answer", ylabel="right through it")
        axes.set_title(f"{suite} ({parts} parts), {_mode(mode)}, kept {smallest * 100:g} %", fontsize="small")

    return _grid(len(groups), draw)


def _heat_maps(summary: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Depth against length, a panel per policy and share kept; a file per suite and mode that have depths."""
    rows = [row for row in summary["cells"] if {"depth", "length"} <= set(row["cell"])]
    files = []
    for suite, mode in _unique([(row["suite"], row["mode"]) for row in rows]):
        inside = [row for row in rows if (row["suite"], row["mode"]) == (suite, mode)]
        panels = _unique([(row["policy"], row["keep_ratio"]) for row in inside if row["policy"] != FULL])
        shares = max(len({keep for _, keep in panels}), 1)
        panels = [(FULL, 1.0), *[None] * (shares - 1), *panels]  # the full cache in a row of its own
        lengths = sorted({row["cell"]["length"] for row in inside})
        depths = sorted({row["cell"]["depth"] for row in inside})
        found = {
            (row["policy"], row["keep_ratio"], row["cell"]["length"], row["cell"]["depth"]): row["accuracy"]
            for row in inside
        }

        def draw(number: int, axes: Any, panels=panels, lengths=lengths, depths=depths, found=found) -> None:
            if panels[number] is None:
                axes.axis("off")
                return
            policy, keep = panels[number]
            values = [
                [found.get((policy, keep, length, depth), float("nan")) for length in lengths] for depth in depths
            ]
            axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small", color=_ink(value))
            axes.set_xticks(range(len(lengths)), lengths)
            axes.set_yticks(range(len(depths)), [f"{depth * 100:g} %" for depth in depths])
            axes.set(xlabel="prompt tokens", ylabel="depth of the fact")
            axes.set_title("full cache" if policy == FULL else f"{policy}, kept {keep * 100:g} %", fontsize="small")

        columns = shares if shares > 1 else _COLUMNS_OF_ONE_SHARE
        files.append((f"{suite}-{mode}.png", _grid(len(panels), draw, legend=False, columns=columns)))
    return files


def _ink(value: float) -> str:
    return "white" if value < 0.15 or value > 0.85 else "black"  # on the dark ends of the colours


def _layers(summary: dict[str, Any]) -> bytes | None:
    """Jaccard of the kept positions of every two layers, a panel per policy, at the smallest share kept."""
    rows = summary["agreement"]
    smallest = min((row["keep_ratio"] for row in rows), default=None)
    first_mode = rows[0]["mode"] if rows else None
    rows = [row for row in rows if row["keep_ratio"] == smallest and row["mode"] == first_mode]
    if not rows:
        return None

    def draw(number: int, axes: Any) -> None:
        row = rows[number]
        axes.imshow(row["jaccard"], vmin=0, vmax=1, cmap="viridis")
        if len(row["jaccard"]) <= 12:
            for y, line in enumerate(row["jaccard"]):
                for x, value in enumerate(line):
                    axes.text(
                        x,
                        y,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize="small",
                        color="black" if value > 0.6 else "white",
                    )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="layer", ylabel="layer")
        axes.set_title(f"{row['policy']}, kept {row['keep_ratio'] * 100:g} %", fontsize="small")

    return _grid(len(rows), draw, legend=False)
