"""chunkkv calibrate: finds reading heads, or settings and reuse groups, by measuring, and writes a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_engine_flags,
    add_log_level,
    check_output_file,
    keep_ratios,
    open_session,
    path_argument,
    whole_numbers,
)
from chunkkv.cli.progress import progress_bars
from chunkkv.command_line import CommandParser, UsageError, number, whole_number
from chunkkv.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_POLICIES = "chunkkv:pooling=1,chunkkv:chunk_size=20,chunkkv-delimiter:chunk_size=20,chunkkv-delimiter:chunk_size=32"

_READ_AGAIN = 3  # prompts that reading heads are found on; each alone finds nearly the same


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "calibrate",
        "Find the heads that read far and what they should keep, or with --data settings and reuse groups, by "
        "measuring; write them as a recipe for chunkkv-build.",
        run,
        usage="chunkkv calibrate --engine_dir DIR [flags]",
        required=ENGINE_DIR,
    )
    add_engine_flags(parser)
    _add_prompt_flags(parser)
    _add_search_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=path_argument,
        default=Path("recipe.json"),
        metavar="FILE",
        help="the recipe to write; default: recipe.json",
    )
    output.add_argument(
        "--output_static",
        type=path_argument,
        metavar="FILE",
        help="also write the best proposal for reading heads that needs no second reading at run time",
    )
    add_log_level(output)


def _add_prompt_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--data",
        metavar="NAME|FILE",
        help="find settings and reuse groups for these prompts: suites of chunkkv eval, or a file of JSON lines; "
        "default: find reading heads on real text",
    )
    group.add_argument(
        "--text_file",
        type=path_argument,
        metavar="FILE",
        help="text of your own to find reading heads on; default: docstrings and code of Python",
    )
    template = group.add_mutually_exclusive_group()
    template.add_argument(
        "--chat",
        action="store_true",
        help="put the prompts into the model's chat template; the default where there is one, with wording english",
    )
    template.add_argument("--no_chat", action="store_true", help="use no chat template")
    group.add_argument(
        "--prompts",
        "--examples",
        type=whole_number,
        metavar="N",
        help="number of prompts to measure on; default: 12, with --data 64",
    )
    group.add_argument(
        "--lengths", default="1024", metavar="LIST", help="lengths in tokens of a suite's prompts; default: 1024"
    )
    group.add_argument(
        "--wording", default="auto", metavar="NAME", help="words of a suite's texts, as in chunkkv eval; default: auto"
    )
    group.add_argument("--seed", type=whole_number, default=1, metavar="N", help="seed of a suite's texts; default: 1")


def _add_search_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--keep",
        metavar="LIST",
        help="shares of a prompt's tokens that are kept, each in (0, 1]; reading heads are found for the first; "
        "default: 0.2, with --data 0.5,0.2,0.1",
    )
    group.add_argument(
        "--asked",
        choices=("after", "in"),
        default="after",
        help="where the questions of reading heads stand: after compression, or in the prompt; default: after",
    )
    group.add_argument(
        "--heads", type=whole_number, metavar="N", help="how many KV heads read; default: the best of three numbers"
    )
    group.add_argument(
        "--no_reread",
        action="store_true",
        help="propose nothing that needs a second reading of every prompt at run time",
    )
    group.add_argument(
        "--policies",
        default=_POLICIES,
        metavar="LIST",
        help=f"settings to try beside the engine's, as in chunkkv eval; '' tries none; default: {_POLICIES}",
    )
    group.add_argument(
        "--max_group",
        type=whole_number,
        default=4,
        metavar="N",
        help="most layers that share one choice of tokens; default: 4",
    )
    group.add_argument(
        "--max_loss",
        type=number,
        default=0.01,
        metavar="X",
        help="for prompts with answers: share of right answers, 0 to 1, that groups may lose; default: 0.01",
    )
    group.add_argument(
        "--min_agreement",
        type=number,
        default=0.5,
        metavar="X",
        help="for prompts without answers: least Jaccard index, 0 to 1, of a layer's choice with its leader's; "
        "default: 0.5",
    )


def run(args: argparse.Namespace) -> None:
    """Measure and write the recipe."""
    if args.prompts is not None and args.prompts < 1:
        raise ConfigError(f"prompts is {args.prompts}; give a whole number of at least 1")
    check_output_file("output", args.output)
    if args.output_static is not None:
        check_output_file("output_static", args.output_static)
    if args.data is None:
        _find_heads(args)
        return
    of_heads = {"text_file": args.text_file, "no_reread": args.no_reread, "output_static": args.output_static}
    of_heads |= {"heads": args.heads, "asked": args.asked != "after"}
    for flag in (flag for flag, value in of_heads.items() if value):
        raise UsageError(f"--{flag} has no effect with --data: it is for finding reading heads")
    _find_groups(args)


def _find_heads(args: argparse.Namespace) -> None:
    from chunkkv.engine.recipe import write_recipe
    from chunkkv.evaluation.head_report import decisions, demand_picture, estimate_text, measurements
    from chunkkv.evaluation.head_search import search_heads
    from chunkkv.evaluation.requirements import settings_and_tokenizer
    from chunkkv.evaluation.texts.calibration_texts import calibration_prompt, calibration_texts
    from chunkkv.evaluation.texts.real_texts import file_text

    keep, length = keep_ratios(args.keep or "0.2")[0], whole_numbers("lengths", args.lengths)[0]
    session, quiet = open_session(args), args.log_level == "error"
    _, tokenizer = settings_and_tokenizer(session)
    chat = args.chat or (tokenizer.chat_template is not None and not args.no_chat)
    own_text = None if args.text_file is None else file_text(args.text_file)
    texts, count, asked_later = calibration_texts(own_text), args.prompts or 12, args.asked == "after"
    prompts = [
        calibration_prompt(tokenizer, texts, length, number, args.seed, chat) for number in range(_READ_AGAIN + count)
    ]
    if not quiet:
        print(estimate_text(session, prompts, _READ_AGAIN, asked_later), file=sys.stderr)
    found_on, measured_on = prompts[:_READ_AGAIN], prompts[_READ_AGAIN:]
    with progress_bars(quiet) as begin:
        result = search_heads(session, found_on, measured_on, keep, begin, not args.no_reread, args.heads, asked_later)
    written = {args.output: result.best()}
    if args.output_static is not None:
        written[args.output_static] = result.best(reread=False)
    for path, chosen in written.items():
        measured = measurements(result, chosen, [text.kind for text in texts], length, args.seed, chat)
        write_recipe(path, result.recipe_settings(chosen), len(result.demand), measured)
    if not quiet:
        print(demand_picture(result))
        _print_heads(measured)
        for sentence in decisions(result):
            print(sentence)
        for path, chosen in written.items():
            print(f"{path}: {chosen.candidate.name}")


def _print_heads(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    keep, count = f"keep {measured['keep_ratio'] * 100:g} %", f"n = {measured['prompts']} prompts"
    for name, title in (("rows_in_prompt", "question in the prompt"), ("rows", "asked after compression")):
        if name not in measured:
            continue
        table = Table(title=f"{title}, {keep}, {count}")
        table.add_column("who keeps what", overflow="fold")
        for column in ("right %", "gain in points, 95 %", "log p"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in measured[name]:
            gain, low, high = (f"{row[value] * 100:+.1f}" for value in ("gain", "low", "high"))
            who = row["name"] + (", reread" if row["scorer"] == "reread" else "")
            right, log_p = f"{row['right'] * 100:.1f}", f"{row['log_probability']:.2f}"
            table.add_row(Text(who), right, f"{gain} ({low} to {high})", log_p)
        Console().print(table)


def _find_groups(args: argparse.Namespace) -> None:
    from chunkkv.engine.recipe import write_recipe
    from chunkkv.evaluation.recipe_search import SearchBounds, parse_buildable_policies, search_recipe
    from chunkkv.evaluation.requirements import settings_and_tokenizer
    from chunkkv.evaluation.texts.calibration_prompts import calibration_prompts

    bounds = SearchBounds(args.max_group, args.max_loss, args.min_agreement)
    keeps, lengths = keep_ratios(args.keep or "0.5,0.2,0.1"), whole_numbers("lengths", args.lengths)
    session, chat = open_session(args), True if args.chat else False if args.no_chat else None
    count = args.prompts or 64
    prompts = calibration_prompts(session, args.data, args.wording, lengths, count, args.seed, chat)
    policies = parse_buildable_policies(args.policies, settings_and_tokenizer(session)[0])
    quiet = args.log_level == "error"
    with progress_bars(quiet) as begin:
        result = search_recipe(session, prompts, keeps, policies, bounds, begin)
    measured = result.measurements(args.data, bounds)
    write_recipe(args.output, result.recipe_settings(), result.num_layers, measured)
    if not quiet:
        _print_agreement(result.agreement)
        _print_rows(measured)
        print(f"{args.output}: {result.chosen.name}")


def _print_agreement(agreement: np.ndarray) -> None:
    neighbours = [f"{layer}-{layer + 1} {agreement[layer, layer + 1]:.2f}" for layer in range(len(agreement) - 1)]
    print(f"agreement of neighbouring layers (Jaccard of kept tokens): {', '.join(neighbours)}")


def _print_rows(measurements: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not measurements["rows"]:
        return
    table = Table(title=f"right answers in %, 95 % interval, n = {measurements['prompts']}")
    table.add_column("settings", overflow="fold")
    for keep in measurements["keep_ratios"]:
        table.add_column(f"keep {keep * 100:g} %", justify="right", no_wrap=True)
    for row in measurements["rows"]:
        values = [[f"{cell[name] * 100:.1f}" for name in ("accuracy", "low", "high")] for cell in row["cells"]]
        table.add_row(row["name"], *(f"{share} ({low}–{high})" for share, low, high in values))
    Console().print(table)
