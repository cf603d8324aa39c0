"""chunkkv doctor: says what a machine can do, and what would break when an engine runs there or in Triton."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from chunkkv.cli.options import add_json, add_log_level, path_argument
from chunkkv.command_line import FAILED, CommandParser, UsageError
from chunkkv.findings import ABSENT, BREAKS, WARNING, Finding


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "doctor",
        "Say which backends can build and run on this machine. With --engine_dir, say what would break when that "
        "engine runs here, or in a Triton repository; exit with 1 if something would.",
        run,
        usage="chunkkv doctor [--engine_dir DIR] [flags]",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine_dir",
        type=path_argument,
        metavar="DIR",
        help="an engine directory; default: look at the machine alone",
    )
    engine.add_argument(
        "--triton_repo", type=path_argument, metavar="DIR", help="Triton model repository that is to serve the engine"
    )
    output = parser.add_argument_group("output")
    add_json(output, "the findings, and how many would break, are warnings or are about something absent")
    add_log_level(output)


def run(args: argparse.Namespace) -> None:
    """Print the findings; raises SystemExit with 1 where something would break."""
    findings = diagnose(args.engine_dir, args.triton_repo) if args.engine_dir is not None else _machine(args)
    print(as_json(findings) if args.as_json else as_text(findings))
    if would_break(findings):
        raise SystemExit(FAILED)


def diagnose(
    engine_dir: Path, triton_repo: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    """Check an engine on this machine, and a Triton repository.

    Parameters
    ----------
    engine_dir : Path
        The engine directory.
    triton_repo : Path, optional
        The model repository that is to serve it.
    environment : Mapping[str, str], optional
        The environment variables of the server; default: those of this process.
    """
    from chunkkv.engine.directory import EngineFiles
    from chunkkv.errors import EngineError
    from chunkkv.executors.machine_check import check_engine
    from chunkkv.text.text_check import check_text
    from chunkkv.triton.repository.check import check_repository

    try:
        files = EngineFiles.load(engine_dir)
    except EngineError as error:
        return [Finding.breaks("engine directory", str(error), "build it again, or give another --engine_dir")]
    findings = check_engine(files)
    findings += check_text(files.path, files.model["eos_token_ids"], files.model["vocab_size"])
    if triton_repo is not None:
        findings += check_repository(triton_repo, files, os.environ if environment is None else environment)
    return findings


def _machine(args: argparse.Namespace) -> list[Finding]:
    from chunkkv.executors.machine_report import describe_machine

    if args.triton_repo is not None:
        raise UsageError("--triton_repo is checked for one engine: give its --engine_dir, too")
    return describe_machine()


def would_break(findings: Sequence[Finding]) -> bool:
    """Return whether anything would break."""
    return any(finding.state == BREAKS for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one JSON object."""
    counts = Counter(finding.state for finding in findings)
    values = [dataclasses.asdict(finding) for finding in findings]
    totals = {"would_break": counts[BREAKS], "warnings": counts[WARNING], "absent": counts[ABSENT]}
    return json.dumps({"findings": values, **totals}, indent=1, allow_nan=False)


def as_text(findings: Sequence[Finding]) -> str:
    """Return the findings as a table with a summary."""
    counts = Counter(finding.state for finding in findings)
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<11}  {finding.check:<{width}}  {finding.found}")
        if finding.change:
            lines.append(f"{'':<11}  {'':<{width}}  -> {finding.change}")
    absent = f", {counts[ABSENT]} absent" if counts[ABSENT] else ""
    lines.append(f"{len(findings)} checks: {counts[BREAKS]} would break, {counts[WARNING]} to note{absent}")
    return "\n".join(lines)
