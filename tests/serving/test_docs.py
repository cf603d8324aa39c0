"""The commands of docs/triton.md, run as they stand, on the shipped model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .server import Server, free_ports, wait_for

PAGE = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
COMMANDS = [line.replace(".venv-serve/bin/", "") for line in re.findall(r"^    (\S.+)$", PAGE, re.MULTILINE)]
ELSEWHERE = {  # run by other tests, under another name or on another double
    "python -m venv": "the environment of these tests is made so",
    "pip install '.[triton]'": "the environment of these tests is made so",
    "pip install --no-deps nvidia-pytriton==0.7.0 'numpy<2'": "the environment of these tests is made so",
    "chunkkv-build": "the fixture engine_dir, with the same flags and more",
    "chunkkv triton patch": "tests/test_triton_repository.py",
}


@pytest.fixture(scope="module")
def folder(engine_dir, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    (place / "engines").mkdir()
    shutil.copytree(engine_dir, place / "engines" / "llama")
    return place


def run(command: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        shlex.split(command), cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_run_by_a_test() -> None:
    kinds = ("chunkkv triton init", "chunkkv triton serve", "curl ", *ELSEWHERE)
    assert len(COMMANDS) >= 10 and [line for line in COMMANDS if not line.startswith(kinds)] == []


def test_the_repositories_are_written(folder) -> None:
    lines = [line for line in COMMANDS if line.startswith("chunkkv triton init")]
    printed = [run(line, folder) for line in lines]
    assert printed == [
        "models: chunkkv\n",
        "models-small: chunkkv\n",
        "models-trtllm: preprocessing, tensorrt_llm, postprocessing, tensorrt_llm_bls, ensemble\n",
    ]


def test_the_server_answers_as_the_page_says(folder) -> None:
    """The page's ports may be taken here, so they are replaced."""
    (command,) = (line for line in COMMANDS if line.startswith("chunkkv triton serve"))
    ports = dict(zip(("8000", "8001", "8002"), free_ports(3), strict=True))
    server = Server.__new__(Server)
    server.http, server.grpc, server.metrics = ports.values()
    server._log = folder / "log"
    named = ["--http_port", "--grpc_port", "--metrics_port"]
    flags = [part for name, port in zip(named, ports.values(), strict=True) for part in (name, str(port))]
    words = [str(Path(sys.executable).parent / "chunkkv"), *shlex.split(command)[1:], *flags]
    with server._log.open("wb") as output:
        server.process = subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        server.wait_ready()
        lines = [line for line in COMMANDS if line.startswith("curl ")]
        for old, new in ports.items():
            lines = [line.replace(f":{old}", f":{new}") for line in lines]
        whole, stream, _ = (run(line, folder) for line in lines)
        answer = json.loads(whole)
        documented = set(re.findall(r"`(\w+)`", PAGE.split("The last response has")[1].split("\n\n")[0]))
        assert documented <= set(answer)
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
        assert events[-1]["finish_reason"] in ("stop", "length")
        names = set(re.findall(r"chunkkv_\w+", PAGE.split("Metrics, with labels")[1].split("\n\n")[0]))
        wait_for(lambda: names <= set(re.findall(r"^# TYPE (\w+)", run(lines[2], folder), re.MULTILINE)))
        assert server.stop() == 0
    finally:
        server.kill()


def test_defaults_are_those_of_the_code() -> None:
    from chunkkv.batching import BatchingLimits
    from chunkkv.triton.server.supervisor import ServeSettings

    defaults = dict(re.findall(r"`--(\w+)` \(([\d.]+)\)", PAGE))
    limits, settings = BatchingLimits(), ServeSettings(ROOT)
    in_code = {name: getattr(limits, name, getattr(settings, name, None)) for name in defaults}
    assert {name: float(value) for name, value in defaults.items() if in_code[name] is not None} == {
        name: value for name, value in in_code.items() if value is not None
    }
    assert {"waiting", "restarts", "canary_timeout_s", "canary_s", "exit_timeout_s", "queue_timeout_s"} <= set(defaults)
