"""chunkkv lm_eval: lm-evaluation-harness's own command line, with engines among its models."""

from __future__ import annotations

import argparse
import sys

from chunkkv.command_line import CommandParser
from chunkkv.errors import BackendUnavailableError


def add_parser(program: CommandParser) -> None:
    """Add the command to the program; every word after it, --help too, is for lm_eval."""
    program.add_command(
        "lm_eval",
        "Run lm-evaluation-harness on an engine: --model chunkkv --model_args engine_dir=DIR,keep_ratio=0.2 --tasks …",
        run,
        aliases=["lm-eval"],
        add_help=False,
        passes_all=True,
    )


def run(args: argparse.Namespace) -> None:
    """Run lm_eval's own main function on the words that were passed on."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"lm-eval needs the Python package {error.name!r}: pip install 'chunkkv-trt[lm-eval]'"
        ) from None
    import chunkkv.evaluation.lm_eval.model  # noqa: F401  # registers the model

    before, sys.argv = sys.argv, ["lm_eval", *args.passed_on]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
