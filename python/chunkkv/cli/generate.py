"""chunkkv generate: answers one prompt and prints the text as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_budget_flags,
    add_engine_flags,
    add_json,
    add_log_level,
    add_prompt_flags,
    add_scorer,
    in_chat_template,
    open_session,
    path_argument,
    read_prompt,
)
from chunkkv.cli.progress import prefill_progress
from chunkkv.cli.sampling_flags import add_sampling_flags, sampling_params
from chunkkv.command_line import CommandParser, UsageError, interrupt_as_cancel
from chunkkv.errors import EngineError

if TYPE_CHECKING:
    from chunkkv.results import GenerationResult, StreamEvent

_NO_ANSWER = "the engine ended without an answer"


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "generate",
        "Answer a prompt and print the text as it comes.",
        run,
        usage="chunkkv generate --engine_dir DIR [PROMPT] [flags]",
        required=ENGINE_DIR,
    )
    add_prompt_flags(parser)
    parser.add_argument(
        "--context",
        type=path_argument,
        metavar="FILE",
        help="what stands before the prompt: a file of chunkkv compress",
    )
    add_engine_flags(parser, paged_kv_cache=True)
    add_budget_flags(parser)
    add_scorer(parser, "window")
    add_sampling_flags(parser)
    output = parser.add_argument_group("output")
    add_json(output, "text, token ids, timings and kept tokens")
    output.add_argument(
        "--logprobs", action="store_true", help="with --json: add the log probability of every token of the answer"
    )
    add_log_level(output)


def run(args: argparse.Namespace) -> None:
    """Answer the prompt; raises KeyboardInterrupt after what a first Ctrl-C left of the answer was printed."""
    if args.logprobs and not args.as_json:
        raise UsageError("--logprobs has no effect without --json: give both")
    if args.context is not None and args.chat:
        raise UsageError("--chat has no effect with --context: behind messages, the prompt is a message of the user")
    sampling = sampling_params(args, args.logprobs)
    text = read_prompt(args)
    from chunkkv.contexts import Context

    session = open_session(args, args.max_tokens_in_paged_kv_cache)
    prompt = in_chat_template(args, session, text)  # before the handler, so that the first Ctrl-C ends a template
    context = None if args.context is None else Context.load(args.context, session)
    with interrupt_as_cancel() as cancel, prefill_progress(args.log_level == "error") as on_prefill:
        events = session.generate(
            prompt,
            sampling,
            keep_ratio=args.keep_ratio,
            budget_tokens=args.budget_tokens,
            context=context,
            scorer=args.scorer,
            stream=True,
            cancel=cancel,
            on_prefill=on_prefill,
        )
        result = _print_json(events) if args.as_json else _print_text(events, has_text=session.tokenizer is not None)
    if not args.as_json and args.log_level != "error" and sys.stderr.isatty():
        print(_summary(result), file=sys.stderr)
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _print_text(events: Iterator[StreamEvent], has_text: bool) -> GenerationResult:
    """Print the answer as it comes, as token ids where there is no tokenizer."""
    for event in events:
        sys.stdout.write(event.text if has_text else "".join(f"{token} " for token in event.token_ids))
        sys.stdout.flush()
        if event.finished is not None:
            sys.stdout.write("\n")
            return event.finished
    raise EngineError(_NO_ANSWER)


def _print_json(events: Iterator[StreamEvent]) -> GenerationResult:
    for event in events:
        if event.finished is not None:
            print(json.dumps(event.finished.to_dict(), allow_nan=False))
            return event.finished
    raise EngineError(_NO_ANSWER)


def _summary(result: GenerationResult) -> str:
    statistics = result.statistics
    rate = "" if statistics.tpot_s is None else f", {statistics.tpot_s * 1e3:.1f} ms per token"
    held = f", {statistics.context_tokens} of the context" if statistics.context_tokens else ""
    return (
        f"[prompt {statistics.prompt_tokens} tokens{held}, {statistics.kept_tokens} kept; {statistics.new_tokens} new; "
        f"first after {statistics.ttft_s:.2f} s{rate}]"
    )
