"""Measures generations: with the recorder, for a profiler that is attached, or in a process of its own under nsys.

As a program, `python -m chunkkv.profile.measure JOB.json`, it is that process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import chunkkv
from chunkkv import profiling
from chunkkv.engine.json_files import read_object
from chunkkv.errors import ChunkKVError, ProfileError, RequestError
from chunkkv.files import write_whole
from chunkkv.profile.nsys_export import read_export
from chunkkv.profile.trace import Trace, from_recorder
from chunkkv.requests import Prompt
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import chat_prompt

# Ranges inside a replayed CUDA graph exist only node by node; sampling the CPU would slow what is measured.
NSYS_FLAGS = (
    "--trace=cuda,nvtx,osrt",
    "--sample=none",
    "--cpuctxsw=none",
    "--cuda-graph-trace=node",
    "--trace-fork-before-exec=true",
    "--force-overwrite=true",
)
MAX_REPEATS = 1000
_LAST_LINES = 5


@dataclass(frozen=True)
class Job:
    """What is measured: one prompt, answered once to warm up and then `repeats` times.

    Parameters
    ----------
    engine_dir : str
        The engine directory.
    prompt : str or list[int]
        Text or token ids.
    chat : bool, default False
        Whether the text is put into the model's chat template.
    max_new_tokens : int, default 32
        Tokens of each answer; an end token does not end it.
    repeats : int, default 3
        Answers that are measured, 1 to MAX_REPEATS.
    keep_ratio : float, optional
        Share of the prompt kept, in (0, 1]; None for the engine's own.
    budget_tokens : int, optional
        Tokens kept, instead of a share.
    threads : int, optional
        Threads of the engine; None for one per core.
    """

    engine_dir: str
    prompt: str | list[int]
    chat: bool = False
    max_new_tokens: int = 32
    repeats: int = 3
    keep_ratio: float | None = None
    budget_tokens: int | None = None
    threads: int | None = None

    def run(self) -> None:
        """Answer the prompt; the warm-up is one range without stages inside.

        Raises RequestError for `repeats` out of range and for a prompt that the engine cannot serve.
        """
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise RequestError(f"repeats is {self.repeats}; allowed is 1 to {MAX_REPEATS}")
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens, ignore_eos=True)
        session = ChunkKVSession.from_dir(self.engine_dir, self.threads)
        prompt: Prompt = chat_prompt(session.tokenizer, self.prompt) if self.chat else self.prompt

        def answer() -> None:
            session.generate(prompt, sampling, keep_ratio=self.keep_ratio, budget_tokens=self.budget_tokens)

        with profiling.range("warmup"), profiling.muted():
            answer()
        for _ in range(self.repeats):
            answer()


def measure(job: Job, tool: str, output: Path) -> Trace | None:
    """Run the job and return its trace, or None where a profiler around this process has it.

    Parameters
    ----------
    job : Job
        What is measured.
    tool : str
        "nsys", "recorder", "auto" (nsys where it is installed, else the recorder), or "nvtx" (a profiler that runs
        around this process).
    output : Path
        Where the trace will be written; nsys leaves its own files beside it.

    Raises
    ------
    RequestError
        Where nsys is asked for and not installed, and for a job that the engine cannot serve.
    ProfileError
        Where the tool fails, or no profiler listens.
    """
    if tool == "nvtx":
        run_for_attached_tool(job)
        return None
    nsys = find_nsys() if tool in ("auto", "nsys") else None
    if nsys is None and tool == "nsys":
        raise RequestError("tool is nsys, but nsys is not on PATH; install Nsight Systems or use --tool recorder")
    return record(job) if nsys is None else run_under_nsys(nsys, job, output)


def record(job: Job) -> Trace:
    """Return what the recorder saw of the job; needs no tool, and sees no GPU kernels."""
    with profiling.recording() as recorder:
        job.run()
    trace = from_recorder(recorder.ranges, tool="recorder", chunkkv=chunkkv.__version__)
    if not recorder.dropped:
        return trace
    return dataclasses.replace(trace, notes=(f"{recorder.dropped} ranges were dropped; ask for fewer repeats",))


def run_for_attached_tool(job: Job) -> None:
    """Run the job with NVTX ranges; raises ProfileError where no profiler listens to them."""
    if not profiling.enable_nvtx():
        raise ProfileError(
            "no profiler listens to NVTX in this process; start chunkkv under one, or use --tool recorder"
        )
    job.run()


def find_nsys() -> str | None:
    """Return the path of Nsight Systems' command line, or None."""
    return shutil.which("nsys")


def run_under_nsys(nsys: str, job: Job, output: Path) -> Trace:
    """Run the job under nsys and return its export; leaves .nsys-rep and .sqlite beside `output`.

    Raises ProfileError where nsys or the job fails, with the last lines that were written.
    """
    if importlib.util.find_spec("nvtx") is None:
        raise ProfileError("nsys sees the stages through the Python package 'nvtx': pip install 'chunkkv-trt[profile]'")
    with tempfile.TemporaryDirectory(prefix=".chunkkv-profile-", dir=output.absolute().parent) as folder:
        job_file, report, export = (Path(folder, name) for name in ("job.json", "trace.nsys-rep", "trace.sqlite"))
        write_whole(job_file, json.dumps(dataclasses.asdict(job)))
        program = [sys.executable, "-m", "chunkkv.profile.measure", str(job_file)]
        _run([nsys, "profile", f"--output={report.with_suffix('')}", *NSYS_FLAGS, *program], report)
        _run([nsys, "export", "--type=sqlite", "--force-overwrite=true", f"--output={export}", str(report)], export)
        trace = read_export(export)
        for path in (report, export):
            path.replace(output.with_suffix(path.suffix))
    return trace


def _run(command: Sequence[str], written: Path) -> None:
    """Run nsys; raises ProfileError unless it ends well and has written the file `written`."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ProfileError(f"{command[0]} cannot be run: {error.strerror}; try --tool recorder") from None
    output = (done.stderr.strip() or done.stdout.strip()).splitlines()
    said = "; ".join(output[-_LAST_LINES:]) or "it said nothing"
    if done.returncode:
        raise ProfileError(f"nsys {command[1]} failed with {done.returncode}: {said}; --tool recorder needs no nsys")
    if not written.is_file():
        raise ProfileError(f"nsys {command[1]} wrote no {written.suffix} file: {said}; --tool recorder needs no nsys")


def main(arguments: Sequence[str]) -> int:
    """Run the job of a file for the profiler around this process; return an exit code."""
    try:
        run_for_attached_tool(Job(**read_object(Path(arguments[0]), ProfileError)))
    except ChunkKVError as error:
        print(f"chunkkv: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
