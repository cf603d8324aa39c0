"""chunkkv profile: the recorder's trace, what nsys is asked, reports from files, and errors before any work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from native.build import BuildError, nvtx_recorder
from support import engines, fake_nsys
from support.nsys_exports import write_export

from chunkkv.cli.main import main
from chunkkv.profile.measure import NSYS_FLAGS
from chunkkv.profile.trace import Trace

PROMPT = "the key of the cache is in the token that is " * 2
FLAGS = ("--max_new_tokens", "4", "--repeats", "2", "--threads", "1")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def engine() -> str:
    return str(engines.engine_dir("llama3"))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    """Run the command line in this process, in a folder of its own; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def nsys(monkeypatch, tmp_path_factory) -> Callable[[str], Path]:
    """Put a stand-in for nsys on PATH; returns the file with its arguments."""
    try:
        nvtx_recorder()
    except BuildError as error:
        pytest.skip(str(error))

    def install(mode: str = "works") -> Path:
        folder = tmp_path_factory.mktemp("nsys")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return fake_nsys.install(folder, mode)

    return install


def names(trace: Trace) -> list[str]:
    """Return the stages in order; the blocks of a prompt count as one."""
    return [name for name, _ in groupby(one.name for one in trace.ranges)]


EXPECTED = ["load", "warmup", *["request", "prefill", "compress", "sample", *["decode", "sample"] * 3] * 2]


def test_the_recorder_writes_a_trace_and_prints_it(engine, run, tmp_path: Path) -> None:
    code, out, err = run(
        "profile", "--engine_dir", engine, *FLAGS, "--prompt", PROMPT, "--tool", "recorder", "--picture", "a.svg"
    )
    assert (code, err) == (0, "")
    assert "Trace: chunkkv-profile.json" in out and "compress" in out and "median" in out
    trace = Trace.read(tmp_path / "chunkkv-profile.json")
    assert names(trace) == EXPECTED and trace.about["tool"] == "recorder"
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")
    shown = run("profile", "report", "chunkkv-profile.json")
    assert shown == (0, out.split("Trace: ")[0], "")
    code, out, err = run("profile", "report", "chunkkv-profile.json", "--json", "--picture", "b.svg")
    found = json.loads(out)
    assert [stage["name"] for stage in found["stages"]] == ["load", "warmup", "prefill", "compress", "decode", "sample"]
    first, second = found["requests"]
    assert second["request_id"] == first["request_id"] + 1 and first["tokens"] == 4
    assert 0 < first["compress_ns"] < first["ttft_ns"] and 0 < first["compress_share"] < 1
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"chunkkv-profile.json", "a.svg", "b.svg"}


def test_nsys_is_used_where_it_is_found(engine, run, nsys, tmp_path: Path) -> None:
    log = nsys()
    flags = ("--engine_dir", engine, *FLAGS, "--prompt", PROMPT, "--keep_ratio", "0.5", "--output", "x.json")
    code, out, err = run("profile", *flags)
    assert (code, err) == (0, "")
    assert "no GPU kernels were traced" in out
    profile, export = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    report = next(flag.split("=")[1] for flag in profile if flag.startswith("--output="))
    assert profile[0] == "profile" and profile[2 : 2 + len(NSYS_FLAGS)] == list(NSYS_FLAGS)
    assert profile[2 + len(NSYS_FLAGS) :][:3] == [sys.executable, "-m", "chunkkv.profile.measure"]
    assert export[:3] == ["export", "--type=sqlite", "--force-overwrite=true"]
    assert export[3:] == [f"--output={report}.sqlite", f"{report}.nsys-rep"]
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.nsys-rep", "x.sqlite"}
    trace = Trace.read(tmp_path / "x.json")
    assert names(trace) == EXPECTED and trace.about == {"tool": "nsys", "schema": "3.13.2"}
    kept = engines.session("llama3").generate(PROMPT, keep_ratio=0.5).statistics.kept_tokens
    assert {one.kept_tokens for one in trace.ranges if one.name == "request"} == {kept}
    assert run("profile", "report", "x.sqlite")[1] == run("profile", "report", "x.json")[1]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("profile", "nsys profile failed with 3: first line; no such report; --tool recorder needs no nsys"),
        ("export", "nsys export failed with 3: first line; no such report"),
        ("silent", "nsys profile wrote no .nsys-rep file: it said nothing"),
    ],
)
def test_a_failure_of_nsys_is_one_line(engine, run, nsys, tmp_path: Path, mode: str, told: str) -> None:
    nsys(mode)
    code, out, err = run("profile", "--engine_dir", engine, *FLAGS, "--prompt", PROMPT, "--tool", "nsys")
    assert (code, out) == (1, "") and told in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_under_nsys_tells_the_programs_reason(engine, run, nsys) -> None:
    nsys()
    code, _, err = run("profile", "--engine_dir", engine, "--prompt", PROMPT, "--max_new_tokens", "999")
    assert code == 1 and "lower max_new_tokens" in err and err.count("\n") == 1


ONE = ["profile", "--engine_dir", "{}", "--prompt", "a"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["profile", "--prompt", "a"], 2, "--engine_dir is missing; give the directory that chunkkv-build wrote"),
        (
            [*ONE, "--repeats", "0"],
            2,
            "--repeats is 0; allowed is 1 to 1000",
        ),
        (
            [*ONE, "--tool", "gdb"],
            2,
            "'gdb' is not offered; allowed is auto",
        ),
        ([*ONE, "--tool", "nsys"], 2, "nsys is not on PATH"),
        ([*ONE, "--tool", "nvtx"], 1, "no profiler listens to NVTX"),
        ([*ONE, "--output", "a.txt"], 2, "a.txt does not end in .json"),
        ([*ONE, "--picture", "a.png"], 2, "a.png does not end in .svg"),
        ([*ONE, "--output", "no/a.json"], 2, "no/a.json cannot be written"),
        (["profile", "--engine_dir", "/no/such", "--prompt", "a"], 1, "/no/such does not exist"),
        (["profile", "report", "nothing.sqlite"], 1, "nothing.sqlite cannot be read: No such file"),
        (["profile", "report", "nothing.json"], 1, "nothing.json cannot be read: No such file"),
        (["profile", "report"], 2, "FILE is missing; --help lists what there is"),
    ],
)
def test_errors_are_one_line(engine, run, monkeypatch, arguments: list, code: int, told: str) -> None:
    monkeypatch.setenv("PATH", "/no/such")
    found, out, err = run(*(argument.format(engine) for argument in arguments))
    assert (found, out) == (code, "") and told in err and err.count("\n") == 1


def test_an_export_with_kernels_is_shown_with_gpu_times(run, tmp_path: Path) -> None:
    write_export(tmp_path / "a.sqlite")
    code, out, _ = run("profile", "report", "a.sqlite")
    assert code == 0 and "GPU own" in out and "15.0%" in out
    assert "0.000 ms of kernel time (0.0%) were launched outside the stages" in out
