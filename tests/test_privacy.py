"""Nothing leaves the machine, and nothing is written where no one asked for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import engines
from support.gguf_files import write_gguf

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


def trace_command(folder: Path, *command: str | Path, **variables: str) -> tuple[list[str], set[Path]]:
    """Run a command in `folder`, with a new home and a new temporary directory in it and no package index.

    Returns its calls that open internet sockets, and every file that it opened for writing or folder that it made.
    """
    for name in ("home", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_", "MPL"))}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), "PIP_NO_INDEX": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    calls = "trace=socket,connect,openat,open,creat,mkdir,mkdirat"
    tracer = ["strace", "-f", "-qq", "-y", "-e", calls, "-o", str(folder / "trace")]
    subprocess.run([*tracer, *command], env=environment, cwd=folder, check=True)
    written = set()
    for call in (folder / "trace").read_text(errors="replace").splitlines():
        if match := re.search(
            r'(?:openat|mkdirat)\((?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"|(?:open|creat|mkdir)\("([^"]*)"', call
        ):
            makes = re.search(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|mkdir", call)
            if makes and " = -1 " not in call:
                written.add(Path(match[1] or folder, match[2] or match[3]))
    return internet_calls(folder / "trace"), written


def outside(paths: set[Path], *folders: Path) -> list[Path]:
    """Return the paths that lie neither in one of `folders` nor in the kernel's own file systems."""
    kernel = tuple(Path(name) for name in ("/dev", "/proc", "/sys"))
    return sorted(path for path in paths if not any(path.is_relative_to(folder) for folder in (*folders, *kernel)))


@needs_strace
def test_a_gguf_build_and_an_answer_write_what_they_were_told_and_open_no_connection(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama3", "Q4_1")
    flags = ("--checkpoint_dir", tmp_path / "model.gguf", "--output_dir", tmp_path / "made" / "engine")
    script = ROOT / "builder" / "build_engine.py"
    internet, written = trace_command(tmp_path, sys.executable, script, *flags, "--max_seq_len", "256", "--chunkkv")
    assert internet == [] and written and outside(written, tmp_path / "made", tmp_path / "temporary") == []
    answer = (sys.executable, "-m", "chunkkv", "generate", "--engine_dir", tmp_path / "made" / "engine", "the cache")
    internet, written = trace_command(tmp_path, *answer)
    assert internet == [] and outside(written, tmp_path / "temporary") == []
    assert files_below(tmp_path / "home") == files_below(tmp_path / "temporary") == []


@needs_strace
@pytest.mark.deep
def test_the_demo_without_a_network_writes_where_it_was_told_and_opens_no_connection(tmp_path: Path) -> None:
    output, cache = ("--output_dir", tmp_path / "made"), ("--cache_dir", tmp_path / "cache")
    command = (sys.executable, "-m", "examples.demo", *output, *cache)
    # Without rustup on the path: pip asks rustc for its version, and rustup then writes to the home directory.
    own = {"MPLCONFIGDIR": str(tmp_path / "matplotlib"), "PATH": "/usr/bin:/bin"}
    internet, written = trace_command(tmp_path, *command, **own)
    folders = [tmp_path / name for name in ("made", "cache", "matplotlib", "temporary")]
    # pip is called for the model and has no index: it makes a socket to learn about IPv6, and connects it to nothing.
    assert [call for call in internet if "connect(" in call] == [] and outside(written, *folders) == []
    assert (tmp_path / "made" / "needle.html").is_file()
    assert (
        files_below(tmp_path / "home") == files_below(tmp_path / "temporary") == files_below(tmp_path / "cache") == []
    )


@needs_strace
def test_a_file_in_the_home_directory_would_be_seen(tmp_path: Path) -> None:
    program = "import pathlib; (pathlib.Path.home() / 'folder').mkdir(); open(pathlib.Path.home() / 'file', 'w')"
    _, written = trace_command(tmp_path, sys.executable, "-c", program)
    assert outside(written, tmp_path / "temporary") == [tmp_path / "home" / name for name in ("file", "folder")]
