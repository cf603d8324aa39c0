"""chunkkv inspect: shows on a web page which tokens of a prompt each layer group keeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_budget_flags,
    add_engine_flags,
    add_log_level,
    add_prompt_flags,
    add_scorer,
    check_output_file,
    in_chat_template,
    open_session,
    path_argument,
    read_prompt,
)
from chunkkv.cli.progress import prefill_progress
from chunkkv.command_line import CommandParser


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "inspect",
        "Write one HTML page that shows which tokens of a prompt each layer group keeps.",
        run,
        usage="chunkkv inspect --engine_dir DIR [PROMPT] [flags]",
        required=ENGINE_DIR,
    )
    add_prompt_flags(parser)
    add_engine_flags(parser)
    add_budget_flags(parser)
    add_scorer(parser, "what the engine takes; with --as_context what serves later questions best")
    parser.add_argument(
        "--as_context",
        action="store_true",
        help="show what chunkkv compress keeps of the prompt, for questions that come later",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=path_argument,
        default=Path("chunkkv.html"),
        metavar="FILE",
        help="the page to write; default: chunkkv.html",
    )
    add_log_level(group)


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    from chunkkv.evaluation.report.inspect_page import write_page

    text = read_prompt(args)
    check_output_file("output", args.output)
    session = open_session(args)
    prompt = in_chat_template(args, session, text)
    with prefill_progress(args.log_level == "error") as on_prefill:
        inspection = session.inspect(
            prompt,
            args.keep_ratio,
            args.budget_tokens,
            on_prefill,
            scorer=args.scorer,
            as_context=args.as_context,
        )
    write_page(inspection, args.output)
    print(f"{args.output}: {inspection.kept_tokens} of {len(inspection.token_ids)} tokens kept")
