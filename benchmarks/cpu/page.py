"""Writes docs/cpu.md, its pictures and README's table from the measurements."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.machine import QUIET_CORES, ROOT
from benchmarks.cpu.picture import draw
from benchmarks.cpu.results import LEVEL, QUANTITIES, Comparison, Measurements, Row, prefill_s
from benchmarks.cpu.variants import FLOAT32, INT4_ALL, INT4_CACHE, PRODUCT, REDUCED, TITLES, VARIANTS, Cell, Variant
from chunkkv.files import write_whole

TEMPLATE, OF_MACHINE = Path(__file__).with_name("page.md"), Path(__file__).with_name("machine.md")
PAGE = ROOT / "docs" / "cpu.md"
README = ROOT / "README.md"
MARKS = "<!-- make bench writes from here -->", "<!-- to here -->"
GROUPS = {FLOAT32: "float32", REDUCED: "fewer bits"}
README_VARIANTS = tuple(
    one
    for one in VARIANTS
    if one.group == FLOAT32
    or one.weights in ("int4", INT4_CACHE, INT4_ALL, "Q4_0")
    or (one.engine, one.weights) == (PRODUCT, "int8")
)


def _cell(text: str) -> str:
    return f" {text} |"


def _seconds(value: float | None, cpu: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" + ("" if cpu is None else f" ({cpu:.2f})")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def table(measured: Measurements, cell: Cell, group: str) -> str:
    """Return the table of one group of a cell; empty where nothing was measured."""
    lines = []
    for variant in (one for one in VARIANTS if one.group == group):
        prefill = measured.median(cell, variant, prefill_s)
        if prefill is None:
            continue

        def of(name: str, variant: Variant = variant) -> float | None:
            return measured.median(cell, variant, lambda row: row[name])

        compress, step, step_cpu = of("compress_s"), of("step_ms"), of("step_cpu_ms")
        texts = (
            variant.title,
            _seconds(prefill, of("first_token_cpu_s")),
            _seconds(of("first_token_s")),
            "–" if compress is None else f"{1e3 * compress:.0f}",
            f"{step:.1f} ({step_cpu:.1f})",
            _whole(of("peak_mb")),
            _whole(of("loaded_mb")),
        )
        lines.append("|" + "".join(map(_cell, texts)))
    if not lines:
        return ""
    heads = (
        GROUPS[group],
        "prefill s (CPU to first token)",
        "first token s",
        "compression ms",
        "ms per token (CPU)",
        "peak MB",
        "loaded MB",
    )
    return "\n".join(["|" + "".join(map(_cell, heads)), "|---|" + "---:|" * (len(heads) - 1), *lines])


def tables(measured: Measurements) -> str:
    """Return a heading and the tables of every cell."""
    parts = []
    for cell in measured.cells:
        found = [text for group in GROUPS if (text := table(measured, cell, group))]
        parts += [f"#### {cell.title[0].upper()}{cell.title[1:]}", *found]
    return "\n\n".join(parts)


def behind(measured: Measurements) -> list[Comparison]:
    """Return where a peer is ahead by more than what counts as level."""
    found = [one for group in GROUPS for one in measured.comparisons(group)]
    return [one for one in found if one.ratio < 1 - LEVEL]


def verdict(measured: Measurements) -> str:
    """Return in how many comparisons the product is ahead, level and behind."""
    lines = []
    for group, title in GROUPS.items():
        found = measured.comparisons(group)
        worse = sum(one.ratio < 1 - LEVEL for one in found)
        better = sum(one.ratio > 1 + LEVEL for one in found)
        lines.append(
            f"- {title}: of {len(found)} comparisons with the best peer, ChunkKV-TRT is ahead in {better}, "
            f"level within {LEVEL:.0%} in {len(found) - worse - better} and behind in {worse}."
        )
    return "\n".join(lines)


def ahead(measured: Measurements) -> str:
    """Return the table of the comparisons in which a peer is ahead."""
    found = behind(measured)
    if not found:
        return "No peer was ahead by more than that."
    values = {quantity.name: quantity.value for quantity in QUANTITIES}
    lines = ["| | best peer | | best of ChunkKV-TRT | | peer ÷ ours |", "|---|---|---:|---|---:|---:|"]
    for one in sorted(found, key=lambda one: (one.cell.rows, one.cell.threads, one.cell.tokens, one.ratio)):
        value, unit = values[one.quantity], UNITS[one.quantity]
        peer, ours = (measured.median(one.cell, variant, value) for variant in (one.peer, one.ours))
        assert peer is not None and ours is not None
        lines.append(
            f"| {one.cell.title}: {one.quantity} | {one.peer.title} | {unit(peer)} | {one.ours.title} | {unit(ours)} | "
            f"{one.ratio:.2f} |"
        )
    return "\n".join(lines)


UNITS = {
    "prefill": "{:.2f} s".format,
    "first token": "{:.2f} s".format,
    "a token, full cache": "{:.1f} ms".format,
    "a token, 20 % kept": "{:.1f} ms".format,
    "peak memory, 20 % kept": "{:.0f} MB".format,
    "compression": lambda value: f"{1e3 * value:.0f} ms",
}


def quiet(measured: Measurements) -> str:
    """Return how busy the machine was with other work."""
    count, all_of = measured.quiet, len(measured.measurements)
    worst = max(row["other_cores"] for row in measured.measurements)
    if count == all_of:
        return f"The machine was quiet: during no measurement did other work take more than {QUIET_CORES} cores."
    return (
        f"The machine was not quiet: during {all_of - count} of {all_of} measurements other work took more than "
        f"{QUIET_CORES} cores, at most {worst}. Times of these are too long."
    )


def rounds(measured: Measurements) -> str:
    """Return how many rounds each cell has: a single one scatters more than the median of several."""
    by_count: dict[int, list[str]] = {}
    for cell, count in measured.rounds.items():
        by_count.setdefault(count, []).append(cell.title)
    if len(by_count) == 1:
        return f"{next(iter(by_count))} in every cell"
    most_cells = max(by_count, key=lambda count: len(by_count[count]))
    others = [f"{count} at {'; '.join(titles)}" for count, titles in by_count.items() if count != most_cells]
    return f"{', '.join(others)}, and {most_cells} in every other cell"


def agreement(measured: Measurements) -> str:
    """Return how far the answers of the float32 engines agree."""
    counts = {cell: measured.agreeing_tokens(cell, FLOAT32) for cell in measured.cells if cell.rows == 1}
    lines = [f"{count} at {cell.title}" for cell, count in counts.items()]
    return (
        (
            "- Float32 engines with the full cache write the same answer; of its first 16 tokens all have in common: "
            + "; ".join(lines)
            + "."
        )
        if lines
        else ""
    )


def machine(measured: Measurements) -> str:
    """Return the sentences about the machine."""
    found = measured.result["machine"]
    text = (
        f"Measured on {measured.result['date'][:10]}, on {found['cores']} cores of an {found['processor']} with "
        f"{found['memory_gb']:.0f} GB ({found['system']})."
    )
    if found.get("is_virtual"):
        text += (
            " It is a virtual machine: work of others on its host, and where the host runs its processors, change "
            "times between rounds, and cannot be seen from inside."
        )
    return text


def missing(measured: Measurements) -> str:
    """Return what was not measured, and why."""
    found = measured.result["missing"]
    return "\n".join(f"- Not measured: {TITLES[engine]}, because {reason}." for engine, reason in found.items())


def versions(measured: Measurements) -> str:
    """Return the engines' versions."""
    return "; ".join(f"{TITLES[engine]}: {text}" for engine, text in measured.result["versions"].items())


