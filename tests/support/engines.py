"""Engines for tests, built by the real command line from tiny checkpoints and cached for the whole test run."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from chunkkv.session import ChunkKVSession
from chunkkv_builder import build as build_engine
from support.checkpoints import write_checkpoint

# Small enough that a prompt of 40 tokens is compressed.
SMALL_CHUNKKV = {
    "chunkkv_window": 4,
    "chunkkv_chunk_size": 3,
    "chunkkv_sinks": 2,
    "chunkkv_min_tokens": 10,
    "chunkkv_keep_ratio": 0.4,
    "chunkkv_boundaries": "fixed",
    "chunkkv_leader": "last",
}
_FOLDER = tempfile.TemporaryDirectory(prefix="chunkkv-test-engines-")  # kept until the process ends


@cache
def checkpoint_dir(variant: str, **overrides: Any) -> Path:
    """Return the directory of the tiny checkpoint `variant`; the same arguments give the same directory."""
    return write_checkpoint(Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "checkpoint", variant, **overrides)


@cache
def engine_dir(variant: str, chunkkv: bool = True, **flags: Any) -> Path:
    """Return an engine of `variant` with small limits and small ChunkKV settings; `flags` are command line flags."""
    output = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "engine"
    limits = {"max_batch_size": 4, "max_seq_len": 256, "max_num_tokens": 16, "log_level": "error"}
    settings = {**SMALL_CHUNKKV, "chunkkv": True} if chunkkv else {}
    named = {"checkpoint_dir": checkpoint_dir(variant), "output_dir": output, **limits, **settings, **flags}
    build_engine.main(command_line(named))
    return output


def build_tensorrt(output: Path, variant: str = "llama3", chunkkv: bool = True, **flags: Any) -> Path:
    """Build a float32 engine for TensorRT in `output`, with the TensorRT that this process imports; return `output`."""
    limits = {"max_batch_size": 4, "max_seq_len": 256, "log_level": "error", "dtype": "float32"}
    settings = {**SMALL_CHUNKKV, "chunkkv": True} if chunkkv else {}
    named = {"checkpoint_dir": checkpoint_dir(variant), "output_dir": output, "backend": "tensorrt"}
    build_engine.main(command_line({**named, **limits, **settings, **flags}))
    return output


def command_line(flags: dict[str, Any]) -> list[str]:
    """Return `--name value` for every flag, `--name` alone where the value is True."""
    return [
        part
        for name, value in flags.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


@cache
def session(variant: str, chunkkv: bool = True, **flags: Any) -> ChunkKVSession:
    """Return a session on one thread over engine_dir of the same arguments."""
    return ChunkKVSession.from_dir(engine_dir(variant, chunkkv, **flags), threads=1)
