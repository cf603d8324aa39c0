"""chunkkv compress: prefills and compresses a prompt once, for any number of questions with generate --context."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_budget_flags,
    add_engine_flags,
    add_json,
    add_log_level,
    add_prompt_flags,
    add_scorer,
    check_output_file,
    open_session,
    path_argument,
    read_prompt,
)
from chunkkv.cli.progress import prefill_progress
from chunkkv.command_line import CommandParser
from chunkkv.errors import RequestError

if TYPE_CHECKING:
    from chunkkv.requests import Prompt

_SUFFIX = ".safetensors"


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "compress",
        "Compress a prompt once and save it, for questions with generate --context.",
        run,
        usage="chunkkv compress --engine_dir DIR --output FILE [PROMPT] [flags]",
        required={**ENGINE_DIR, "output": f"the file to write, which ends in {_SUFFIX}"},
    )
    add_prompt_flags(parser)
    add_engine_flags(parser)
    add_budget_flags(parser)
    add_scorer(parser, "what serves later questions best")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=path_argument, metavar="FILE", help=f"required: the file to write, which ends in {_SUFFIX}"
    )
    add_json(output, "file, tokens, kept tokens and bytes")
    add_log_level(output)


def run(args: argparse.Namespace) -> None:
    """Compress the prompt and write the file."""
    check_output_file("output", args.output, _SUFFIX)
    text = read_prompt(args)
    if args.chat and not isinstance(text, str):
        raise RequestError("chat needs a prompt of text; give its text or --prompt_file, or leave --chat out")
    session = open_session(args)
    prompt: Prompt = [{"role": "user", "content": text}] if args.chat else text
    with prefill_progress(args.log_level == "error") as on_prefill:
        context = session.compress(
            prompt,
            keep_ratio=args.keep_ratio,
            budget_tokens=args.budget_tokens,
            scorer=args.scorer,
            on_prefill=on_prefill,
        )
    context.save(args.output)
    if args.as_json:
        values = {"file": str(args.output), "tokens": len(context), "kept_tokens": context.kept_tokens}
        print(json.dumps({**values, "bytes": context.nbytes, "scorer": context.scorer}))
    elif args.log_level != "error":
        print(
            f"{args.output}: {len(context)} tokens, {context.kept_tokens} kept, {context.nbytes / 1e6:.1f} MB",
            file=sys.stderr,
        )