def wrapped(text: str) -> str:
    """Return `text` with prose broken at 120 columns; tables, headings and pictures stay whole."""
    lines = []
    for line in text.splitlines():
        is_prose = len(line) > 120 and not line.startswith(("|", "#", "![", "    "))
        indent = "  " if line.startswith(("- ", "  ")) else ""
        lines += (
            textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            if is_prose
            else [line]
        )
    return "\n".join(lines)


def processor(measured: Measurements) -> str:
    """Return the processor's name without trademarks."""
    return re.sub(r"\(.*?\)", "", measured.result["machine"]["processor"]).strip()


def render(every: Sequence[Measurements]) -> str:
    """Return the page."""
    parts = [TEMPLATE.read_text(encoding="utf-8"), *map(section, every)]
    return re.sub(r"\n{3,}", "\n\n", wrapped("\n".join(parts))).rstrip() + "\n"


def section(measured: Measurements) -> str:
    """Return what the page says of one kind of processor; raises KeyError for a place in machine.md without a text."""
    texts = {
        "processor": processor(measured),
        "json": measured.file.relative_to(PAGE.parent).as_posix(),
        "picture": measured.picture.relative_to(PAGE.parent).as_posix(),
        "verdict": verdict(measured),
        "ahead": ahead(measured),
        "machine": machine(measured),
        "model": f"`{measured.result['model']}`",
        "steps": str(measured.result["steps"]),
        "rounds": rounds(measured),
        "quiet": quiet(measured),
        "agreement": agreement(measured),
        "versions": versions(measured),
        "missing": missing(measured),
        "tables": tables(measured),
    }
    return re.sub(r"\{\{(.+?)\}\}", lambda place: texts[place[1]], OF_MACHINE.read_text(encoding="utf-8"))


def readme_cell(measured: Measurements) -> Cell:
    """Return the cell that README shows: one prompt and one thread, the longest of at most 4,096 tokens."""
    alone = [cell for cell in measured.cells if (cell.threads, cell.rows) == (1, 1) and cell.tokens <= 4096]
    return alone[-1] if alone else measured.cells[0]


def readme_table(measured: Measurements) -> str:
    """Return README's table and the sentence below it."""
    cell = readme_cell(measured)
    lines = [
        f"| {cell.title} | prefill | compression | per token | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for variant in README_VARIANTS:
        prefill = measured.median(cell, variant, prefill_s)
        if prefill is None:
            continue
        compress = measured.median(cell, variant, lambda row: row["compress_s"])
        step, peak = (_median(measured, cell, variant, name) for name in ("step_ms", "peak_mb"))
        shown = "–" if compress is None else f"{1e3 * compress:.0f} ms"
        lines.append(f"| {variant.title} | {prefill:.1f} s | {shown} | {step:.1f} ms | {peak:.0f} MB |")
    return "\n".join([*lines, "", wrapped(f"{machine(measured)} {quiet(measured)}")])


def _median(measured: Measurements, cell: Cell, variant: Variant, name: str) -> float:
    def value(row: Row) -> float:
        return float(row[name])

    found = measured.median(cell, variant, value)
    assert found is not None
    return found


def with_readme_table(text: str, measured: Measurements) -> str:
    """Return README's text with its table replaced."""
    start, end = (text.index(mark) for mark in MARKS)
    return f"{text[:start]}{MARKS[0]}\n{readme_table(measured)}\n{text[end:]}"


def write(every: Sequence[Measurements]) -> list[Path]:
    """Write page, pictures and README, which shows the first of `every`; return the files."""
    for measured in every:
        write_whole(measured.picture, draw(measured, readme_cell(measured)))
    write_whole(PAGE, render(every))
    write_whole(README, with_readme_table(README.read_text(encoding="utf-8"), every[0]))
    return [PAGE, *(measured.picture for measured in every), README]
