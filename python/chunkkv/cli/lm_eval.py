"""chunkkv lm-eval: lm-evaluation-harness's own command line, with engines among its models."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chunkkv.cli.options import one_line_errors
from chunkkv.errors import BackendUnavailableError

# Nothing is read here: every word, --help too, is for lm_eval.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def lm_eval_command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="LM_EVAL_FLAGS", help="see chunkkv lm-eval --help")
    ] = None,
) -> None:
    """Run lm_eval with an engine: --model chunkkv --model_args engine_dir=DIR,keep_ratio=0.2 --tasks …"""
    with one_line_errors("info"):
        try:
            from lm_eval.__main__ import cli_evaluate
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(
                f"lm-eval needs the Python package {error.name!r}: pip install 'chunkkv-trt[lm-eval]'"
            ) from None
        import chunkkv.evaluation.lm_eval.model  # noqa: F401  # registers the model

        before, sys.argv = sys.argv, ["lm_eval", *(arguments or [])]
        try:
            cli_evaluate()
        finally:
            sys.argv = before
