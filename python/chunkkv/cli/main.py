"""chunkkv: generate from an engine, see what ChunkKV keeps, evaluate, check, profile and serve."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import chunkkv
from chunkkv.cli import (
    calibrate,
    chat,
    compress,
    doctor,
    evaluate,
    generate,
    inspect,
    lm_eval,
    profile,
    serve,
    triton,
    version,
)
from chunkkv.command_line import FAILED, CommandParser, run_program, stop_with
from chunkkv.errors import ConfigError, RequestError

PROGRAM = "chunkkv"
_ADD_PARSERS = (
    generate.add_parser,
    chat.add_parser,
    compress.add_parser,
    inspect.add_parser,
    evaluate.add_parser,
    calibrate.add_parser,
    lm_eval.add_parser,
    doctor.add_parser,
    profile.add_parser,
    serve.add_parser,
    triton.add_parser,
    version.add_parser,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Parameters
    ----------
    arguments : Sequence[str], optional
        Its words; default: those of this process.

    Raises
    ------
    SystemExit
        With 1 for failures, 2 for bad usage, 130 for Ctrl-C, 141 for a closed pipe.
    """
    if sys.stdout is None:
        stop_with(PROGRAM, "standard output is closed; give it a file or a pipe", FAILED)
    run_program(
        PROGRAM,
        parse=lambda: make_parser().parse_args(arguments),
        run=lambda args: args.run_command(args),
        usage_errors=(ConfigError, RequestError),
    )


def make_parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog=PROGRAM,
        usage="chunkkv COMMAND [flags]",
        description="Run an engine built by chunkkv-build.",
        epilog="chunkkv COMMAND --help shows the flags of a command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {chunkkv.__version__}", help="print the version"
    )
    for add_parser in _ADD_PARSERS:
        add_parser(parser)
    return parser


if __name__ == "__main__":
    main()
