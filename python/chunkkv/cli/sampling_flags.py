"""Flags that say how tokens are chosen, shared by the commands that answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chunkkv.command_line import CommandParser, TextListAction, number, whole_number

if TYPE_CHECKING:
    from chunkkv.sampling import SamplingParams


def add_sampling_flags(parser: CommandParser, max_new_tokens: int = 128) -> None:
    """Add the flags that sampling_params reads; `max_new_tokens` is the default of that flag."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max_new_tokens",
        type=whole_number,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer in tokens; default: {max_new_tokens}",
    )
    group.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        metavar="X",
        help="divides the logits before sampling; 0 always takes the likeliest token; default: 0",
    )
    group.add_argument(
        "--top_k",
        type=whole_number,
        default=0,
        metavar="N",
        help="sample from the N likeliest tokens only; 0 turns this off; default: 0",
    )
    group.add_argument(
        "--top_p",
        type=number,
        default=1.0,
        metavar="X",
        help="sample from the fewest tokens whose probabilities add up to X; 1 turns this off; default: 1",
    )
    group.add_argument(
        "--repetition_penalty",
        type=number,
        default=1.0,
        metavar="X",
        help="above 1, tokens of prompt and answer become less likely; 1 turns this off; default: 1",
    )
    group.add_argument(
        "--seed", type=whole_number, metavar="N", help="seed of the random numbers; default: a new one for every run"
    )
    group.add_argument(
        "--stop",
        action=TextListAction,
        default=(),
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    group.add_argument("--ignore_eos", action="store_true", help="go on after the end-of-sequence token")


def sampling_params(args: argparse.Namespace, logprobs: bool = False) -> SamplingParams:
    """Return what the flags of add_sampling_flags say."""
    from chunkkv.sampling import SamplingParams

    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        logprobs=logprobs,
    )
