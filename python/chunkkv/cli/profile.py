"""chunkkv profile: measures where the time of a generation goes; chunkkv profile report: shows an earlier trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_budget_flags,
    add_engine_flags,
    add_json,
    add_log_level,
    add_prompt_flags,
    check_output_file,
    path_argument,
    read_prompt,
)
from chunkkv.command_line import CommandParser, UsageError, whole_number

if TYPE_CHECKING:
    from chunkkv.profile.trace import Trace

_TOOLS = ("auto", "nsys", "recorder", "nvtx")


def add_parser(program: CommandParser) -> None:
    """Add the command and its command report to the program."""
    parser = program.add_command(
        "profile",
        "Answer a prompt several times and show where the time went; report shows an earlier trace.",
        run,
        usage="chunkkv profile --engine_dir DIR [flags]\n       chunkkv profile report FILE [flags]",
    )
    add_prompt_flags(parser, as_flag=True)
    add_engine_flags(parser)
    add_budget_flags(parser)
    _add_measurement_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=path_argument,
        default=Path("chunkkv-profile.json"),
        metavar="FILE.json",
        help="the trace to write; default: chunkkv-profile.json",
    )
    _add_picture(output)
    add_log_level(output)
    report = parser.add_command(
        "report",
        "Show the time per stage, compression's share of the first token's time, and the time per token.",
        run_report,
        usage="chunkkv profile report FILE [flags]",
    )
    report.add_argument(
        "trace_file",
        type=path_argument,
        metavar="FILE",
        help="what chunkkv profile wrote, or an nsys export --type sqlite",
    )
    report_output = report.add_argument_group("output")
    add_json(report_output, "the times in nanoseconds")
    _add_picture(report_output)
    add_log_level(report_output)


def _add_measurement_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--max_new_tokens",
        type=whole_number,
        default=32,
        metavar="N",
        help="tokens of every answer; an end-of-sequence token does not end it; default: 32",
    )
    group.add_argument(
        "--repeats",
        type=whole_number,
        default=3,
        metavar="N",
        help="answers that are measured, after one to warm up; default: 3",
    )
    group.add_argument(
        "--tool",
        choices=_TOOLS,
        default="auto",
        help="who measures: nsys (Nsight Systems), recorder (this program, without GPU kernels), nvtx (a profiler that "
        "already runs around this program); default: auto = nsys where it is installed, else recorder",
    )


def _add_picture(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--picture",
        type=path_argument,
        metavar="FILE.svg",
        help="picture of the last request and the time per stage to write",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, write the trace and show it."""
    from chunkkv.profile.measure import Job, measure

    if args.engine_dir is None:  # not `required`, as report has no engine
        raise UsageError(f"--engine_dir is missing; give {ENGINE_DIR['engine_dir']}")
    prompt = read_prompt(args)
    check_output_file("output", args.output, ".json")
    _check_picture(args.picture)
    job = Job(
        engine_dir=str(args.engine_dir),
        prompt=prompt,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        keep_ratio=args.keep_ratio,
        budget_tokens=args.budget_tokens,
        threads=args.threads,
    )
    trace = measure(job, args.tool, args.output)
    if trace is None:
        print("Done; the trace is the profiler's.")
        return
    trace.write(args.output)
    _show(trace, args.picture)
    print(f"Trace: {args.output}")


def run_report(args: argparse.Namespace) -> None:
    """Show a trace that was written before."""
    from chunkkv.profile.nsys_export import read_export
    from chunkkv.profile.report import make_report
    from chunkkv.profile.trace import Trace

    _check_picture(args.picture)
    is_trace = args.trace_file.suffix == ".json"
    trace = Trace.read(args.trace_file) if is_trace else read_export(args.trace_file)
    if args.as_json:
        print(json.dumps(make_report(trace).to_dict(), allow_nan=False))
    _show(trace, args.picture, with_table=not args.as_json)


def _show(trace: Trace, picture: Path | None, with_table: bool = True) -> None:
    from rich.console import Console

    from chunkkv.profile.picture import write_picture
    from chunkkv.profile.report import as_tables, make_report

    report = make_report(trace)
    if with_table:
        Console().print(as_tables(report))
    if picture is not None:
        write_picture(trace, report, picture)


def _check_picture(path: Path | None) -> None:
    if path is not None:
        check_output_file("picture", path, ".svg")
