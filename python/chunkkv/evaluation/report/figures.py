"""What the pictures share: a matplotlib figure without a window, its PNG, the colours, and bars with their values.

matplotlib is the extra `plots`; it is imported when a picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chunkkv.errors import BackendUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2430"  # text
OURS, OTHER = "#2a78d6", "#c9d4e3"  # bars of ChunkKV, and of what it is compared with
FILE_DPI = 110


def check_matplotlib() -> None:
    """Raise BackendUnavailableError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BackendUnavailableError(
            "pictures need matplotlib: pip install 'chunkkv-trt[eval]', or give --no_plots"
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; it belongs to no window and needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = FILE_DPI) -> bytes:
    """Return the figure as a PNG file; the same figure gives the same bytes with one version of matplotlib."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def labelled_bars(
    axes: Axes,
    places: Sequence[float] | Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    colours: str | Sequence[str] = OURS,
    height: float = 0.62,
    legend: str = "",
    fontsize: float = 9,
) -> None:
    """Draw horizontal bars, the first on top after invert_yaxis(), each with a text behind its end.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Where they are drawn.
    places : Sequence[float] or Sequence[str]
        Position of each bar, or its name.
    values : Sequence[float]
        Length of each bar.
    labels : Sequence[str]
        Text of each bar.
    colours : str or Sequence[str]
        One colour, or one per bar.
    height : float
        Thickness of a bar; 1 is the distance between two.
    legend : str
        Name in the legend; empty for none.
    fontsize : float
        Of the texts, in points.
    """
    bars = axes.barh(places, values, height=height, color=colours, label=legend or None)
    axes.bar_label(bars, labels, padding=3, fontsize=fontsize, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def title(axes: Axes, text: str) -> None:
    """Write a title over the left end of the axes."""
    axes.set_title(text, loc="left", fontsize=10, color=INK)
