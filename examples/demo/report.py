"""What the demo shows: a table in the terminal, a picture, and a page that holds both and every answer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chunkkv import ChunkKVSession
from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title
from chunkkv.evaluation.report.inspect_page import write_page
from chunkkv.files import write_whole
from chunkkv.results import Inspection
from examples.demo import reading

ANSWER_CHARACTERS = 100


@dataclass(frozen=True)
class Conditions:
    """What was asked and how: lines for the reader."""

    model: str
    text: str
    engine: str


def shortened(answer: str) -> str:
    """Return an answer for one line."""
    return answer if len(answer) <= ANSWER_CHARACTERS else answer[: ANSWER_CHARACTERS - 1] + "…"


def columns(half: reading.Half) -> tuple[str, ...]:
    """Return the headings of what costs() returns."""
    is_afterwards = half.outcomes[0].document_s is not None
    return "kept tokens", "KV cache", *(("text, once",) if is_afterwards else ()), "first token", "per token"


def costs(outcome: reading.Outcome) -> tuple[str, ...]:
    """Return what an outcome cost, as texts, means over the questions; see columns()."""
    first, each, once = outcome.first_token_s, outcome.per_token_s, outcome.document_s
    return (
        f"{mean(outcome.kept_tokens):.0f}",
        f"{mean(outcome.cache_bytes) / 2**20:.1f} MiB",
        *((f"{once:.2f} s",) if once is not None else ()),
        f"{mean(first):.2f} s" if first else "–",
        f"{mean(each) * 1e3:.1f} ms" if each else "–",
    )


def show_half(console: Console, half: reading.Half) -> None:
    """Print the table of one half, and below it every answer."""
    table = Table(title=half.heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("cache", "right", *columns(half)):
        # A line for each word of a heading lets the widest table stand in 80 columns.
        table.add_column(column.replace(" ", "\n"), justify="left" if column == "cache" else "right", no_wrap=True)
    for outcome in half.outcomes:
        right = f"{sum(outcome.is_right)} of {len(outcome.is_right)}"
        table.add_row(outcome.name, right, *costs(outcome))
    console.print()
    console.print(table)
    console.print(half.note, soft_wrap=True, markup=False)
    for number, question in enumerate(half.questions):
        console.print(f"{number + 1}. {escape(question.text)}", style="bold", soft_wrap=True)
        for outcome in half.outcomes:
            mark = "[green]✓[/]" if outcome.is_right[number] else "[red]✗[/]"
            console.print(f"   {outcome.name:<19} {mark} {escape(shortened(outcome.answers[number]))}", soft_wrap=True)


def draw(path: Path, halves: Sequence[reading.Half], choice: Inspection) -> None:
    """Draw the right answers and the cache of each method, and how many layers keep each token of one prompt."""
    figure = new_figure(9, 2.6 + 2.6 * len(halves))
    rows = figure.subfigures(len(halves) + 1, 1, height_ratios=[*[2.6] * len(halves), 1.6], squeeze=False)[:, 0]
    for half, part in zip(halves, rows[:-1], strict=True):
        names = [outcome.name for outcome in half.outcomes]
        own = (reading.OURS, reading.OURS_RECIPE, reading.OURS_WINDOW)
        colours = [OURS if outcome.method in own else OTHER for outcome in half.outcomes]
        right, sizes = part.subplots(1, 2, sharey=True)
        counts = [sum(outcome.is_right) for outcome in half.outcomes]
        labelled_bars(right, names, counts, [str(count) for count in counts], colours=colours)
        right.set_xlim(0, len(half.questions) + 0.5)
        title(right, f"{half.heading}: right answers of {len(half.questions)}")
        bytes_kept = [mean(outcome.cache_bytes) / 2**20 for outcome in half.outcomes]
        labelled_bars(sizes, names, bytes_kept, [f"{size:.1f}" for size in bytes_kept], colours=colours)
        title(sizes, "KV cache of the prompt (MiB)")
        sizes.margins(x=0.15)
        right.invert_yaxis()
    axes = rows[-1].subplots(1, 1)
    shares = choice.keeping_shares()
    axes.fill_between(range(len(shares)), shares, step="mid", color=OURS, lw=0)
    axes.set(xlim=(0, len(shares)), ylim=(0, 1))
    axes.set_xlabel("position in the prompt", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    kept = f"{choice.kept_tokens} of {len(choice.tokens)} tokens"
    title(axes, f"Question 1: share of the layers that keep a token, where ChunkKV keeps {kept}")
    write_whole(path, png(figure, dpi=130))


def conditions(model: str, weights: str, session: ChunkKVSession, asked: reading.Reading) -> Conditions:
    """Return the conditions of a run on this engine."""
    settings = session.settings
    assert settings is not None
    chunks = f"chunks of {'up to ' if settings.boundaries == 'delimiter' else ''}{settings.chunk_size} tokens"
    return Conditions(
        model=f"{model}, weights {weights}",
        text=f"{asked.about}.",
        engine=f"ChunkKV with {chunks}, window {settings.window}, sinks {settings.sinks}, on ONNX Runtime",
    )


def write_all(
    shown: Conditions,
    halves: Sequence[reading.Half],
    asked: reading.Reading,
    choice: Inspection,
    *,
    picture: Path,
    page: Path,
    kept_page: Path,
) -> None:
    """Write the picture, the page of what stays of the first prompt, and the page with everything else."""
    draw(picture, halves, choice)
    write_page(choice, kept_page)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(
        conditions=shown,
        halves=halves,
        columns=columns,
        costs=costs,
        picture=base64.b64encode(picture.read_bytes()).decode("ascii"),
        kept_page=kept_page.name,
        reading=asked,
    )
    write_whole(page, text)
