"""The picture of one cell: prefill, time per token and peak memory of every variant."""

from __future__ import annotations

from benchmarks.cpu.results import Measurements, Row, Value, prefill_s
from benchmarks.cpu.variants import PRODUCT, VARIANTS, Cell
from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title


def _number(name: str) -> Value:
    def value(row: Row) -> float:
        return float(row[name])

    return value


PANELS: tuple[tuple[str, Value, str], ...] = (
    ("prefill (s)", prefill_s, "{:.1f}"),
    ("time per token (ms)", _number("step_ms"), "{:.0f}"),
    ("peak memory (MB)", _number("peak_mb"), "{:.0f}"),
)


def draw(measured: Measurements, cell: Cell) -> bytes:
    """Return the PNG."""
    shown = [variant for variant in VARIANTS if measured.median(cell, variant, prefill_s) is not None]
    figure = new_figure(11, 0.8 + 0.27 * len(shown))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    colours = [OURS if variant.engine == PRODUCT else OTHER for variant in shown]
    for axes, (heading, value, form) in zip(panels, PANELS, strict=True):
        values = [measured.median(cell, variant, value) or 0.0 for variant in shown]
        labels = [form.format(number) for number in values]
        labelled_bars(axes, list(range(len(shown))), values, labels, colours=colours, height=0.7, fontsize=7)
        axes.margins(x=0.16)
        title(axes, heading)
    panels[0].set_yticks(range(len(shown)), [variant.title for variant in shown], fontsize=7)
    panels[0].invert_yaxis()
    named = measured.result["machine"]["processor"]
    figure.suptitle(f"SmolLM2-135M, {cell.title}, {named}, {measured.result['date'][:10]}", fontsize=9, color=INK)
    return png(figure, dpi=120)
