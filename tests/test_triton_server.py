"""What watches a tritonserver, without one: where it is found, canaries, restarts, and what dead servers leave."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support import engines
from support.messages import naming

from chunkkv.cli.main import main
from chunkkv.errors import BackendUnavailableError
from chunkkv.triton.server import supervisor
from chunkkv.triton.server.files import ServerFiles
from chunkkv.triton.server.health import Canary, canary_id
from chunkkv.triton.server.shared_memory import FOLDER_PREFIX, new_folder, new_shm_prefix, sweep_shared_memory
from chunkkv.triton.server.supervisor import ServeSettings, Supervisor


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with the wheel's server and NumPy 2: a python that answers as one there would."""
    site = tmp_path / "env" / "lib" / "site-packages"
    server = site / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    server.parent.mkdir(parents=True)
    server.touch()
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *find_spec*) echo {site / "pytriton"};; *numpy*) echo 2.4.6;; '
        "*) printf '3.11\\n\\n';; esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    return tmp_path / "env"


def test_numpy_2_beside_the_wheels_server_is_said_before_it_hangs(environment, tmp_path, capsys) -> None:
    words = naming("numpy 2.4.6 nvidia-pytriton numpy below pip install 'numpy<2'")
    with pytest.raises(BackendUnavailableError, match=words):
        ServerFiles.find(tmp_path / "work", environment / "bin" / "python")
    engine = str(engines.engine_dir("llama3"))
    repository = str(tmp_path / "models")
    flags = ["--engine_dir", engine, "--model_repository", repository, "--python_env", str(environment)]
    main(["triton", "init", *flags])
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "numpy 2.4.6" in told and told.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["doctor", "--engine_dir", engine, "--triton_repo", repository])
    assert "chunkkv: numpy" in capsys.readouterr().out


def test_one_canary_that_fails_means_nothing_and_failures_that_last_do() -> None:
    def problem_of(answers: list[str | None], timeout_s: float) -> str | None:
        asked, ended = [], threading.Event()

        def ask() -> str | None:
            asked.append(time.monotonic())
            if len(asked) >= len(answers):
                ended.set()
            return answers[min(len(asked), len(answers)) - 1]

        canary = Canary(ask, 0.01, timeout_s)
        ended.wait(1)
        time.sleep(0.1)
        canary.stop()
        return canary.problem

    assert problem_of(["frozen", "frozen", "frozen", None], 60) is None
    assert "the last with: frozen" in problem_of(["frozen"] * 20, 0.05)
    assert "2 canaries" in problem_of(["CHUNKKV_INTERNAL: the engine is stuck"] * 2, 60)


def test_a_canarys_id_is_that_of_one_server() -> None:
    prefixes = {new_shm_prefix() for _ in range(50)}
    assert len({canary_id(prefix) for prefix in prefixes}) == 50


def test_only_what_was_ready_for_a_minute_resets_the_count(tmp_path, monkeypatch) -> None:
    """A server that takes long to fail, as with the default start_timeout_s, is given up like any other."""
    runner = Supervisor(ServeSettings(tmp_path, restarts=2), ServerFiles(Path("/no/tritonserver"), None, {}))
    clock = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runner._stopping, "wait", lambda seconds: False)
    monkeypatch.setattr(ServeSettings, "check_ports", lambda self: None)
    runs = []

    def serve(failed_at: float | None) -> str:
        runs.append(clock[0])
        runner._ready_at = clock[0] if len(runs) == 2 else None
        clock[0] += 300
        return "it was not ready"

    monkeypatch.setattr(runner, "_serve", serve)
    assert runner.run() == 1
    assert len(runs) == 4, "the second was ready for five minutes, and two restarts after it are allowed"


def test_what_dead_servers_left_is_removed_and_nothing_else(tmp_path, monkeypatch) -> None:
    alive, dead = new_shm_prefix(), new_shm_prefix()
    for name in (f"{alive}1", f"{dead}1", f"{dead}2", "chunkkv_of_somebody", "other"):
        (tmp_path / name).touch()
    with subprocess.Popen([sys.executable, "-c", "input()", f"shm-region-prefix-name={alive}"], stdin=-1) as process:
        while alive not in " ".join(psutil.Process(process.pid).cmdline()):
            time.sleep(0.01)
        assert sweep_shared_memory(tmp_path) == [dead]
        process.communicate(b"\n")
    assert {path.name for path in tmp_path.iterdir()} == {f"{alive}1", "chunkkv_of_somebody", "other"}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, mine = tmp_path / f"{FOLDER_PREFIX}{gone.pid}-a", tmp_path / f"{FOLDER_PREFIX}{os.getpid()}-b"
    left.mkdir()
    mine.mkdir()
    with new_folder() as folder:
        assert Path(folder).is_dir() and mine.is_dir() and not left.exists()
