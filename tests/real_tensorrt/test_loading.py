"""Engines of TensorRT for RTX on a machine that cannot run them, and files that are no engines: one line each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import engines
from support.builds import Outcome, run_program
from support.messages import naming

from chunkkv.engine.tensorrt_contract import PREFILL_FILE
from chunkkv.gpu.tensorrt_library import TensorRT, missing_gpu
from chunkkv_builder import build as build_engine

CONSOLE_SCRIPT = Path(sys.executable).with_name("chunkkv")


@pytest.fixture(scope="module")
def engine(rtx: TensorRT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "engine"
    flags = {"checkpoint_dir": engines.checkpoint_dir("llama3"), "output_dir": output, "log_level": "error"}
    flags |= {"backend": "tensorrt", "tensorrt": "rtx", "chunkkv": True, "chunkkv_ops": "functions"}
    build_engine.main(engines.command_line({**flags, "max_seq_len": 128, "max_batch_size": 1}))
    return output


def generate(folder: Path) -> Outcome:
    return run_program(CONSOLE_SCRIPT, "generate", "the key", "--engine_dir", folder)


def message(outcome: Outcome) -> str:
    """Return the one line of a run that must have failed."""
    assert (outcome.code, outcome.out) == (1, ""), outcome
    (line,) = outcome.err.splitlines()
    return line


def test_an_engine_names_its_tensorrt_and_the_missing_gpu(rtx: TensorRT, engine: Path) -> None:
    if not missing_gpu():
        pytest.skip("there is a GPU, so the engine runs")
    assert re.search(naming(engine, rtx.title, "NVIDIA GPU"), message(generate(engine)))


def test_a_damaged_engine_is_found_out_before_tensorrt_sees_it(engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    for path in engine.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / PREFILL_FILE).read_bytes()
    (folder / PREFILL_FILE).write_bytes(content[: len(content) // 2])
    assert re.search(naming(PREFILL_FILE), message(generate(folder)))
