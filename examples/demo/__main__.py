"""The whole path in one command: a real model reads a text, and answers from all of its KV cache and from parts of it.

Fetches SmolLM2-135M-Instruct once (93 MB), builds engines with ChunkKV, and asks questions about a chapter of
Moby-Dick. First the questions stand in the prompt, and 20 % or 10 % of the cache stays. Then the chapter is compressed
once to 20 %, without a question, and all questions are asked afterwards. Beside ChunkKV stand the full cache,
SnapKV-style selection and StreamingLLM. Prints answers and costs, and writes a picture and two HTML pages. Where the
model cannot be fetched, a small model that is shipped takes its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / "build" / "matplotlib"))  # else it writes to the home directory

from rich.console import Console  # noqa: E402

from chunkkv import ChunkKVSession  # noqa: E402
from chunkkv.errors import ChunkKVError  # noqa: E402
from examples.demo import asking, fetch, reading, report, small  # noqa: E402

TEXT = Path(__file__).parent / "whaling.json"
RECIPE = ROOT / "examples" / "smollm2" / "recipe.json"  # of the model that is fetched
# For later questions, of any model.
RANKED = "--chunkkv_budget_split ranked --chunkkv_heads each --chunkkv_chunk_size 1 --chunkkv_pooling 1"
# The questions are some that the full cache answers with activations in float32.
WEIGHTS = {
    "float32": (),
    "int8": ("--use_weight_only",),
    "int4": ("--use_weight_only", "--weight_only_precision=int4", "--weight_only_activations=float32"),
}


def build(checkpoint: Path, output: Path, *flags: str) -> None:
    """Build an engine with the project's own command line; a build that fails has said why and ends the demo."""
    command = [sys.executable, str(ROOT / "builder" / "build_engine.py"), "--checkpoint_dir", str(checkpoint)]
    command += ["--output_dir", str(output), "--overwrite", "--log_level", "error", *flags]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def relative(path: Path) -> str:
    """Return a path relative to the working directory where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(words: Sequence[str] | None = None) -> None:
    """Choose the model and run."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="your own: a GGUF file or a Hugging Face directory")
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="of the engines; default: int4 for a GGUF file, float32 for a directory"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="of chunkkv calibrate, for one more engine that is asked afterwards; default: SmolLM2's, and none for a "
        "model of your own",
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "engines", help="for engines, picture and pages")
    parser.add_argument("--cache_dir", type=Path, default=fetch.FOLDER, help="where the fetched model is kept")
    arguments = parser.parse_args(words)
    console = Console(highlight=False)
    folder = arguments.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        model = arguments.model or _fetched(console, arguments.cache_dir)
        if model is None:
            small.show(console, folder, build)
        else:
            recipe = arguments.recipe or (None if arguments.model else RECIPE)
            read(console, model, arguments.weights, folder, reading.Reading.load(TEXT), recipe)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing half-written is left") from None
    except ChunkKVError as problem:
        raise SystemExit(f"demo: {problem}") from None
    console.print(f"Took {time.perf_counter() - started:.0f} s.")


def _fetched(console: Console, folder: Path) -> Path | None:
    """Return the real model's file, or None where it cannot be fetched, after saying so."""
    try:
        if fetch.is_cached(folder):
            return fetch.fetch(folder)
        with stage(console, f"Fetching SmolLM2-135M-Instruct, {fetch.MEGABYTES} MB, once"):
            return fetch.fetch(folder)
    except fetch.FetchError as problem:
        console.print(f"[bold]The real model is not shown:[/] {problem}", soft_wrap=True)
        console.print("What follows shows the small model that is shipped, 1 M parameters, on a made-up document.")
        return None


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """Print a stage when it begins, and its seconds on the same line when it ends."""
    console.print(f"{text} … ", end="", soft_wrap=True, markup=False)
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        console.print()  # what comes next begins a line
        raise
    console.print(f"{time.perf_counter() - started:.1f} s")


def read(
    console: Console,
    model: Path,
    weights: str | None,
    folder: Path,
    asked: reading.Reading,
    recipe: Path | None = None,
) -> None:
    """Build engines of a model, ask every question in both ways, and show, draw and write what came of it."""
    weights = weights or ("int4" if model.suffix == ".gguf" else "float32")
    engine = folder / "demo-chunkkv"
    with stage(console, f"Building an engine of {model.name} with ChunkKV"):
        build(model, engine, "--chunkkv", *WEIGHTS[weights])
    tuned_engines = {reading.OURS: folder / "demo-tuned"}
    with stage(console, "Building one for later questions, which ranks all heads"):
        build(model, tuned_engines[reading.OURS], "--chunkkv", *RANKED.split(), *WEIGHTS[weights])
    if recipe:
        tuned_engines[reading.OURS_RECIPE] = folder / "demo-recipe"
        with stage(console, "Building another for later questions, from a recipe"):
            build(
                model,
                tuned_engines[reading.OURS_RECIPE],
                "--chunkkv",
                "--chunkkv_recipe",
                str(recipe),
                *WEIGHTS[weights],
            )
    session = ChunkKVSession.from_dir(engine)
    tuned = {name: ChunkKVSession.from_dir(path) for name, path in tuned_engines.items()}
    console.print(f"Text: {asked.about}.", soft_wrap=True)
    halves = asking.ask_both_halves(session, tuned, asked, lambda text: stage(console, text))
    picture, page, kept_page = folder / "demo.png", folder / "demo.html", folder / "demo-kept.html"
    with stage(console, "Drawing"):
        choice = asking.inspect(session, asked.prompt(asked.questions[0]), asking.KEEP_RATIOS[0])
        conditions = report.conditions(model.name, weights, session, asked)
        report.write_all(conditions, halves, asked, choice, picture=picture, page=page, kept_page=kept_page)
    for half in halves:
        report.show_half(console, half)
    console.print(f"\nPicture: {relative(picture)}\nAll answers and the text: {relative(page)}", soft_wrap=True)
    console.print(f"What stays of the first prompt, token by token: {relative(kept_page)}", soft_wrap=True)


if __name__ == "__main__":
    main()
