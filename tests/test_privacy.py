"""Nothing leaves the machine, and nothing is written where no one asked for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import engines

ROOT = Path(__file__).resolve().parent.parent
SESSION = textwrap.dedent(
    """
    import sys, time
    import chunkkv_builder.build
    from chunkkv import ChunkKVSession, SamplingParams
    session = ChunkKVSession.from_dir(sys.argv[1])
    session.generate([5, 6, 7, 8], SamplingParams(max_new_tokens=2))
    time.sleep(1.0)  # telemetry waits before it looks up its host
    """
)


def run_with_empty_home(home: Path, program: str, trace: Path | None = None, **variables: str) -> None:
    """Run Python code on a new engine's directory with `home` as the home directory; `trace` lists its connections."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("python", "builder"))
    environment |= {"HOME": str(home), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    tracer = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", str(trace)] if trace else []
    directory = str(engines.engine_dir("llama3"))
    subprocess.run([*tracer, sys.executable, "-c", program, directory], env=environment, cwd=home.parent, check=True)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def internet_calls(trace: Path) -> list[str]:
    """Return the system calls of a trace that open or connect an internet socket."""
    return [call for call in trace.read_text().splitlines() if "AF_INET" in call]


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def test_a_session_writes_nothing_to_the_home_directory(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run_with_empty_home(home, SESSION)
    assert files_below(tmp_path) == []


@needs_strace
def test_a_session_opens_no_connection(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    run_with_empty_home(home, SESSION, tmp_path / "trace")
    assert internet_calls(tmp_path / "trace") == []


@needs_strace
def test_a_connection_would_be_seen(tmp_path: Path) -> None:
    """The check above looks for what must not be there; here it is there, to a closed port of this machine."""
    program = "import socket; print(socket.socket().connect_ex(('127.0.0.1', 9)))"
    run_with_empty_home(tmp_path, program, tmp_path / "trace")
    assert internet_calls(tmp_path / "trace")


def test_a_users_own_choice_stays(tmp_path: Path) -> None:
    program = "import os, chunkkv; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    run_with_empty_home(tmp_path, program, ORT_DISABLE_TELEMETRY="0")
