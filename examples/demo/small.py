"""The shipped model of 1 M parameters answers a question about a made-up document: what the demo shows offline.

Prints a table (answer, prompt and kept tokens, KV bytes, time to first token, time per token) for the full cache and
for keep 50, 20 and 10 %, and writes a picture and an HTML page of what was kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title
from chunkkv.evaluation.report.inspect_page import write_page
from chunkkv.files import write_whole
from chunkkv.results import GenerationResult, Inspection

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "model"
PROMPT = ROOT / "examples" / "needle" / "prompts" / "demo.json"
KEEP_RATIOS = (0.5, 0.2, 0.1)
# What measured best on this model, see examples/needle/README.md: its facts are sentences of up to 14 tokens.
CHOICE = {
    "chunkkv_layer_reuse": "2",
    "chunkkv_leader": "last",
    "chunkkv_boundaries": "delimiter",
    "chunkkv_chunk_size": "20",
}
REPEATS = 3  # the best of three, because a laptop does other things too


def ask(session: ChunkKVSession, prompt: str, keep_ratio: float | None = None) -> GenerationResult:
    """Answer the prompt; of several runs, report the one with the fastest decode."""
    sampling = SamplingParams(max_new_tokens=24)
    runs = [session.generate(prompt, sampling, keep_ratio=keep_ratio) for _ in range(REPEATS)]
    return min(runs, key=lambda run: run.statistics.tpot_s or 0.0)


def print_table(console: Console, rows: list[tuple[str, GenerationResult]], expected: str) -> None:
    """Print each answer, whether it is right, and what it cost."""
    table = Table(title="One question, one long document, one thread", title_justify="left")
    for column in ("cache", "answer", "prompt tokens", "kept tokens", "KV cache", "first token", "per token"):
        table.add_column(column, justify="left" if column in ("cache", "answer") else "right")
    for name, result in rows:
        is_right = result.text.strip() == expected
        costs = result.statistics
        table.add_row(
            name,
            f"[green]{result.text.strip()} ✓[/]" if is_right else f"[red]{result.text.strip()} ✗[/]",
            f"{costs.prompt_tokens}",
            f"{costs.kept_tokens}",
            f"{costs.cache_bytes / 1024:.0f} KiB",
            f"{costs.ttft_s * 1e3:.1f} ms",
            f"{(costs.tpot_s or 0) * 1e3:.2f} ms",
        )
    console.print(table)


def draw(
    path: Path, rows: list[tuple[str, GenerationResult]], choice: Inspection, answer_span: tuple[int, int]
) -> None:
    """Draw KV bytes and time per token, and where in the prompt the kept tokens lie."""
    figure = new_figure(8, 7)
    sizes, times, places = figure.subplots(3, 1, height_ratios=[2, 2, 1.6])
    names = [name for name, _ in rows]
    panels = (
        (sizes, [r.statistics.cache_bytes / 1024 for _, r in rows], "KV cache of the prompt (KiB)", "{:.0f}"),
        (times, [(r.statistics.tpot_s or 0) * 1e3 for _, r in rows], "time per token (ms)", "{:.2f}"),
    )
    for axes, values, heading, form in panels:
        labels = [form.format(value) for value in values]
        labelled_bars(axes, names, values, labels, colours=[OTHER, *[OURS] * (len(rows) - 1)])
        title(axes, heading)
        axes.invert_yaxis()
        axes.margins(x=0.12)
    length = len(choice.token_ids)
    for number, group in enumerate(choice.groups):
        places.eventplot(group.kept_indices, lineoffsets=number, linelengths=0.7, linewidths=0.6, colors=OURS)
    places.axvspan(*answer_span, color="#eb6834", alpha=0.6, lw=0)
    places.set_yticks(range(len(choice.groups)), [f"layers {g.layers[0]}-{g.layers[-1]}" for g in choice.groups])
    places.set_xlim(0, length)
    share = choice.kept_tokens / length
    title(places, f"positions kept at {share:.0%}, by layer-reuse group (orange: the sentence that holds the answer)")
    places.set_xlabel("position in the prompt", color=INK)
    places.spines[["top", "right"]].set_visible(False)
    write_whole(path, png(figure, dpi=130))


def show(console: Console, folder: Path, build: Callable[..., None]) -> None:
    """Build, ask, print, draw; `build` is called with checkpoint, output and flags."""
    full_engine, chunk_engine = folder / "needle-full", folder / "needle-chunkkv"
    console.print("Building two engines of the shipped model: without and with ChunkKV …")
    build(MODEL, full_engine)
    build(MODEL, chunk_engine, "--chunkkv", *(f"--{name}={value}" for name, value in CHOICE.items()))
    prompt = json.loads(PROMPT.read_text(encoding="utf-8"))
    console.print(f"Question: {prompt['question']}\nRight answer: {prompt['expected']}\n")
    # One thread: enough for a model this small, and its times do not jump when the machine is busy.
    full, chunked = (ChunkKVSession.from_dir(engine, threads=1) for engine in (full_engine, chunk_engine))
    rows = [("full", ask(full, prompt["text"]))]
    rows += [(f"keep {ratio:.0%}", ask(chunked, prompt["text"], ratio)) for ratio in KEEP_RATIOS]
    print_table(console, rows, prompt["expected"])
    choice = chunked.inspect(prompt["text"], keep_ratio=0.2)
    picture, page = folder / "needle.png", folder / "needle.html"
    draw(picture, rows, choice, tuple(prompt["answer_span"]))
    write_page(choice, page)
    console.print(f"\nPicture: {picture}\nWhat was kept, token by token: {page}", soft_wrap=True)
    at_20 = dict(rows)["keep 20%"]
    if at_20.text.strip() != prompt["expected"]:
        raise SystemExit("the answer was not found at keep 20 %")
