"""Ctrl-C and SIGTERM while TensorRT builds: the program ends within seconds and leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import engines

INTERRUPTED, TERMINATED = 130, 143
# Says when TensorRT is at work; a test run in the background may have been started with SIGINT ignored.
PROGRAM = """
import signal, sys
from chunkkv_builder import build
from chunkkv_builder.progress import Progress

advance = Progress.advance
def advance_and_tell(self, steps=1):
    advance(self, steps)
    if self._name == "prefill":
        print("at work", flush=True)

Progress.advance = advance_and_tell
signal.signal(signal.SIGINT, signal.default_int_handler)
build.main(sys.argv[1:])
"""
SECONDS = 15  # of a busy machine; the build itself takes several times as long


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_signal_during_a_build(number: signal.Signals, code: int, tmp_path: Path) -> None:
    large = engines.checkpoint_dir("llama3", num_hidden_layers=24, head_dim=64, max_position_embeddings=4096)
    flags = {"checkpoint_dir": large, "output_dir": tmp_path / "engine", "backend": "tensorrt", "tensorrt": "rtx"}
    flags |= {"chunkkv": True, "chunkkv_ops": "functions", "max_seq_len": 4096, "log_level": "error"}
    command = [sys.executable, "-c", PROGRAM, *engines.command_line(flags)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        sent = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == code
    assert time.monotonic() - sent < SECONDS
    assert errors == ("chunkkv-build: error: interrupted\n" if number == signal.SIGINT else "")
    assert list(tmp_path.iterdir()) == []
