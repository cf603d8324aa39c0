"""Flags that several commands share, and what they stand for: an engine, a prompt, files to write, lists of numbers."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chunkkv.command_line import LOG_LEVELS, CommandParser, TextAction, path_text, ratio, whole_number
from chunkkv.errors import ConfigError, RequestError
from chunkkv.settings import keep_ratio_to_per_10k

if TYPE_CHECKING:
    from chunkkv.requests import Prompt
    from chunkkv.session import ChunkKVSession

ENGINE_DIR = {"engine_dir": "the directory that chunkkv-build wrote"}  # for CommandParser's `required`
_LONGEST_NUMBER = 9  # digits in a list of whole numbers


def path_argument(text: str) -> Path:
    """Return the path that a flag's text names, which must not be empty; for `type=` of argparse."""
    return Path(path_text(text))


def add_engine_flags(parser: CommandParser, paged_kv_cache: bool = False) -> None:
    """Add --engine_dir, --threads and, where `paged_kv_cache`, --max_tokens_in_paged_kv_cache; see open_session."""
    group = parser.add_argument_group("engine")
    add_engine_dir(group)
    group.add_argument(
        "--threads",
        type=whole_number,
        metavar="N",
        help="threads of an engine on the CPU, at most one per CPU; default: one per core",
    )
    if paged_kv_cache:
        group.add_argument(
            "--max_tokens_in_paged_kv_cache",
            type=whole_number,
            metavar="N",
            help="size in tokens of a TensorRT-LLM engine's KV cache; default: what fits into the free GPU memory",
        )


def add_engine_dir(group: argparse._ActionsContainer) -> None:
    """Add --engine_dir to a parser or to one of its groups."""
    group.add_argument(
        "--engine_dir",
        type=path_argument,
        metavar="DIR",
        help="required: the engine directory that chunkkv-build wrote",
    )


def add_prompt_flags(parser: CommandParser, as_flag: bool = False) -> None:
    """Add the flags that read_prompt reads; the prompt itself is an argument, or --prompt where `as_flag`."""
    group = parser.add_argument_group("prompt (one of the first three)")
    help_text = "the prompt's text; - reads it from standard input, as leaving it out does in a pipe"
    if as_flag:
        group.add_argument("--prompt", action=TextAction, metavar="TEXT", help=help_text)
    else:
        group.add_argument("prompt", nargs="?", metavar="PROMPT", help=help_text)
    group.add_argument(
        "--prompt_file",
        type=path_argument,
        metavar="FILE",
        help="file with the prompt as UTF-8 text; a line end at the end of the file is left out",
    )
    group.add_argument("--token_ids", action=TextAction, metavar="LIST", help="the prompt as token ids, such as 1,15,7")
    group.add_argument("--chat", action="store_true", help="put the text into the model's chat template")


def add_budget_flags(parser: CommandParser) -> None:
    """Add --keep_ratio and --budget_tokens."""
    group = parser.add_argument_group("budget (at most one)")
    group.add_argument(
        "--keep_ratio",
        type=ratio,
        metavar="R",
        help="share of the prompt's tokens that is kept, in (0, 1]; default: the engine's",
    )
    group.add_argument("--budget_tokens", type=whole_number, metavar="N", help="number of tokens kept, not a share")


def add_scorer(parser: CommandParser, default: str) -> None:
    """Add --scorer; `default` says what leaving it out means."""
    parser.add_argument(
        "--scorer",
        choices=("window", "reread"),
        help="what chooses the tokens that stay: attention of the prompt's last tokens, or of a second reading of it, "
        f"which takes up to twice as long as the first; default: {default}",
    )


def add_log_level(group: argparse._ActionsContainer) -> None:
    """Add --log_level to a parser or to one of its groups."""
    group.add_argument(
        "--log_level",
        choices=LOG_LEVELS,
        default="info",
        help="error prints no tables and summaries, verbose and debug print a traceback of errors; default: info",
    )


def add_json(group: argparse._ActionsContainer, content: str) -> None:
    """Add --json, which the namespace holds as `as_json`; `content` says what the object holds."""
    group.add_argument("--json", dest="as_json", action="store_true", help=f"print one JSON object: {content}")


