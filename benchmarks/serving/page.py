"""Writes the page and the picture of a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title
from chunkkv.files import write_whole

NAMES = {"chunkkv serve": "own server", "chunkkv triton": "Triton"}
TEMPLATE = Path(__file__).with_name("page.md")


def write(values: dict[str, Any], output: Path) -> list[Path]:
    """Write the page and the picture beside the JSON file `output`; return both."""
    page, picture = output.with_suffix(".md"), output.with_suffix(".png")
    write_whole(page, render(values, output.name, picture.name))
    write_whole(picture, draw(values))
    return [page, picture]


def render(values: dict[str, Any], data: str, picture: str) -> str:
    """Return the page; `data` and `picture` are the names of the files beside it."""
    counted, minutes = values["capacity"], max(values.get("seconds", 0) / 60, 1)
    parts = {
        "data": data,
        "picture": picture,
        "command": f"`{values['command']}`",
        "machine": values["machine"],
        "made": values.get("remark") or f"Measured on {values['date']} in {minutes:.0f} minutes.",
        "prompt": f"{counted['prompt_tokens']:,}",
        "new": str(counted["new_tokens"]),
        "token bytes": f"{counted['kv_bytes_per_token']:,}",
        "load": _load(values["load"]),
        "conversation": _conversation(values["conversation"]),
        "capacity": _capacity(counted["capacity"]),
        "mixed": _mixed(counted["cpu_ms_per_token"]),
        "recovery": _recovery(values["recovery"]),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def draw(values: dict[str, Any]) -> bytes:
    """Return the picture: a panel per quantity, a bar per server, number of clients and keep ratio."""
    rows = values["load"]
    names = [f"{NAMES[row['server']]}, {row['clients']}, keep {row['keep_ratio']:g}" for row in rows]
    colours = [OURS if row["server"] == "chunkkv serve" else OTHER for row in rows]
    figure = new_figure(11, 1.2 + 0.28 * len(rows))
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (key, heading, form) in zip(
        panels,
        (
            ("tokens_per_s", "tokens per second", "{:.0f}"),
            ("ttft_p50_s", "first token p50 (s)", "{:.2f}"),
            ("ttft_p99_s", "first token p99 (s)", "{:.2f}"),
            ("longest_gap_s", "longest gap (s)", "{:.2f}"),
        ),
        strict=True,
    ):
        quantities = [row[key] for row in rows]
        labels = [form.format(value) for value in quantities]
        labelled_bars(axes, range(len(rows)), quantities, labels, colours=colours, fontsize=7)
        axes.margins(x=0.2)
        title(axes, heading)
    panels[0].set_yticks(range(len(rows)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(f"Server, clients, keep ratio; {values['machine']}", fontsize=9, color=INK)
    return png(figure)


def _table(head: str, rows: list[list[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rule = "|---|" + "---:|" * (head.count("|") - 2)
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _load(rows: list[dict[str, Any]]) -> str:
    head = "| server | clients | keep ratio | tokens/s | per CPU s | first token p50 | p99 | longest gap | load |"
    return _table(
        head,
        [
            [
                f"`{row['server']}`",
                str(row["clients"]),
                f"{row['keep_ratio']:g}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['tokens_per_cpu_s']:.1f}",
                f"{row['ttft_p50_s']:.2f} s",
                f"{row['ttft_p99_s']:.2f} s",
                f"{row['longest_gap_s']:.2f} s",
                f"{row['machine_load'][0]:.1f}",
            ]
            for row in rows
        ],
    )


def _conversation(rows: list[dict[str, Any]]) -> str:
    head = "| keep ratio | prompt tokens | first token of the first | of the second | prefilled for it | times sooner |"
    return _table(
        head,
        [
            [
                f"{row['keep_ratio']:g}",
                str(row["first"]["prompt_tokens"]),
                f"{row['first']['ttft_s']:.2f} s",
                f"{row['second']['ttft_s']:.2f} s",
                str(row["second"]["prompt_tokens"] - row["second"]["cached_tokens"]),
                f"{row['times_sooner']:.1f}",
            ]
            for row in rows
        ],
    )


def _capacity(rows: list[dict[str, Any]]) -> str:
    bounds = sorted({row["kv_bytes"] for row in rows})
    keeps = sorted({row["keep_ratio"] for row in rows}, reverse=True)
    found = {(row["kv_bytes"], row["keep_ratio"]): row["requests"] for row in rows}
    head = "| `kv_bytes` | " + " | ".join(f"keep ratio {keep:g}" for keep in keeps) + " |"
    return _table(head, [[f"{bound / 1e9:g} GB", *(str(found[bound, keep]) for keep in keeps)] for bound in bounds])


def _mixed(rounds: list[dict[str, float]]) -> str:
    same, mixed = ([row[name] for row in rounds] for name in ("same", "mixed"))
    return f"{_range(same)} ms with the same `max_tokens`, {_range(mixed)} ms with eight different ones"


def _recovery(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No tritonserver was installed where this was measured."
    head = "| killed | times | the client knew after | a new request was answered after |"
    return _table(
        head,
        [
            [
                row["killed"],
                str(len(row["client_told_s"])),
                f"{_range(row['client_told_s'])} s",
                f"{_range(row['serving_again_s'])} s",
            ]
            for row in rows
        ],
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
