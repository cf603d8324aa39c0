"""chunkkv calibrate: measures settings, reuse groups and leaders on prompts, and writes a recipe for chunkkv-build."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chunkkv.cli.evaluate import served, shares, whole_numbers
from chunkkv.cli.options import EngineDir, LogLevel, Threads, float_option, int_option, load, one_line_errors
from chunkkv.errors import ConfigError
from chunkkv.settings import KEEP_SCALE

if TYPE_CHECKING:
    from chunkkv.evaluation.calibration import Advance, Calibration, Candidate

_RECIPE_SETTINGS = ("window", "chunk_size", "sinks", "pooling", "boundaries", "score", "gate", "leader")
_POLICIES = "chunkkv:pooling=1,chunkkv:chunk_size=20,chunkkv-delimiter:chunk_size=20,chunkkv-delimiter:chunk_size=32"
_OWN = "the engine's"


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
        from chunkkv.evaluation.calibration import Calibration

        _check(prompts, max_group, max_loss, min_agreement, output)
        keeps, sizes = shares(keep), whole_numbers("lengths", lengths)
        session = load(engine_dir, threads)
        found = _read(session, data, wording, sizes, prompts, seed)
        asks = all(questions for _, questions in found)
        tried = _policies(session, policies) if asks else []
        with _progress(log_level == "error") as steps:
            calibration = Calibration(session, found, keeps, tried, steps("prefill", len(found)))
            result = _by_answers(calibration, tried, max_group, max_loss, steps) if asks else None
            result = result or _by_agreement(calibration, max_group, min_agreement, steps)
        chosen, rows, agreement = result
        bound = {"max_loss": max_loss} if asks else {"min_agreement": min_agreement}
        measured = {"data": data, "prompts": calibration.num_prompts, "max_group": max_group, **bound}
        measured |= {"keep_ratios": [share / KEEP_SCALE for share in keeps], "rows": [_row(row, keeps) for row in rows]}
        measured["agreement"] = agreement.round(4).tolist()
        _write(output, chosen, calibration.num_layers, measured)
        if log_level != "error":
            _print_agreement(agreement)
            _print_rows(measured)
            print(f"{output}: {chosen.name}")


def _check(prompts: int, max_group: int, max_loss: float, min_agreement: float, output: Path) -> None:
    for name, value in (("prompts", prompts), ("max_group", max_group)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; give a whole number of at least 1")
    for name, value in (("max_loss", max_loss), ("min_agreement", min_agreement)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}; allowed is 0 to 1")
    if (output.exists() and not output.is_file()) or not output.absolute().parent.is_dir():
        raise ConfigError(f"output {output} cannot be written: give a file name in a directory that exists")


def _read(session: Any, data: str, wording: str, lengths: tuple[int, ...], count: int, seed: int) -> Any:
    from chunkkv.evaluation.texts.prompts_file import file_prompts, suite_prompts

    _, words = served(session, wording)
    path = Path(data)
    if not data.startswith("file:") and (path.suffix or path.exists()):
        return file_prompts(session, path, count)
    return suite_prompts(session, data, words, lengths, count, seed)


def _policies(session: Any, text: str) -> list[Any]:
    from chunkkv.evaluation.policies import parse_policies

    chosen = parse_policies(text, session.settings) if text.strip() else []
    if other := next(
        (one.name for one in chosen if one.rule not in ("chunkkv", "chunkkv-delimiter", "chunkkv-entropy")), None
    ):
        raise ConfigError(f"policies names {other}, which no engine can be built with; give chunkkv with settings")
    return chosen


def _by_answers(calibration: Calibration, tried: Sequence[Any], most: int, max_loss: float, steps: Any) -> Any:
    """Return the best candidate, all that were measured, and the agreement of layers, where there are answers."""
    from chunkkv.engine.layer_groups import layer_groups
    from chunkkv.evaluation import calibration as c
    from chunkkv.evaluation.report.statistics import paired_difference

    count, layers = calibration.num_prompts, calibration.num_layers
    full = calibration.full(steps(c.FULL, count))
    singles = [c.Candidate(_OWN, calibration.engine), *(c.Candidate(p.name, p.settings) for p in tried)]
    singles = calibration.measure(singles, steps("settings", count))
    base = singles[0]
    for other in singles[1:]:
        _, low, _ = paired_difference((other.right - singles[0].right).mean(axis=0).tolist())
        if low > 0 and other.accuracy > base.accuracy:
            base = other
    agreement = calibration.agreement(base.settings, steps("agreement", count))
    advance = steps("groups", count * 2 * (layers - 1))
    found = c.proposals(lambda leader: c.groups_by_answers(calibration, base, leader, most, max_loss, advance))
    grouped = [_grouped(base, groups, leader) for leader, groups in found.items()]
    fixed = [
        _grouped(base, layer_groups(layers, size), leader) for size in (2, 4) if size <= layers for leader in found
    ]
    unique = {one.name: one for one in (*grouped, *fixed) if len(one.settings.layer_groups) < layers}
    measured = {one.name: one for one in calibration.measure(list(unique.values()), steps("proposals", count))}
    best = c.best([base, *(measured[one.name] for one in grouped if one.name in measured)])
    return best, [full, *singles, *measured.values()], agreement


def _by_agreement(calibration: Calibration, most: int, least: float, steps: Any) -> Any:
    """Return the proposal with the fewest groups, no measured candidates, and the agreement of layers."""
    from chunkkv.evaluation import calibration as c

    agreement = calibration.agreement(calibration.engine, steps("agreement", calibration.num_prompts))
    found = c.proposals(lambda leader: c.groups_by_agreement(agreement, leader, most, least))
    base = c.Candidate(_OWN, calibration.engine)
    return c.best([_grouped(base, groups, leader) for leader, groups in found.items()]), [], agreement


def _grouped(base: Candidate, groups: Any, leader: str) -> Candidate:
    from chunkkv.evaluation import calibration as c

    name = f"{base.name}, groups {c.layer_reuse_text(groups)}, leader {leader}"
    return c.Candidate(name, c.with_groups(base.settings, groups, leader))


def _write(output: Path, chosen: Candidate, num_layers: int, measured: dict[str, Any]) -> None:
    from chunkkv.engine.recipe import write_recipe
    from chunkkv.evaluation.calibration import layer_reuse_text

    settings = {name: getattr(chosen.settings, name) for name in _RECIPE_SETTINGS}
    settings["layer_reuse"] = layer_reuse_text(chosen.settings.layer_groups)
    write_recipe(output, settings, num_layers, measured)


def _row(candidate: Candidate, keeps: Sequence[int]) -> dict[str, Any]:
    from chunkkv.evaluation.report.statistics import wilson

    cells = []
    for keep, right in zip(keeps, candidate.right, strict=True):
        low, high = wilson(float(right.sum()), len(right))
        numbers = {"accuracy": float(right.mean()), "low": low, "high": high}
        cells.append({"keep_ratio": keep / KEEP_SCALE, **{name: round(value, 4) for name, value in numbers.items()}})
    return {"name": candidate.name, "cells": cells}


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
