"""chunkkv calibrate: measures settings, reuse groups and leaders on prompts, and writes a recipe for chunkkv-build."""

from __future__ import annotations

import argparse
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
from chunkkv.command_line import CommandParser, number, whole_number
from chunkkv.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_POLICIES = "chunkkv:pooling=1,chunkkv:chunk_size=20,chunkkv-delimiter:chunk_size=20,chunkkv-delimiter:chunk_size=32"


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "calibrate",
        "Find reuse groups, leaders and settings by measuring, and write them as a recipe for chunkkv-build.",
        run,
        usage="chunkkv calibrate --engine_dir DIR --data NAME|FILE [flags]",
        required={**ENGINE_DIR, "data": "suites of chunkkv eval, or a file of JSON lines"},
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
    add_log_level(output)


def _add_prompt_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--data", metavar="NAME|FILE", help="required: suites of chunkkv eval, or a file of JSON lines")
    group.add_argument(
        "--prompts",
        "--examples",
        type=whole_number,
        default=64,
        metavar="N",
        help="number of prompts to measure on; default: 64",
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
        default="0.5,0.2,0.1",
        metavar="LIST",
        help="shares of a prompt's tokens that are kept, each in (0, 1]; default: 0.5,0.2,0.1",
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
    from chunkkv.engine.recipe import write_recipe
    from chunkkv.evaluation.recipe_search import SearchBounds, parse_buildable_policies, search_recipe
    from chunkkv.evaluation.requirements import settings_and_tokenizer
    from chunkkv.evaluation.texts.calibration_prompts import calibration_prompts

    if args.prompts < 1:
        raise ConfigError(f"prompts is {args.prompts}; give a whole number of at least 1")
    check_output_file("output", args.output)
    bounds = SearchBounds(args.max_group, args.max_loss, args.min_agreement)
    keeps, lengths = keep_ratios(args.keep), whole_numbers("lengths", args.lengths)
    session = open_session(args)
    prompts = calibration_prompts(session, args.data, args.wording, lengths, args.prompts, args.seed)
    policies = parse_buildable_policies(args.policies, settings_and_tokenizer(session)[0])
    quiet = args.log_level == "error"
    with progress_bars(quiet) as begin:
        result = search_recipe(session, prompts, keeps, policies, bounds, begin)
    measurements = result.measurements(args.data, bounds)
    write_recipe(args.output, result.recipe_settings(), result.num_layers, measurements)
    if not quiet:
        _print_agreement(result.agreement)
        _print_rows(measurements)
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
