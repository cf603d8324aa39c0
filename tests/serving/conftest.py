"""Engines, repositories and servers for the tests against a real tritonserver; skipped where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chunkkv import ChunkKVSession
from chunkkv.errors import BackendUnavailableError
from chunkkv.triton.server.files import ServerFiles

from .server import CHUNKKV, Server

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "model"
PROMPTS = ROOT / "examples" / "needle" / "prompts"
HERE = Path(__file__).parent


def missing() -> str | None:
    """Return why no server can run here, None where one can."""
    if int(np.__version__.split(".", maxsplit=1)[0]) >= 2:
        return f"numpy is {np.__version__}; the server's python backend takes numpy below 2 (make test-triton)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = ServerFiles.find(Path(folder), Path(sys.executable))
        except BackendUnavailableError as error:
            return str(error)
        if files.backends is not None:
            stub = files.backends / "python" / "triton_python_backend_stub"
            shown = subprocess.run(["ldd", stub], env=files.environment, capture_output=True, text=True, check=False)
            if lacks := [line.strip() for line in shown.stdout.splitlines() if "not found" in line]:
                return f"the server's python backend lacks {lacks[0]}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a server where there is none."""
    mine = [item for item in items if HERE in item.path.parents]
    if mine and (reason := missing()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's engine, for up to 8 rows; its positions are stretched so that an answer can take long."""
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = Path(shutil.copytree(MODEL, folder / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}), encoding="utf-8")
    choice = ["--chunkkv_layer_reuse", "2", "--chunkkv_boundaries", "delimiter", "--chunkkv_chunk_size", "20"]
    build = [sys.executable, str(ROOT / "builder" / "build_engine.py"), "--checkpoint_dir", str(checkpoint)]
    limits = ["--max_input_len", "2048", "--max_num_tokens", "512"]
    subprocess.run(
        [*build, "--output_dir", str(folder / "engine"), "--chunkkv", *choice, *limits, "--log_level", "warning"],
        check=True,
    )
    return folder / "engine"


@pytest.fixture(scope="session")
def session(engine_dir: Path) -> ChunkKVSession:
    """The library itself, on the same engine."""
    return ChunkKVSession.from_dir(engine_dir, threads=1)


@pytest.fixture(scope="session")
def document() -> str:
    """A prompt of about 2,000 tokens with a question at its end."""
    return json.loads((PROMPTS / "demo.json").read_text(encoding="utf-8"))["text"]


@pytest.fixture(scope="session")
def short() -> str:
    """A prompt of about 200 tokens."""
    return (PROMPTS / "short.txt").read_text(encoding="utf-8").rstrip("\n")


def make_repository(engine: Path, folder: Path, *flags: str) -> Path:
    """Write a repository with the command line."""
    command = [*CHUNKKV, "triton", "init", "--engine_dir", str(engine), "--model_repository", str(folder)]
    subprocess.run([*command, "--threads", "1", *flags], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def servers(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Make servers; whatever is left of them at the end is killed."""
    started: list[Server] = []

    def start(*init_flags: str, serve_flags: tuple[str, ...] = ()) -> Server:
        folder = tmp_path_factory.mktemp("server")
        repository = make_repository(engine_dir, folder / "repository", *init_flags)
        started.append(Server(repository, folder / "log", *serve_flags))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.kill()
