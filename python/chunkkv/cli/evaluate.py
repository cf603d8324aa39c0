"""chunkkv eval: suites, policies and keep ratios on one engine, with progress; a run that was cut off goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_engine_flags,
    add_log_level,
    keep_ratios,
    open_session,
    path_argument,
    split_list,
    whole_numbers,
)
from chunkkv.cli.progress import progress_bars
from chunkkv.command_line import CommandParser, whole_number
from chunkkv.errors import ConfigError

if TYPE_CHECKING:
    from chunkkv.evaluation.evaluator import Evaluator, Plan
    from chunkkv.evaluation.policies import Policy
    from chunkkv.session import ChunkKVSession
    from chunkkv.settings import ChunkKVSettings

_PATIENCE_S = 10.0  # a shorter run is not announced
_DEFAULT_POLICIES = "full,chunkkv,snapkv,pyramidkv,streaming_llm,random"
_OF_THE_ENGINE = "full,engine"  # where no policy can look at the cache


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "eval",
        "Measure the answers that compression costs: accuracy of policies on suites of questions, at equal kept "
        "tokens.",
        run,
        usage="chunkkv eval --engine_dir DIR [flags]",
        required=ENGINE_DIR,
    )
    add_engine_flags(parser)
    _add_prompt_flags(parser)
    group = parser.add_argument_group("compression")
    group.add_argument(
        "--policies",
        metavar="LIST",
        help=f"rules for choosing tokens, with settings as in snapkv:pooling=7; default: {_DEFAULT_POLICIES}; for an "
        f"engine whose heads or layers keep unequal numbers of tokens {_OF_THE_ENGINE}",
    )
    group.add_argument(
        "--keep",
        default="1.0,0.5,0.2,0.1",
        metavar="LIST",
        help="shares of a prompt's tokens that are kept, each in (0, 1]; default: 1.0,0.5,0.2,0.1",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir",
        type=path_argument,
        default=Path("evaluation"),
        metavar="DIR",
        help="directory of the results; an interrupted run there is continued; default: evaluation",
    )
    output.add_argument("--no_plots", action="store_true", help="draw no plots; matplotlib is not needed then")
    add_log_level(output)


def _add_prompt_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--suite",
        metavar="LIST",
        help="suites by name, all of them with all, or file:PATH for a file of JSON lines; default: needle, or copy "
        "where --text_file is given",
    )
    group.add_argument(
        "--text_file",
        type=path_argument,
        metavar="FILE",
        help="text of your own, from which the suites code, keeper and copy cut their prompts",
    )
    group.add_argument(
        "--lengths", default="512,1024", metavar="LIST", help="prompt lengths in tokens; default: 512,1024"
    )
    group.add_argument(
        "--modes",
        default="in,after",
        metavar="LIST",
        help="where the question stands: in the prompt, or after its compression; default: in,after",
    )
    group.add_argument(
        "--examples",
        "--prompts",
        type=whole_number,
        default=50,
        metavar="N",
        help="prompts of every cell of a suite; default: 50",
    )
    group.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the texts; default: 0")
    group.add_argument(
        "--wording",
        default="auto",
        metavar="NAME",
        help="words of the texts: needle, english, or auto for those that the tokenizer knows; default: auto",
    )
    template = group.add_mutually_exclusive_group()
    template.add_argument(
        "--chat",
        action="store_true",
        help="put the prompts into the model's chat template; the default where there is one, with wording english",
    )
    template.add_argument("--no_chat", action="store_true", help="use no chat template")


def run(args: argparse.Namespace) -> None:
    """Measure, or go on measuring, and write records, summary and plots."""
    from chunkkv.evaluation.evaluator import Evaluator
    from chunkkv.evaluation.full_cache_check import FullCacheCheck
    from chunkkv.evaluation.report.figures import check_matplotlib
    from chunkkv.evaluation.report.plots import draw_all
    from chunkkv.evaluation.report.summary import summarize, write_results
    from chunkkv.evaluation.requirements import settings_and_tokenizer

    if not args.no_plots:
        check_matplotlib()
    lengths, keeps, modes = whole_numbers("lengths", args.lengths), keep_ratios(args.keep), _modes(args.modes)
    _check_at_least("examples", args.examples, 1)
    _check_at_least("seed", args.seed, 0)
    session = open_session(args)
    plan = _plan(args, session, lengths, keeps, modes)
    evaluator = Evaluator(session, plan)
    _make_folder(args.output_dir)
    quiet = args.log_level == "error"
    if not quiet:
        _print_estimate(session, evaluator, plan, args.output_dir)
    check = FullCacheCheck(plan.chat)
    with progress_bars(quiet) as begin:
        advance = begin("eval", len(evaluator.examples()))
        try:
            records = evaluator.run(args.output_dir, advance, lambda record: _warn(check.take(record), quiet))
        except KeyboardInterrupt:
            _say(f"eval: {args.output_dir} has what was measured; the same command goes on from there", quiet)
            raise
    for warning in check.remaining():
        _warn(warning, quiet)
    summary = summarize(plan.header(settings_and_tokenizer(session)[0]), records)
    files = write_results(args.output_dir, summary)
    if not args.no_plots:
        files += draw_all(args.output_dir, summary)
    if not quiet:
        _print_table(summary)
        print(f"{args.output_dir}: {', '.join(path.name for path in files)}")


def _make_folder(folder: Path) -> None:
    """Make the directory of the results before any work, or say that there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"output_dir {folder} is a file; give the name of a directory") from None