def open_session(args: argparse.Namespace, paged_kv_cache_tokens: int | None = None) -> ChunkKVSession:
    """Return a session on the engine that the flags of add_engine_flags name; its libraries are imported here."""
    from chunkkv.executors.cpus import usable_cpus
    from chunkkv.session import MAX_THREADS, ChunkKVSession

    if args.threads is not None and usable_cpus() < args.threads <= MAX_THREADS and args.log_level != "error":
        print(f"--threads {args.threads}: this process has {usable_cpus()} CPUs, so it is as many", file=sys.stderr)
    return ChunkKVSession.from_dir(args.engine_dir, args.threads, paged_kv_cache_tokens)


def in_chat_template(args: argparse.Namespace, session: ChunkKVSession, prompt: str | list[int]) -> Prompt:
    """Return the prompt as a message of the user where --chat was given, else as it is; the template is tried."""
    from chunkkv.text.tokenizer import chat_prompt

    return chat_prompt(session.tokenizer, prompt) if args.chat else prompt


def read_prompt(args: argparse.Namespace) -> str | list[int]:
    """Return the prompt, as text or token ids, from the one flag of add_prompt_flags that it was given with.

    Raises RequestError where there is none or more than one, and for an empty prompt and one that is not UTF-8.
    """
    text: str | None = args.prompt
    file: Path | None = args.prompt_file
    token_ids: str | None = args.token_ids
    if sum(source is not None for source in (text, file, token_ids)) > 1:
        raise RequestError("the prompt was given more than once; give its text, --prompt_file or --token_ids")
    if token_ids is not None:
        return _parsed_ids(token_ids)
    if file is not None:
        text = read_text_file(file)
    elif text is not None and text != "-":
        text = decode_text(text.encode("utf-8", "surrogateescape"), "the prompt")  # as the shell gave its bytes
    elif sys.stdin is None or (text is None and sys.stdin.isatty()):
        raise RequestError("no prompt was given; give its text, --prompt_file or --token_ids, or pipe it in")
    else:
        text = decode_text(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise RequestError("the prompt is empty; give at least one word")
    return text


def read_text_file(path: Path) -> str:
    """Return the text of --prompt_file; raises RequestError where it cannot be read or is empty or not UTF-8."""
    try:
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"--prompt_file {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise RequestError(f"--prompt_file {path} is empty; give at least one word")
    return text


def decode_text(data: bytes, source: str) -> str:
    """Return UTF-8 text without the line end at its end; raises RequestError, which names the source, for others."""
    try:
        return re.sub(r"\r?\n\Z", "", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}; convert it to UTF-8"
        ) from None


def _parsed_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words:
        raise RequestError("--token_ids is empty; give at least one token id")
    for word in words:
        if not re.fullmatch(r"[+-]?\d{1,18}", word):
            raise RequestError(f"--token_ids contains {word!r}; give whole numbers such as 1,15,7")
    return [int(word) for word in words]


def check_output_file(flag: str, path: Path, suffix: str = "") -> None:
    """Check before the work that a file can be written after it.

    Parameters
    ----------
    flag : str
        The flag's name without hyphens.
    path : Path
        The file.
    suffix : str, default ""
        How the name must end.

    Raises
    ------
    RequestError
        For another suffix, a folder that does not exist, and a path that is there and no file.
    """
    if not path.name.endswith(suffix):
        raise RequestError(f"{flag} {path} does not end in {suffix}; that is the format that is written")
    if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
        raise RequestError(f"{flag} {path} cannot be written: give a file name in a directory that exists")


def split_list(flag: str, text: str) -> list[str]:
    """Return the values of a list with commas; raises ConfigError for an empty or repeated one."""
    values = [value.strip() for value in text.split(",")]
    if not all(values) or len(set(values)) < len(values):
        raise ConfigError(f"{flag} is {text!r}; give different values separated by commas")
    return values


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Return a list of whole numbers of at least 1; raises ConfigError that names the flag."""
    values = split_list(flag, text)
    for value in values:
        if not value.isdecimal() or len(value) > _LONGEST_NUMBER or int(value) < 1:
            raise ConfigError(f"{flag} has {value!r}; give whole numbers of at least 1")
    return tuple(int(value) for value in values)


def keep_ratios(text: str) -> tuple[int, ...]:
    """Return the list of --keep in shares of 10,000, without repeats, the largest first; raises ConfigError."""
    shares = set()
    for value in split_list("keep", text):
        try:
            share = float(value)
        except ValueError:
            raise ConfigError(f"keep has {value!r}; give shares in (0, 1] such as 0.2") from None
        shares.add(keep_ratio_to_per_10k(share, "keep"))
    return tuple(sorted(shares, reverse=True))
