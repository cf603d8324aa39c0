"""chunkkv: generate from an engine directory, look at what ChunkKV keeps, check an engine, print versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import chunkkv
from chunkkv.errors import ChunkKVError, ConfigError, EngineError, RequestError

if TYPE_CHECKING:
    from chunkkv.results import GenerationResult, StreamEvent
    from chunkkv.session import ChunkKVSession

FAILED, BAD_USAGE, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
_NO_ANSWER = "the engine ended without an answer"
_LOG_LEVELS = ("error", "warning", "info", "verbose", "debug")

app = typer.Typer(
    help="Generate text with an engine built by chunkkv-build.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},  # --engine-dir is --engine_dir
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 1 for failures, 2 for bad usage, 130 for Ctrl-C, 141 for a closed pipe."""
    if sys.stdout is None:
        _stop("standard output is closed; give it a file or a pipe", FAILED)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding must not end an answer
    try:
        code = app(None if arguments is None else list(arguments), prog_name="chunkkv", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # newer typer versions return a code where older ones raise
            _stop("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _leave_closed_pipe()
    except OSError as error:
        _drop_output()
        _stop(f"output: {error.strerror}", FAILED)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", INTERRUPTED)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors, wherever their classes live
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            raise SystemExit(BAD_USAGE) from None
        _stop(f"{error.format_message().rstrip('.')}; --help lists what there is", BAD_USAGE)


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


def _int_option(name: str, text: str, default: str | bool = False):
    return typer.Option(f"--{name}", parser=_whole, metavar="N", help=text, show_default=default)


def _float_option(name: str, text: str, default: str | bool = False):
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
KeepRatio = Annotated[float | None, _float_option("keep_ratio", "share of the prompt kept; default: the engine's")]
BudgetTokens = Annotated[int | None, _int_option("budget_tokens", "tokens kept, instead of a share")]
Threads = Annotated[int | None, _int_option("threads", "default: one per core")]
PoolTokens = Annotated[
    int | None,
    _int_option("max_tokens_in_paged_kv_cache", "KV cache of a TensorRT-LLM engine; default: the free GPU memory"),
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


@app.command()
def generate(
    engine_dir: EngineDir,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    max_new_tokens: Annotated[int, _int_option("max_new_tokens", "longest answer", True)] = 128,
    temperature: Annotated[float, _float_option("temperature", "0 = greedy", True)] = 0.0,
    top_k: Annotated[int, _int_option("top_k", "0 = off", True)] = 0,
    top_p: Annotated[float, _float_option("top_p", "1 = off", True)] = 1.0,
    repetition_penalty: Annotated[float, _float_option("repetition_penalty", "1 = off", True)] = 1.0,
    seed: Annotated[int | None, _int_option("seed", "for sampling; default: a fresh one")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="end before this text; may be repeated")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore_eos", help="go on after the end token")] = False,
    keep_ratio: KeepRatio = None,
    budget_tokens: BudgetTokens = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="with --json: a log probability per token")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object with text, timings and kept tokens")] = False,
    threads: Threads = None,
    max_tokens_in_paged_kv_cache: PoolTokens = None,
    log_level: LogLevel = "info",
) -> None:
    """Answer a prompt, word by word as the text comes."""
    with _one_line_errors(log_level):
        from chunkkv.sampling import SamplingParams

        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        given = read_prompt(prompt, prompt_file, token_ids)
        session = _load(engine_dir, threads, max_tokens_in_paged_kv_cache)
        with _interrupt_as_cancel() as cancel:
            events = session.generate(
                _chat_ids(session, given) if chat else given,
                sampling,
                keep_ratio=keep_ratio,
                budget_tokens=budget_tokens,
                stream=True,
                cancel=cancel,
            )
            result = _print_json(events) if as_json else _print_text(events, text=session.tokenizer is not None)
        if not as_json and log_level != "error" and sys.stderr.isatty():
            print(_summary(result), file=sys.stderr)
        if result.finish_reason == "cancelled":
            _stop("interrupted", INTERRUPTED)


@app.command()
def inspect(
    engine_dir: EngineDir,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="the page")] = Path("chunkkv.html"),
    keep_ratio: KeepRatio = None,
    budget_tokens: BudgetTokens = None,
    threads: Threads = None,
    log_level: LogLevel = "info",
) -> None:
    """Write one HTML page that shows which tokens of a prompt each layer group keeps."""
    with _one_line_errors(log_level):
        from chunkkv.inspect import write_page

        given = read_prompt(prompt, prompt_file, token_ids)
        if (output.exists() and not output.is_file()) or not output.absolute().parent.is_dir():
            raise RequestError(f"output {output} cannot be written: give a file name in a directory that exists")
        session = _load(engine_dir, threads)
        found = session.inspect(_chat_ids(session, given) if chat else given, keep_ratio, budget_tokens)
        write_page(found, output)
        print(f"{output}: {found.kept_tokens} of {len(found.token_ids)} tokens kept")


