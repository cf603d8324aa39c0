"""Draw a benchmark: python benchmarks/picture.py docs/benchmarks/cpu-against-transformers.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title
from chunkkv.files import write_whole

PANELS = (
    ("prefill_ms", "prefill (ms)", "{:.0f}"),
    ("compress_ms", "compression alone (ms)", "{:.1f}"),
    ("decode_ms", "time per token (ms)", "{:.1f}"),
    ("peak_mb", "peak memory (MB)", "{:.0f}"),
)
SIDES = (
    (-0.2, "ours", OURS, "ChunkKV-TRT"),
    (0.2, "transformers_kvpress", OTHER, "transformers + kvpress"),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Write one PNG of the 4-layer model: a panel per quantity, a pair of bars per length and keep ratio."""
    rows = [row for row in result["rows"] if row["model"] == "medium"]
    names = [f"{row['tokens'] // 1024}k, keep {row['keep_ratio']:.0%}" for row in rows]
    figure = new_figure(9, 6.4)
    panels = figure.subplots(2, 2)
    for axes, (key, heading, form) in zip(panels.flat, PANELS, strict=True):
        for shift, side, colour, legend in SIDES:
            values = [row[side][key] for row in rows]
            values = [value["median"] if isinstance(value, dict) else value for value in values]
            labels = [form.format(value) if value else "" for value in values]
            places = [place + shift for place in range(len(rows))]
            labelled_bars(axes, places, values, labels, colours=colour, height=0.38, legend=legend, fontsize=7)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        title(axes, heading)
    panels[0, 1].legend(fontsize=8, frameon=False, loc="upper right")
    shapes = result["shapes"]
    figure.suptitle(
        f"{shapes['num_hidden_layers']} layers, hidden {shapes['hidden_size']}, {shapes['num_attention_heads']}/"
        f"{shapes['num_key_value_heads']} heads, {result['dtype']}, one thread of {result['device']}, {result['date']}",
        fontsize=9,
        color=INK,
    )
    write_whole(path, png(figure, dpi=120))


def main() -> None:
    """Draw the file named on the command line beside it."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
    print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
