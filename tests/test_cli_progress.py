"""What the commands show while they work, and flags that would do nothing or too much."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import engines

from chunkkv import session as session_module
from chunkkv.cli import progress
from chunkkv.cli.main import main
from chunkkv.executors.cpus import usable_cpus
from chunkkv.text.tokenizer import Tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def engine() -> str:
    return str(engines.engine_dir("llama3"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code: object = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


def test_log_probabilities_need_json(engine, run) -> None:
    code, out, err = run("generate", "--engine_dir", engine, "--logprobs", "the")
    assert (code, out) == (2, "") and "--logprobs" in err and "--json" in err


def test_more_threads_than_cpus_are_not_started(engine, run, monkeypatch) -> None:
    asked = []
    load = session_module.load_executor

    def watching(files, threads, *others):
        asked.append(threads)
        return load(files, threads, *others)

    monkeypatch.setattr(session_module, "load_executor", watching)
    code, _, err = run("generate", "--engine_dir", engine, "--threads", "1024", "--max_new_tokens", "2", "the")
    cpus = usable_cpus()
    assert code == 0 and asked == [cpus] and f"--threads 1024: this process has {cpus} CPUs" in err
    assert run("generate", "--engine_dir", engine, "--threads", "1025", "the")[0] == 2


LONG_PROMPT = " ".join(["the key of the cache"] * 12)


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_prefill_is_shown_in_lines_where_no_terminal_listens(
    engine, run, monkeypatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    flags = ["--output", str(tmp_path / "page.html")] if command == "inspect" else ["--max_new_tokens", "2"]
    code, _, err = run(command, "--engine_dir", engine, *flags, LONG_PROMPT)
    lines = [line for line in err.splitlines() if line.startswith("prefill: ")]
    assert code == 0 and len(lines) > 3 and lines[0].startswith("prefill: 0 of ") and " tokens, 0:0" in lines[0]
    assert any("about 0:0" in line and "left" in line for line in lines)
    assert run(command, "--engine_dir", engine, "--log_level", "error", *flags, LONG_PROMPT)[2] == ""


def test_a_terminal_gets_a_bar_before_the_answer(engine, run, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_BAR_TOKENS", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err = run("generate", "--engine_dir", engine, "--max_new_tokens", "2", "--ignore_eos", LONG_PROMPT)
    assert code == 0 and "prefill" in err and "tokens" in err and "prefill" not in out


def test_steps_are_shown_in_lines_with_an_estimate(monkeypatch, capsys) -> None:
    clock = iter([0.0, 0.01, 1.0, 5.0, 6.0, 20.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bars(quiet=False) as begin:
        advance = begin("eval", 100)
        for count in (50, 1, 1, 1, 1, 46):  # 50 were done before
            advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "eval: 52 of 100 prompts, 0:05, about 2:00 left",
        "eval: 54 of 100 prompts, 0:20, about 3:50 left",
        "eval: 100 of 100 prompts, 0:21",
    ]
    with progress.progress_bars(quiet=True) as begin:
        begin("eval", 2)(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_the_first_ctrl_c_ends_a_chat_template(engine, run, monkeypatch, command: str) -> None:
    """A template is foreign code that may take a second, so it runs before Ctrl-C means "end the answer"."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(self: Tokenizer, messages: object) -> list[int]:
        signal.raise_signal(signal.SIGINT)
        return [5]

    monkeypatch.setattr(Tokenizer, "encode_chat", interrupted)
    try:
        code, out, err = run(command, "--engine_dir", engine, "--chat", "the")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "") and err.endswith("interrupted\n")
