"""What chunkkv says of itself: help, versions, commands there are; and that asking costs no engine library."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.builds import CommandLine, Outcome

import chunkkv
from chunkkv.batching.limits import BatchingLimits
from chunkkv.batching.pools import MOST_SLOTS
from chunkkv.cli.main import main, make_parser
from chunkkv.triton.server.supervisor import ServeSettings

COMMANDS = (
    "generate",
    "chat",
    "compress",
    "inspect",
    "eval",
    "calibrate",
    "doctor",
    "profile",
    "serve",
    "triton",
    "version",
)
SUBCOMMANDS = ("profile report", "triton init", "triton patch", "triton serve")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setenv("COLUMNS", "80")
    return CommandLine(capsys, main)


def test_version_names_what_runs(run: CommandLine) -> None:
    done = run("version")
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert done.code == 0 and done.err == ""
    assert lines["chunkkv"] == chunkkv.__version__ and lines["python"] == platform.python_version()
    assert {"onnxruntime", "onnx", "numpy", "tokenizers"} < set(lines)
    assert run("--version").out == f"chunkkv {chunkkv.__version__}\n"


def test_help_lists_commands_and_flags(run: CommandLine) -> None:
    done = run("--help")
    assert (done.code, done.err) == (0, "")
    assert all(re.search(rf"^    {name} ", done.out, re.MULTILINE) for name in COMMANDS)
    assert re.search(r"^    lm_eval \(lm-eval\)$", done.out, re.MULTILINE)
    generate = run("generate", "--help")
    assert all(f"--{name}" in generate.out for name in ("engine_dir", "prompt_file", "max_new_tokens", "json"))


@pytest.mark.parametrize("command", ["", *COMMANDS, *SUBCOMMANDS])
def test_every_help_has_a_short_flag_and_fits_80_columns(run: CommandLine, command: str) -> None:
    done = run(*command.split(), "--help")
    assert (done.code, done.err) == (0, "") and run(*command.split(), "-h") == done
    assert done.out.startswith(f"usage: {' '.join(['chunkkv', command]).strip()}")
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["", "triton"])
def test_without_a_command_the_help_is_the_error(run: CommandLine, command: str) -> None:
    done = run(*command.split())
    assert (done.code, done.out) == (2, "") and done.err == run(*command.split(), "--help").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing", "COMMAND: 'nothing' is not offered; allowed is generate or chat or compress or "),
        ("triton start", "COMMAND: 'start' is not offered; allowed is init or patch or serve"),
        ("--verison", "unknown flag --verison; did you mean --version?"),
        ("triton patch --dry-rum", "unknown flag --dry-rum; did you mean --dry_run?"),
        ("triton init --engine-dir e", "--model_repository is missing; give the directory of Triton's"),
        ("triton init --log_level loud", "--log_level: 'loud' is not offered; allowed is debug or info or"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(run: CommandLine, words: str, message: str) -> None:
    done = run(*words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"chunkkv: error: {message}") and done.err.count("\n") == 1


def test_the_defaults_of_serving_are_those_of_the_server() -> None:
    """The parser says them itself, as it must not import the libraries."""
    flags = make_parser().parse_args(["triton", "serve", "--model_repository", "."])
    settings = ServeSettings(flags.model_repository)
    names = set(vars(settings)) - {"repository", "server_arguments"}
    assert {name: getattr(flags, name) for name in names} == {name: getattr(settings, name) for name in names}
    assert flags.server_arg == settings.server_arguments


def test_the_help_of_a_model_has_the_defaults_of_the_batcher(run: CommandLine) -> None:
    text = " ".join(run("triton", "init", "--help").out.split())
    defaults = {
        "slots": MOST_SLOTS,
        **{name: getattr(BatchingLimits(), name) for name in ("waiting", "queue_timeout_s")},
    }
    defaults["request_timeout_s"] = BatchingLimits().request_timeout_s
    for name, default in defaults.items():
        assert re.search(rf"--{name} [NX] [^-]*default: {default:g} ", text), name


@pytest.mark.parametrize("name", ["lm_eval", "lm-eval"])
@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--model-args", "a=1", "--unknown", "--", "-x"]])
def test_every_word_after_lm_eval_is_for_lm_eval(run: CommandLine, monkeypatch, name: str, words: list[str]) -> None:
    seen = []
    harness = SimpleNamespace(cli_evaluate=lambda: seen.append(list(sys.argv)))
    for module in ("lm_eval", "lm_eval.__main__", "chunkkv.evaluation.lm_eval.model"):
        monkeypatch.setitem(sys.modules, module, harness)
    before = list(sys.argv)
    assert run(name, *words) == Outcome(0, "", "")
    assert seen == [["lm_eval", *words]] and sys.argv == before


def test_lm_eval_without_the_harness_says_how_to_get_it(run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, module, None)
    done = run("lm_eval", "--tasks", "x")
    assert done.code == 1 and "pip install 'chunkkv-trt[lm-eval]'" in done.err and done.err.count("\n") == 1


def test_help_needs_no_engine_library() -> None:
    code = "import sys; from chunkkv.cli.main import make_parser; make_parser().format_help(); "
    code += "print(sorted({'numpy', 'onnx', 'onnxruntime', 'rich', 'tokenizers', 'tritonclient'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
