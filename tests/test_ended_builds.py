"""A build ended at any moment leaves nothing that loads unless it is complete, and an old engine stays usable."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ended_builds, engines
from support.builds import CommandLine, Outcome, on_terminal, python
from support.messages import naming

from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import ConfigError, EngineError
from chunkkv_builder import manifest

KILLED, HUNG_UP, INTERRUPTED, TERMINATED = -signal.SIGKILL, 129, 130, 143
# Builds until all but the manifest is there, says so and waits for a signal. A test run in the background may have
# been started with SIGINT ignored, which a build would respect.
WAITING = """
import fcntl, signal, sys, termios, time
from chunkkv_builder import manifest
from chunkkv_builder import build as build_engine
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def wait(*_):
    print("ready", flush=True)
    while True:  # a signal that comes before a call of pause() would be lost
        time.sleep(0.05)
manifest.write_manifest = wait
build_engine.main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Round:
    """What one ended build left: its exit code, the names beside the output, and those of them that load."""

    code: int
    names: list[str]
    load: list[str]


@pytest.fixture(scope="module")
def model() -> Path:
    return engines.checkpoint_dir("llama3", with_tokenizer=False, num_hidden_layers=1, vocab_size=16)


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that builds `tmp_path`/engine, quietly."""
    cli = CommandLine(capsys)
    return lambda *flags: cli(*flags_for(model, tmp_path), *flags)


def flags_for(model: Path, folder: Path) -> tuple[object, ...]:
    return ("--checkpoint_dir", model, "--output_dir", folder / "engine", "--log_level", "error")


def rounds_of(how: str, folder: Path, *flags: object) -> list[Round]:
    done = python(ended_builds.__file__, how, folder, *flags)
    assert done.code == 0, done.err
    return [Round(**entry) for entry in json.loads(done.out)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("how", "code"), [("kill", KILLED), ("interrupt", INTERRUPTED)])
def test_a_first_build_ended_at_any_file_operation(how: str, code: int, model: Path, tmp_path: Path) -> None:
    *ended, last = rounds_of(how, tmp_path, "--checkpoint_dir", model, "--chunkkv")
    assert len(ended) > 12 and {round.code for round in ended} == {code}
    assert any(round.names == [] for round in ended)
    for round in ended:
        assert round.load == [name for name in round.names if name == "engine"], "only complete engines load"
        assert len(round.names) <= 1, "what earlier builds left is cleaned up"
        left = r"engine|engine\.partial-\d+" if how == "kill" else "engine"
        assert all(re.fullmatch(left, name) for name in round.names)
    assert (last.names, last.load, last.code) == (["engine"], ["engine"], 2)  # the build before was complete
    assert EngineFiles.load(tmp_path / "engine").settings is not None


@pytest.mark.parametrize(("how", "code"), [("kill", KILLED), ("interrupt", INTERRUPTED)])
def test_an_overwriting_build_ended_at_any_file_operation(build, model, tmp_path, how, code) -> None:
    """The old engine or the new one loads after every end; where it lost its name, the next build gives it back."""
    assert build().code == 0
    *ended, last = rounds_of(how, tmp_path, "--checkpoint_dir", model, "--chunkkv", "--overwrite")
    assert len(ended) > 20 and {round.code for round in ended} == {code}
    for round, after in zip(ended, [*ended[1:], last], strict=True):
        if how == "interrupt":
            assert round.names == round.load == ["engine"]
        elif "engine" not in round.names:
            assert [name for name in round.load if re.fullmatch(r"engine\.replaced-\d+", name)]
            assert "engine" in after.load
        else:
            assert "engine" in round.load
        assert not [name for name in round.load if "partial" in name]
        assert len(round.names) <= 2, "what earlier builds left is cleaned up"
    if how == "kill":
        assert any("engine" not in round.names for round in ended), "the moment between two names was met"
    assert (last.names, last.load, last.code) == (["engine"], ["engine"], 0)
    assert EngineFiles.load(tmp_path / "engine").settings is not None


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_right_after_a_rename_of_a_replacement(build, tmp_path, monkeypatch, count: int) -> None:
    build()
    rename, seen = os.rename, []

    def interrupted(*arguments: object) -> None:
        rename(*arguments)
        seen.append(arguments)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    assert build("--chunkkv", "--overwrite").error(INTERRUPTED) == "interrupted"
    assert names(tmp_path) == ["engine"]
    assert (EngineFiles.load(tmp_path / "engine").settings is not None) == (count == 2)


def test_ctrl_c_right_after_the_working_directory_was_made(build, tmp_path, monkeypatch) -> None:
    mkdir = Path.mkdir

    def interrupted(path: Path, *arguments: object, **named: object) -> None:
        mkdir(path, *arguments, **named)
        if ".partial-" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    assert build().error(INTERRUPTED) == "interrupted"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED), (signal.SIGHUP, HUNG_UP)]
)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, code: int, model: Path, tmp_path: Path) -> None:
    found, errors = end_by(number, model, tmp_path)
    assert found == code
    assert errors == ("chunkkv-build: error: interrupted\n" if number == signal.SIGINT else "")
    assert names(tmp_path) == []


def test_what_sigkill_leaves_does_not_load_and_is_gone_after_the_next_build(build, model, tmp_path) -> None:
    assert end_by(signal.SIGKILL, model, tmp_path) == (KILLED, "")
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"engine\.partial-\d+", left.name) and (left / "config.json").is_file()
    with pytest.raises(EngineError, match=naming("unfinished")):
        EngineFiles.load(left)
    assert build().code == 0
    assert names(tmp_path) == ["engine"]


def end_by(number: signal.Signals, model: Path, folder: Path) -> tuple[int, str]:
    """Send `number` to a build that has written all but its manifest; return its exit code and standard error."""
    command = [sys.executable, "-c", WAITING, *map(str, flags_for(model, folder))]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_ctrl_c_on_a_terminal_ends_with_one_line_and_a_visible_cursor(model: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint_dir", model, "--output_dir", tmp_path / "engine", "--log_level", "info")
    code, shown = on_terminal(sys.executable, "-c", WAITING, *flags, wait_for="ready", then=b"\x03")
    assert code == INTERRUPTED and "Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.splitlines()[-1].endswith("chunkkv-build: error: interrupted")
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_half_replaced_engine_gets_its_name_back(build, tmp_path, monkeypatch, overwrite: list[str]) -> None:
    """Without --overwrite the build ends before its long work, because an engine is there again."""
    build()
    (tmp_path / "engine").rename(tmp_path / "engine.replaced-7")
    if overwrite:
        assert build("--chunkkv", *overwrite).code == 0
    else:
        monkeypatch.setattr(manifest, "_new_stage", lambda target: pytest.fail("the build went on"))
        assert "holds an engine already" in build("--chunkkv").error(1)
    assert names(tmp_path) == ["engine"]
    assert (EngineFiles.load(tmp_path / "engine").settings is not None) == bool(overwrite)


def test_clean_up_takes_only_what_builds_of_the_same_engine_left(build, tmp_path: Path) -> None:
    for name in (
        "engine.partial-1",
        "engine.replaced-2",
        "engine.partial-abc",
        "engine2.partial-1",
        "Xengine.partial-1",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("engine.partial-4", "engine.replaced-1"):
        (tmp_path / name).write_text("a file")
    (tmp_path / "engine.partial-5").symlink_to("engine2.partial-1")
    (tmp_path / "engine.replaced-6").symlink_to("nowhere")
    build()  # gives what lies aside the name back: it may be a whole engine
    assert names(tmp_path / "engine") == ["config.json"]
    (tmp_path / "engine" / "config.json").unlink()
    assert build().code == 0
    kept = ["Xengine.partial-1", "engine", "engine.partial-4", "engine.partial-5", "engine.partial-abc"]
    assert names(tmp_path) == [*kept, "engine.replaced-1", "engine.replaced-6", "engine2.partial-1"]
    EngineFiles.load(tmp_path / "engine")


def test_a_live_build_is_left_alone(build: Callable[..., Outcome], tmp_path: Path) -> None:
    for name in ("engine.partial-1", "engine.replaced-2"):
        (tmp_path / name).mkdir()
    alive = [os.open(tmp_path / name, os.O_RDONLY) for name in names(tmp_path)]
    for handle in alive:
        fcntl.flock(handle, fcntl.LOCK_EX)
    assert build().code == 0
    assert names(tmp_path) == ["engine", "engine.partial-1", "engine.replaced-2"]
    for handle in alive:
        os.close(handle)
    assert build("--overwrite").code == 0
    assert names(tmp_path) == ["engine"]


def test_of_two_builds_at_once_the_first_to_finish_wins(build, tmp_path, monkeypatch) -> None:
    with (
        pytest.raises(ConfigError, match=naming("engine already")),
        manifest.staged_output(tmp_path / "engine") as slow,
    ):
        monkeypatch.setattr(os, "getpid", lambda: 999_999_999)
        assert build("--chunkkv").code == 0
        assert slow.is_dir()
        (slow / "manifest.json").write_text("{}")
    assert names(tmp_path) == ["engine"]
    assert EngineFiles.load(tmp_path / "engine").settings is not None


def test_a_build_without_its_manifest_is_never_put_in_place(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=naming("no manifest.json")),
        manifest.staged_output(tmp_path / "engine") as stage,
    ):
        (stage / "weights.safetensors").write_text("x")
    assert names(tmp_path) == []


def test_a_name_that_another_build_uses_is_not_taken(build: Callable[..., Outcome], tmp_path: Path) -> None:
    """Two machines that share a disk may have the same process number."""
    taken = tmp_path / f"engine.partial-{os.getpid()}"
    taken.mkdir()
    handle = os.open(taken, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another build may be writing it" in build().error(1)
    assert names(tmp_path) == [taken.name]
    os.close(handle)


def test_an_old_engine_that_cannot_be_removed_is_named(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """As where its folder is read-only, which stops nobody who is root."""
    build = CommandLine(capsys)
    assert build(*flags_for(model, tmp_path)).code == 0
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *rest, **named: ".replaced-" in str(path) or rmtree(path, *rest, **named)
    )
    outcome = build(*flags_for(model, tmp_path)[:-2], "--overwrite")
    (left,) = tmp_path.glob("engine.replaced-*")
    assert outcome.code == 0 and "warning" in outcome.err and left.name in " ".join(outcome.err.split())
    EngineFiles.load(tmp_path / "engine")


@pytest.mark.parametrize("is_empty", [True, False])
def test_files_of_file_managers_do_not_stop_a_build(build, tmp_path: Path, is_empty: bool) -> None:
    if not is_empty:
        assert build().code == 0
    (tmp_path / "engine").mkdir(exist_ok=True)
    (tmp_path / "engine" / ".DS_Store").write_text("x")
    assert build("--chunkkv", "--overwrite").code == 0
    assert names(tmp_path) == ["engine"] and not (tmp_path / "engine" / ".DS_Store").exists()
    (tmp_path / "engine" / ".env").write_text("mine")
    assert "'.env'" in build("--overwrite").error(2) and (tmp_path / "engine" / ".env").is_file()


def test_an_output_directory_that_is_not_utf8_is_refused_before_the_work(model: Path, tmp_path: Path, capsys) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")
    outcome = CommandLine(capsys)("--checkpoint_dir", model, "--output_dir", folder, "--log_level", "error")
    assert "output_dir" in outcome.error(2) and "UTF-8" in outcome.err and names(tmp_path) == []
