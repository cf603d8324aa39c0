"""chunkkv: generate from an engine, see what ChunkKV keeps, evaluate, check, profile, serve, print versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import chunkkv
from chunkkv.cli import profile as profile_command
from chunkkv.cli import triton as triton_commands
from chunkkv.cli.calibrate import calibrate
from chunkkv.cli.evaluate import evaluate
from chunkkv.cli.lm_eval import PASS_ON, lm_eval_command
from chunkkv.cli.options import (
    BAD_USAGE,
    FAILED,
    INTERRUPTED,
    BudgetTokens,
    Chat,
    EngineDir,
    KeepRatio,
    LogLevel,
    PoolTokens,
    Prompt,
    PromptFile,
    Threads,
    TokenIds,
    drop_output,
    float_option,
    int_option,
    interrupt_as_cancel,
    leave_closed_pipe,
    load,
    one_line_errors,
    read_prompt,
    stop_with,
)
from chunkkv.errors import EngineError, RequestError

if TYPE_CHECKING:
    from chunkkv.results import GenerationResult, StreamEvent

_NO_ANSWER = "the engine ended without an answer"

app = typer.Typer(
    help="Generate text with an engine built by chunkkv-build.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},  # --engine-dir is --engine_dir
)
app.add_typer(profile_command.app, name="profile")
app.add_typer(triton_commands.app, name="triton")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 1 for failures, 2 for bad usage, 130 for Ctrl-C, 141 for a closed pipe."""
    if sys.stdout is None:
        stop_with("standard output is closed; give it a file or a pipe", FAILED)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding must not end an answer
    try:
        code = app(None if arguments is None else list(arguments), prog_name="chunkkv", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # newer typer versions return a code where older ones raise
            stop_with("interrupted", INTERRUPTED)
    except BrokenPipeError:
        leave_closed_pipe()
    except OSError as error:
        drop_output()
        stop_with(f"output: {error.strerror}", FAILED)
    except (KeyboardInterrupt, typer.Abort):
        stop_with("interrupted", INTERRUPTED)
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors, wherever their classes live
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            raise SystemExit(BAD_USAGE) from None
        stop_with(f"{error.format_message().rstrip('.')}; --help lists what there is", BAD_USAGE)


@app.command()
def generate(
    engine_dir: EngineDir,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    max_new_tokens: Annotated[int, int_option("max_new_tokens", "longest answer", True)] = 128,
    temperature: Annotated[float, float_option("temperature", "0 = greedy", True)] = 0.0,
    top_k: Annotated[int, int_option("top_k", "0 = off", True)] = 0,
    top_p: Annotated[float, float_option("top_p", "1 = off", True)] = 1.0,
    repetition_penalty: Annotated[float, float_option("repetition_penalty", "1 = off", True)] = 1.0,
    seed: Annotated[int | None, int_option("seed", "for sampling; default: a fresh one")] = None,
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
    with one_line_errors(log_level):
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
        from chunkkv.text.tokenizer import encode_chat_prompt

        session = load(engine_dir, threads, max_tokens_in_paged_kv_cache)
        with interrupt_as_cancel() as cancel:
            events = session.generate(
                encode_chat_prompt(session.tokenizer, given) if chat else given,
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
            stop_with("interrupted", INTERRUPTED)


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
    with one_line_errors(log_level):
        from chunkkv.evaluation.report.inspect_page import write_page
        from chunkkv.text.tokenizer import encode_chat_prompt

        given = read_prompt(prompt, prompt_file, token_ids)
        if (output.exists() and not output.is_file()) or not output.absolute().parent.is_dir():
            raise RequestError(f"output {output} cannot be written: give a file name in a directory that exists")
        session = load(engine_dir, threads)
        ids_or_text = encode_chat_prompt(session.tokenizer, given) if chat else given
        found = session.inspect(ids_or_text, keep_ratio, budget_tokens)
        write_page(found, output)
        print(f"{output}: {found.kept_tokens} of {len(found.token_ids)} tokens kept")


app.command("eval")(evaluate)
app.command()(calibrate)
app.command("lm_eval", context_settings=PASS_ON)(lm_eval_command)  # lm-eval is found, too


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
    with one_line_errors(log_level):
        from chunkkv.cli import doctor as checks

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


if __name__ == "__main__":
    main()