@app.command()
def doctor(
    engine_dir: EngineDir,
    triton_repo: Annotated[
        Path | None, typer.Option("--triton_repo", metavar="DIR", help="the model repository that is to serve it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Say what would break when this engine runs here, or in a Triton repository; exits with 1 if something would."""
    with _one_line_errors(log_level):
        from chunkkv import doctor as checks

        found = checks.diagnose(engine_dir, triton_repo)
        print(checks.report(found, as_json))
        sys.stdout.flush()
    if checks.would_break(found):
        raise SystemExit(FAILED)


@app.command()
def version() -> None:
    """Print the versions of this program and of what it runs on."""
    print(f"chunkkv {chunkkv.__version__}")
    for name in ("onnxruntime", "onnx", "numpy", "tokenizers"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    print(f"python {platform.python_version()}")


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


def _load(engine_dir: Path, threads: int | None, pool_tokens: int | None = None) -> ChunkKVSession:
    from chunkkv.session import ChunkKVSession

    return ChunkKVSession.from_dir(engine_dir, threads, pool_tokens)


def _chat_ids(session: ChunkKVSession, given: str | list[int]) -> list[int]:
    if not isinstance(given, str) or session.tokenizer is None:
        raise RequestError("--chat needs a prompt of text and an engine with a tokenizer")
    return session.tokenizer.encode_chat([{"role": "user", "content": given}])


def _print_text(events: Iterator[StreamEvent], text: bool) -> GenerationResult:
    """Print the answer as it comes, as token ids where there is no tokenizer."""
    for event in events:
        sys.stdout.write(event.text if text else "".join(f"{token} " for token in event.token_ids))
        sys.stdout.flush()
        if event.finished is not None:
            sys.stdout.write("\n")
            return event.finished
    raise EngineError(_NO_ANSWER)


def _print_json(events: Iterator[StreamEvent]) -> GenerationResult:
    for event in events:
        if event.finished is not None:
            print(json.dumps(event.finished.to_dict()))
            return event.finished
    raise EngineError(_NO_ANSWER)


def _summary(result: GenerationResult) -> str:
    costs = result.statistics
    rate = "" if costs.tpot_s is None else f", {costs.tpot_s * 1e3:.1f} ms per token"
    return (
        f"[prompt {costs.prompt_tokens} tokens, {costs.kept_tokens} kept; {costs.new_tokens} new; "
        f"first after {costs.ttft_s:.2f} s{rate}]"
    )


@contextmanager
def _interrupt_as_cancel() -> Iterator[threading.Event]:
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
def _one_line_errors(log_level: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _leave_closed_pipe()
    except Exception as error:
        if log_level in ("verbose", "debug"):
            traceback.print_exc()
        if isinstance(error, ChunkKVError):
            usage = isinstance(error, (ConfigError, RequestError))
            _stop(_with_flag_name(str(error)), BAD_USAGE if usage else FAILED)
        if isinstance(error, ModuleNotFoundError):
            _stop(f"the Python package {error.name!r} is missing; install this project with pip install .", FAILED)
        if isinstance(error, OSError) and error.strerror:
            if error.filename is None:
                _drop_output()
            _stop(f"{error.filename or 'input or output'}: {error.strerror}", FAILED)
        _stop(f"unexpected {type(error).__name__}: {error}; --log_level debug shows where", FAILED)


def _with_flag_name(message: str) -> str:
    """Return an error that begins with the name of a setting as one that begins with the flag."""
    return (
        f"--{message}" if re.match(r"[a-z]+(_[a-z]+)+ |(temperature|seed|stop|threads|output) ", message) else message
    )


def _leave_closed_pipe() -> NoReturn:
    _drop_output()
    raise SystemExit(CLOSED_PIPE)


def _drop_output() -> None:
    """Forget what cannot be written, or Python fails with it once more while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(message: str, code: int) -> NoReturn:
    print(f"chunkkv: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
