"""What the commands share: flags, where a prompt comes from, and errors in one line with an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from chunkkv.errors import ChunkKVError, ConfigError, RequestError

if TYPE_CHECKING:
    from chunkkv.session import ChunkKVSession

FAILED, BAD_USAGE, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
_LOG_LEVELS = ("error", "warning", "info", "verbose", "debug")


def _whole(text: str | int) -> int:
    if isinstance(text, int):  # a default, which passes through here too
        return text
    if not re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text):
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return int(text)


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def _log_level(text: str) -> str:
    if text not in _LOG_LEVELS:
        raise typer.BadParameter(f"{text!r} is not offered; allowed is {' or '.join(_LOG_LEVELS)}")
    return text


def int_option(name: str, text: str, default: str | bool = False):
    """Return an option that takes a whole number; `default` says whether, or how, help shows the default."""
    return typer.Option(f"--{name}", parser=_whole, metavar="N", help=text, show_default=default)


def float_option(name: str, text: str, default: str | bool = False):
    """Return an option that takes a number; see int_option."""
    return typer.Option(f"--{name}", parser=_number, metavar="X", help=text, show_default=default)


EngineDir = Annotated[Path, typer.Option("--engine_dir", metavar="DIR", help="what chunkkv-build wrote")]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="the prompt; - reads standard input")]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompt_file", metavar="FILE", help="UTF-8 text; one line end at its end is left out"),
]
TokenIds = Annotated[
    str | None, typer.Option("--token_ids", metavar="LIST", help="the prompt as token ids, such as 1,15,7")
]
Chat = Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")]
KeepRatio = Annotated[float | None, float_option("keep_ratio", "share of the prompt kept; default: the engine's")]
BudgetTokens = Annotated[int | None, int_option("budget_tokens", "tokens kept, instead of a share")]
Threads = Annotated[int | None, int_option("threads", "default: one per core")]
PoolTokens = Annotated[
    int | None,
    int_option("max_tokens_in_paged_kv_cache", "KV cache of a TensorRT-LLM engine; default: the free GPU memory"),
]
LogLevel = Annotated[
    str,
    typer.Option(
        "--log_level",
        parser=_log_level,
        metavar="LEVEL",
        help=f"{', '.join(_LOG_LEVELS)}: the last two show tracebacks",
    ),
]


def read_prompt(prompt: str | None, file: Path | None, token_ids: str | None) -> str | list[int]:
    """Return the prompt from the one place it was given; raises RequestError for none, several, empty or not UTF-8."""
    if sum(source is not None for source in (prompt, file, token_ids)) > 1:
        raise RequestError("the prompt was given more than once; give an argument, --prompt_file or --token_ids")
    if token_ids is not None:
        return _parsed_ids(token_ids)
    if file is not None:
        try:
            text = _decoded(file.read_bytes(), str(file))
        except OSError as error:
            raise RequestError(f"--prompt_file {file} cannot be read: {error.strerror}") from None
    elif prompt not in (None, "-"):
        text = _decoded(prompt.encode("utf-8", "surrogateescape"), "the prompt")
    elif sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise RequestError("no prompt was given; give it as an argument, with --prompt_file, or pipe it in")
    else:
        text = _decoded(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise RequestError("the prompt is empty; give at least one word")
    return text


def _decoded(data: bytes, source: str) -> str:
    try:
        return re.sub(r"\r?\n\Z", "", data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}; convert it to UTF-8"
        ) from None


def _parsed_ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts:
        raise RequestError("--token_ids is empty; give at least one token id")
    for part in parts:
        if not re.fullmatch(r"[+-]?\d{1,18}", part):
            raise RequestError(f"--token_ids contains {part!r}; give whole numbers such as 1,15,7")
    return [int(part) for part in parts]


def load(engine_dir: Path, threads: int | None, pool_tokens: int | None = None) -> ChunkKVSession:
    """Return a session; engine libraries are not imported before."""
    from chunkkv.session import ChunkKVSession

    return ChunkKVSession.from_dir(engine_dir, threads, pool_tokens)


@contextmanager
def interrupt_as_cancel() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second one interrupts as usual."""
    cancel = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return

    def request(number: int, frame: object) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_line_errors(log_level: str) -> Iterator[None]:
    """End the program with one line and an exit code where an error gets here; verbose and debug show tracebacks."""
    try:
        yield
    except BrokenPipeError:
        leave_closed_pipe()
    except Exception as error:
        if log_level in ("verbose", "debug"):
            traceback.print_exc()
        if isinstance(error, ChunkKVError):
            usage = isinstance(error, (ConfigError, RequestError))
            stop_with(_with_flag_name(str(error)), BAD_USAGE if usage else FAILED)
        if isinstance(error, ModuleNotFoundError):
            stop_with(f"the Python package {error.name!r} is missing; install this project with pip install .", FAILED)
        if isinstance(error, OSError) and error.strerror:
            if error.filename is None:
                drop_output()
            stop_with(f"{error.filename or 'input or output'}: {error.strerror}", FAILED)
        stop_with(f"unexpected {type(error).__name__}: {error}; --log_level debug shows where", FAILED)


def _with_flag_name(message: str) -> str:
    """Return an error that begins with the name of a setting as one that begins with the flag."""
    return (
        f"--{message}" if re.match(r"[a-z]+(_[a-z]+)+ |(temperature|seed|stop|threads|output) ", message) else message
    )


def leave_closed_pipe() -> NoReturn:
    """End the program quietly: whoever read the output has gone."""
    drop_output()
    raise SystemExit(CLOSED_PIPE)


def drop_output() -> None:
    """Forget what cannot be written, or Python fails with it once more while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop_with(message: str, code: int) -> NoReturn:
    """End the program with one line on standard error."""
    print(f"chunkkv: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)
