"""chunkkv eval: suites, policies and keep ratios on one engine, with progress; a run that was cut off goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chunkkv.cli.options import EngineDir, LogLevel, Threads, load, one_line_errors
from chunkkv.errors import ConfigError
from chunkkv.settings import keep_ratio_to_per_10k

_DEFAULT_POLICIES = "full,chunkkv,chunkkv-delimiter,snapkv,streaming,random"


def _listed(name: str, metavar: str, text: str) -> Any:
    return typer.Option(f"--{name}", metavar=metavar, help=text)


def evaluate(
    engine_dir: EngineDir,
    suite: Annotated[str, _listed("suite", "LIST", "suites, or all, or file:PATH for a file of JSON lines")] = "needle",
    policies: Annotated[
        str, _listed("policies", "LIST", "rules with settings, as snapkv:pooling=7")
    ] = _DEFAULT_POLICIES,
    keep: Annotated[str, _listed("keep", "LIST", "shares of the prompt kept")] = "1.0,0.5,0.2,0.1",
    lengths: Annotated[str, _listed("lengths", "LIST", "prompt lengths in tokens")] = "512,1024",
    modes: Annotated[str, _listed("modes", "LIST", "question in the prompt, or after compression")] = "in,after",
    examples: Annotated[int, typer.Option("--examples", metavar="N", help="prompts per cell")] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="of the texts")] = 0,
    wording: Annotated[str, _listed("wording", "NAME", "needle, english, or auto: by the tokenizer")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="put prompts into the model's chat template")] = False,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", metavar="DIR", help="results; a run there goes on")
    ] = Path("evaluation"),
    no_plots: Annotated[bool, typer.Option("--no_plots", help="no pictures, no matplotlib")] = False,
    threads: Threads = None,
    log_level: LogLevel = "info",
) -> None:
    """Measure what compression loses: accuracy of policies on suites of questions, at equal kept tokens."""
    with one_line_errors(log_level):
        from chunkkv.evaluation.evaluator import Evaluator, Plan
        from chunkkv.evaluation.policies import make_policy, parse_policies
        from chunkkv.evaluation.report.figures import check_matplotlib
        from chunkkv.evaluation.report.plots import draw_all
        from chunkkv.evaluation.report.summary import FULL, summarize, write_results
        from chunkkv.evaluation.requirements import engine_fingerprint, settings_and_tokenizer
        from chunkkv.evaluation.texts.suite_list import parse_suites
        from chunkkv.evaluation.texts.templates import choose_wording

        if not no_plots:
            check_matplotlib()
        sizes, keeps, chosen_modes = whole_numbers("lengths", lengths), shares(keep), _modes(modes)
        for name, value in (("examples", examples), ("seed", seed + 1)):
            if value < 1:
                raise ConfigError(f"{name} is {value if name == 'examples' else seed}; give a larger whole number")
        session = load(engine_dir, threads)
        settings, tokenizer = settings_and_tokenizer(session)
        words = choose_wording(wording, tokenizer)
        chosen = parse_policies(policies, settings)
        if FULL not in [policy.name for policy in chosen]:
            chosen = [make_policy(FULL, settings), *chosen]  # its accuracy stands beside every other
        plan = Plan(
            suites=tuple(parse_suites(suite, session, words, chat)),
            policies=tuple(chosen),
            keeps=keeps,
            lengths=sizes,
            modes=chosen_modes,
            examples=examples,
            seed=seed,
            wording=words,
            chat=chat,
            engine=engine_fingerprint(engine_dir),
        )
        evaluator = Evaluator(session, plan)
        records = _with_progress(evaluator, output_dir, quiet=log_level == "error")
        summary = summarize(plan.header(settings), records)
        files = write_results(output_dir, summary)
        files += [] if no_plots else draw_all(output_dir, summary)
        if log_level != "error":
            _print_table(summary)
            print(f"{output_dir}: {', '.join(path.name for path in files)}")


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{name} is {text!r}; give different values separated by commas")
    return parts


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Return a list of whole numbers of at least 1; raises ConfigError that names the flag."""
    parts = _parts(name, text)
    if wrong := next((part for part in parts if not part.isdecimal() or len(part) > 9 or int(part) < 1), None):
        raise ConfigError(f"{name} has {wrong!r}; give whole numbers of at least 1")
    return tuple(int(part) for part in parts)


def shares(text: str) -> tuple[int, ...]:
    """Return a list of keep ratios as shares of 10,000, the largest first; raises ConfigError."""
    found = []
    for part in _parts("keep", text):
        try:
            number = float(part)
        except ValueError:
            raise ConfigError(f"keep has {part!r}; give shares in (0, 1] such as 0.2") from None
        found.append(keep_ratio_to_per_10k(number, "keep"))
    return tuple(sorted(set(found), reverse=True))


def _modes(text: str) -> tuple[str, ...]:
    from chunkkv.evaluation.evaluator import MODES

    parts = _parts("modes", text)
    if wrong := next((part for part in parts if part not in MODES), None):
        raise ConfigError(f"modes has {wrong!r}; allowed is {' or '.join(MODES)}")
    return tuple(parts)


def _with_progress(evaluator: Any, folder: Path, quiet: bool) -> list[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as progress:
        bar = progress.add_task("prompts", total=len(evaluator.examples()))
        return evaluator.run(folder, lambda count: progress.advance(bar, count))


def _print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for suite, mode in dict.fromkeys((row["suite"], row["mode"]) for row in summary["suites"]):
        rows = [row for row in summary["suites"] if (row["suite"], row["mode"]) == (suite, mode)]
        keeps = sorted({row["keep_ratio"] for row in rows}, reverse=True)
        table = Table(title=f"{suite}, question {mode} (right answers in %, 95 % interval, n = {rows[0]['n']})")
        table.add_column("policy", overflow="fold")
        for keep in keeps:
            kept = max(row["kept"] for row in rows if row["keep_ratio"] == keep)
            head = "full" if keep == 1 else f"keep {keep * 100:g} %"
            table.add_column(f"{head}\n{kept:g} tokens", justify="right")
        for policy in dict.fromkeys(row["policy"] for row in rows):
            table.add_row(policy, *_shown([row for row in rows if row["policy"] == policy], keeps))
        Console().print(table)


def _shown(rows: Sequence[dict[str, Any]], keeps: Sequence[float]) -> list[str]:
    found = {row["keep_ratio"]: row for row in rows}
    texts = []
    for keep in keeps:
        row = found.get(keep)
        values = [f"{row[name] * 100:.1f}" for name in ("accuracy", "low", "high")] if row else []
        texts.append(f"{values[0]} ({values[1]}–{values[2]})" if values else "")
    return texts
