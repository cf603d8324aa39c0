"""Draw a benchmark: python benchmarks/picture.py docs/benchmarks/cpu-against-transformers.json"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from chunkkv.files import write_whole

INK, OURS, PEER = "#1f2430", "#2a78d6", "#c9d4e3"
PANELS = (
    ("prefill_ms", "prefill (ms)", "{:.0f}"),
    ("compress_ms", "compression alone (ms)", "{:.1f}"),
    ("decode_ms", "time per token (ms)", "{:.1f}"),
    ("peak_mb", "peak memory (MB)", "{:.0f}"),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Write one PNG of the 4-layer model: a panel per quantity, a pair of bars per length and keep ratio."""
    rows = [row for row in result["rows"] if row["model"] == "medium"]
    names = [f"{row['tokens'] // 1024}k, keep {row['keep_ratio']:.0%}" for row in rows]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for axis, (key, title, form) in zip(axes.flat, PANELS, strict=True):
        for shift, side, colour, label in (
            (-0.2, "ours", OURS, "ChunkKV-TRT"),
            (0.2, "transformers_kvpress", PEER, "transformers + kvpress"),
        ):
            values = [row[side][key] for row in rows]
            values = [value["median"] if isinstance(value, dict) else value for value in values]
            places = [place + shift for place in range(len(rows))]
            bars = axis.barh(places, values, height=0.38, color=colour, label=label)
            axis.bar_label(bars, [form.format(v) if v else "" for v in values], padding=3, fontsize=7, color=INK)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.14)
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 1].legend(fontsize=8, frameon=False, loc="upper right")
    shapes = result["shapes"]
    figure.suptitle(
        f"{shapes['num_hidden_layers']} layers, hidden {shapes['hidden_size']}, {shapes['num_attention_heads']}/"
        f"{shapes['num_key_value_heads']} heads, {result['dtype']}, one thread of {result['device']}, {result['date']}",
        fontsize=9,
        color=INK,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def main() -> None:
    """Draw the file named on the command line beside it."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
    print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