def _plan(
    args: argparse.Namespace,
    session: ChunkKVSession,
    lengths: tuple[int, ...],
    keeps: tuple[int, ...],
    modes: tuple[str, ...],
) -> Plan:
    from chunkkv.evaluation.evaluator import Plan
    from chunkkv.evaluation.requirements import engine_fingerprint, settings_and_tokenizer
    from chunkkv.evaluation.texts.real_texts import file_text
    from chunkkv.evaluation.texts.suite_list import parse_suites
    from chunkkv.evaluation.texts.templates import choose_wording

    settings, tokenizer = settings_and_tokenizer(session)
    wording = choose_wording(args.wording, tokenizer)
    # The template of the shipped model holds the words that wording needle has already.
    has_template = tokenizer.chat_template is not None and wording.general
    chat = args.chat or (has_template and not args.no_chat)
    policies = _policies(args.policies or _default_policies(session), settings)
    own_text = None if args.text_file is None else file_text(args.text_file)
    names = args.suite or ("needle" if own_text is None else "copy")
    return Plan(
        suites=tuple(parse_suites(names, session, wording, chat, own_text)),
        policies=tuple(policies),
        keeps=keeps,
        lengths=lengths,
        modes=modes,
        examples=args.examples,
        seed=args.seed,
        wording=wording,
        chat=chat,
        engine=engine_fingerprint(args.engine_dir),
    )


def _warn(warning: str | None, quiet: bool) -> None:
    if warning:
        _say(f"chunkkv: warning: {warning}", quiet)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


def _print_estimate(session: ChunkKVSession, evaluator: Evaluator, plan: Plan, folder: Path) -> None:
    """Print how many prompts are to come and about how long they take, where that is worth saying."""
    from chunkkv.evaluation.run_time import duration, estimate_seconds

    if not session.executor.capabilities.blockwise_prefill:
        return
    lengths, total = evaluator.lengths_to_come(folder)
    work = evaluator.work()
    seconds = estimate_seconds(session, lengths, work)
    if seconds > _PATIENCE_S:
        answers = work.together + work.alone
        text = f"eval: {len(lengths)} of {total} prompts to run, {answers} answers each: about {duration(seconds)}"
        print(text, file=sys.stderr)


def _default_policies(session: ChunkKVSession) -> str:
    from chunkkv.evaluation.runner import PromptRunner

    return _DEFAULT_POLICIES if PromptRunner(session).sees_caches() else _OF_THE_ENGINE


def _policies(text: str, settings: ChunkKVSettings) -> list[Policy]:
    """Return the policies listed, and the full cache: its accuracy stands beside every other."""
    from chunkkv.evaluation.policies import make_policy, parse_policies
    from chunkkv.evaluation.report.summary import FULL

    policies = parse_policies(text, settings)
    if FULL in [policy.name for policy in policies]:
        return policies
    return [make_policy(FULL, settings), *policies]


def _modes(text: str) -> tuple[str, ...]:
    from chunkkv.evaluation.evaluator import MODES

    modes = split_list("modes", text)
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"modes has {mode!r}; allowed is {' or '.join(MODES)}")
    return tuple(modes)


def _check_at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} is {value}; give a whole number of at least {least}")


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
            table.add_row(policy, *_cells([row for row in rows if row["policy"] == policy], keeps))
        Console().print(table)


def _cells(rows: Sequence[dict[str, Any]], keeps: Sequence[float]) -> list[str]:
    by_keep_ratio = {row["keep_ratio"]: row for row in rows}
    texts = []
    for keep in keeps:
        row = by_keep_ratio.get(keep)
        values = [f"{row[name] * 100:.1f}" for name in ("accuracy", "low", "high")] if row else []
        texts.append(f"{values[0]} ({values[1]}–{values[2]})" if values else "")
    return texts
