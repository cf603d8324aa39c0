"""chunkkv profile: measure a generation; chunkkv profile report: read what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chunkkv.cli.options import (
    BudgetTokens,
    Chat,
    KeepRatio,
    LogLevel,
    PromptFile,
    Threads,
    TokenIds,
    int_option,
    one_line_errors,
    read_prompt,
)
from chunkkv.errors import RequestError

if TYPE_CHECKING:
    from chunkkv.profile.trace import Trace

TOOLS = ("auto", "nsys", "recorder", "nvtx")

app = typer.Typer()


def _tool(text: str) -> str:
    if text not in TOOLS:
        raise typer.BadParameter(f"{text!r} is not offered; allowed is {' or '.join(TOOLS)}")
    return text


EngineDir = Annotated[
    Path | None, typer.Option("--engine_dir", metavar="DIR", help="what chunkkv-build wrote; required")
]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="the prompt; - reads standard input")]
NewTokens = Annotated[int, int_option("max_new_tokens", "tokens of each answer; an end token does not end it", True)]
Repeats = Annotated[int, int_option("repeats", "answers that are measured, after one to warm up", True)]
Tool = Annotated[
    str,
    typer.Option(
        "--tool",
        parser=_tool,
        metavar="TOOL",
        help="nsys, recorder, auto (nsys if installed, else recorder), or nvtx (a profiler around this process)",
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="FILE.json", help="the trace")]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.svg", help="draw the last request and the time per stage")
]


@app.callback(invoke_without_command=True)
def profile(
    context: typer.Context,
    engine_dir: EngineDir = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    chat: Chat = False,
    max_new_tokens: NewTokens = 32,
    repeats: Repeats = 3,
    keep_ratio: KeepRatio = None,
    budget_tokens: BudgetTokens = None,
    threads: Threads = None,
    tool: Tool = "auto",
    output: Output = Path("chunkkv-profile.json"),
    picture: Picture = None,
    log_level: LogLevel = "info",
) -> None:
    """Answer a prompt several times and show where the time went; report shows a trace that was made before."""
    if context.invoked_subcommand is not None:
        return
    with one_line_errors(log_level):
        from chunkkv.profile.measure import Job, measure

        if engine_dir is None:
            raise RequestError("--engine_dir is missing; give the directory that chunkkv-build wrote")
        given = read_prompt(prompt, prompt_file, token_ids)
        for path, kind in ((output, ".json"), (picture, ".svg")):
            _check_output(path, kind)
        job = Job(str(engine_dir), given, chat, max_new_tokens, repeats, keep_ratio, budget_tokens, threads)
        trace = measure(job, tool, output)
        if trace is None:
            print("Done; the trace is the profiler's.")
            return
        trace.write(output)
        _show(trace, picture)
        print(f"Trace: {output}")


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what profile wrote, or nsys export --type sqlite")],
    picture: Picture = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, times in nanoseconds")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Show the time per stage, compression's share of the first token's time, and the time per token."""
    with one_line_errors(log_level):
        from chunkkv.profile.nsys_export import read_export
        from chunkkv.profile.report import make_report
        from chunkkv.profile.trace import Trace

        _check_output(picture, ".svg")
        trace = Trace.read(file) if file.suffix == ".json" else read_export(file)
        if as_json:
            print(json.dumps(make_report(trace).to_dict()))
        _show(trace, picture, table=not as_json)


def _show(trace: Trace, picture: Path | None, table: bool = True) -> None:
    from rich.console import Console

    from chunkkv.profile.picture import write_picture
    from chunkkv.profile.report import as_tables, make_report

    found = make_report(trace)
    if table:
        Console().print(as_tables(found))
    if picture is not None:
        write_picture(trace, found, picture)


def _check_output(path: Path | None, suffix: str) -> None:
    """Raise RequestError before the work for a file that could not be written after it."""
    if path is None:
        return
    if path.suffix != suffix:
        raise RequestError(f"{path} does not end in {suffix}; that is the format that is written")
    if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
        raise RequestError(f"output {path} cannot be written: give a file name in a directory that exists")
