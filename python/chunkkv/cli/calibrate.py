"""chunkkv calibrate: measures settings, reuse groups and leaders on prompts, and writes a recipe for chunkkv-build."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkkv.cli.evaluate import shares, whole_numbers
from chunkkv.cli.options import EngineDir, LogLevel, Threads, float_option, int_option, load, one_line_errors
from chunkkv.errors import ConfigError

if TYPE_CHECKING:
    from chunkkv.evaluation.calibration import Advance

_POLICIES = "chunkkv:pooling=1,chunkkv:chunk_size=20,chunkkv-delimiter:chunk_size=20,chunkkv-delimiter:chunk_size=32"


def calibrate(
    engine_dir: EngineDir,
    data: Annotated[str, typer.Option("--data", metavar="NAME|FILE", help="suites of chunkkv eval, or JSON lines")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="the recipe")] = Path("recipe.json"),
    keep: Annotated[str, typer.Option("--keep", metavar="LIST", help="shares of the prompt kept")] = "0.5,0.2,0.1",
    prompts: Annotated[int, int_option("prompts", "of the data", True)] = 64,
    lengths: Annotated[str, typer.Option("--lengths", metavar="LIST", help="of a suite's prompts")] = "1024",
    policies: Annotated[
        str, typer.Option("--policies", metavar="LIST", help="settings to try, as in chunkkv eval; '' = none")
    ] = _POLICIES,
    max_group: Annotated[int, int_option("max_group", "most layers that share one choice", True)] = 4,
    max_loss: Annotated[
        float, float_option("max_loss", "share of all answers that groups may lose, where there are answers", True)
    ] = 0.01,
    min_agreement: Annotated[
        float, float_option("min_agreement", "least Jaccard with the leader, where there are no answers", True)
    ] = 0.5,
    wording: Annotated[str, typer.Option("--wording", metavar="NAME", help="of a suite: see chunkkv eval")] = "auto",
    seed: Annotated[int, int_option("seed", "of a suite's texts", True)] = 1,
    threads: Threads = None,
    log_level: LogLevel = "info",
) -> None:
    """Find reuse groups, leaders and settings by measuring, and write them as a recipe for chunkkv-build."""
    with one_line_errors(log_level):
        from chunkkv.engine.recipe import write_recipe
        from chunkkv.evaluation.recipe_search import SearchBounds, parse_buildable_policies, search_recipe
        from chunkkv.evaluation.requirements import settings_and_tokenizer
        from chunkkv.evaluation.texts.calibration_prompts import calibration_prompts

        _check(prompts, output)
        bounds = SearchBounds(max_group, max_loss, min_agreement)
        keeps, sizes = shares(keep), whole_numbers("lengths", lengths)
        session = load(engine_dir, threads)
        texts = calibration_prompts(session, data, wording, sizes, prompts, seed)
        tried = parse_buildable_policies(policies, settings_and_tokenizer(session)[0])
        with _progress(log_level == "error") as begin:
            result = search_recipe(session, texts, keeps, tried, bounds, begin)
        measured = result.measurements(data, bounds)
        write_recipe(output, result.recipe_settings(), result.num_layers, measured)
        if log_level != "error":
            _print_agreement(result.agreement)
            _print_rows(measured)
            print(f"{output}: {result.chosen.name}")


def _check(prompts: int, output: Path) -> None:
    if prompts < 1:
        raise ConfigError(f"prompts is {prompts}; give a whole number of at least 1")
    if (output.exists() and not output.is_file()) or not output.absolute().parent.is_dir():
        raise ConfigError(f"output {output} cannot be written: give a file name in a directory that exists")


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yield a function that begins a step of so many prompts and returns what to call after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as progress:

        def begin(name: str, total: int) -> Advance:
            bar = progress.add_task(name, total=total)
            return lambda: progress.advance(bar)

        yield begin


def _print_agreement(agreement: Any) -> None:
    neighbours = [f"{layer}-{layer + 1} {agreement[layer, layer + 1]:.2f}" for layer in range(len(agreement) - 1)]
    print(f"agreement of neighbouring layers (Jaccard of kept tokens): {', '.join(neighbours)}")


def _print_rows(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not measured["rows"]:
        return
    table = Table(title=f"right answers in %, 95 % interval, n = {measured['prompts']}")
    table.add_column("settings", overflow="fold")
    for keep in measured["keep_ratios"]:
        table.add_column(f"keep {keep * 100:g} %", justify="right", no_wrap=True)
    for row in measured["rows"]:
        values = [[f"{cell[name] * 100:.1f}" for name in ("accuracy", "low", "high")] for cell in row["cells"]]
        table.add_row(row["name"], *(f"{share} ({low}–{high})" for share, low, high in values))
    Console().print(table)
