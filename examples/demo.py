"""The whole path in one command: build engines for the shipped model, ask it a question, see what ChunkKV saves.

Prints a table (answer, prompt and kept tokens, KV bytes, time to first token, time per token) for the full cache and
for keep 50, 20 and 10 %, and writes a picture and an HTML page of what was kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.evaluation.report.figures import INK, OTHER, OURS, labelled_bars, new_figure, png, title
from chunkkv.evaluation.report.inspect_page import write_page
from chunkkv.files import write_whole
from chunkkv.results import GenerationResult, Inspection

ROOT = Path(__file__).resolve().parent.parent
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


def build(output: Path, *flags: str) -> None:
    """Build an engine of the shipped model with the project's own command line."""
    command = [sys.executable, str(ROOT / "builder" / "build_engine.py"), "--checkpoint_dir", str(MODEL)]
    command += ["--output_dir", str(output), "--overwrite", "--log_level", "warning", *flags]
    subprocess.run(command, check=True)


def ask(session: ChunkKVSession, prompt: str, keep_ratio: float | None = None) -> GenerationResult:
    """Answer the prompt; of several runs, report the one with the fastest decode."""
    sampling = SamplingParams(max_new_tokens=24)
    runs = [session.generate(prompt, sampling, keep_ratio=keep_ratio) for _ in range(REPEATS)]
    return min(runs, key=lambda run: run.statistics.tpot_s or 0.0)


def show(console: Console, rows: list[tuple[str, GenerationResult]], expected: str) -> None:
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


def relative(path: Path) -> str:
    """Return a path relative to the working directory where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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


def main() -> None:
    """Build, ask, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "engines", help="for engines, picture and page")
    folder = parser.parse_args().output_dir
    console = Console()
    started = time.perf_counter()
    full_engine, chunk_engine = folder / "needle-full", folder / "needle-chunkkv"
    console.print("Building two engines of the shipped model: without and with ChunkKV …")
    build(full_engine)
    build(chunk_engine, "--chunkkv", *(part for name, value in CHOICE.items() for part in (f"--{name}", value)))
    prompt = json.loads(PROMPT.read_text(encoding="utf-8"))
    console.print(f"Question: {prompt['question']}\nRight answer: {prompt['expected']}\n")
    # One thread: enough for a model this small, and its times do not jump when the machine is busy.
    full, chunked = (ChunkKVSession.from_dir(engine, threads=1) for engine in (full_engine, chunk_engine))
    rows = [("full", ask(full, prompt["text"]))]
    rows += [(f"keep {ratio:.0%}", ask(chunked, prompt["text"], ratio)) for ratio in KEEP_RATIOS]
    show(console, rows, prompt["expected"])
    choice = chunked.inspect(prompt["text"], keep_ratio=0.2)
    picture, page = folder / "demo.png", folder / "demo.html"
    draw(picture, rows, choice, tuple(prompt["answer_span"]))
    write_page(choice, page)
    console.print(f"\nPicture: {relative(picture)}\nWhat was kept, token by token: {relative(page)}", soft_wrap=True)
    console.print(f"Took {time.perf_counter() - started:.0f} s.")
    at_20 = dict(rows)["keep 20%"]
    if at_20.text.strip() != prompt["expected"]:
        raise SystemExit("the answer was not found at keep 20 %")


if __name__ == "__main__":
    main()
