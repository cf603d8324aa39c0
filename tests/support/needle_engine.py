"""An engine of the shipped model in which every layer scores with a window of 32, for evaluations."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from chunkkv.session import ChunkKVSession
from chunkkv_builder import build as build_engine

MODEL = Path(__file__).resolve().parents[2] / "examples" / "needle" / "model"
_FOLDER = tempfile.TemporaryDirectory(prefix="chunkkv-test-needle-")  # kept until the process ends


@cache
def engine_dir(*flags: str) -> Path:
    """Return an engine of the shipped model; `flags` are further flags of chunkkv-build."""
    output = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "engine"
    named = ["--checkpoint_dir", str(MODEL), "--output_dir", str(output), "--log_level", "error"]
    build_engine.main([*named, "--chunkkv", "--chunkkv_window", "32", *flags])
    return output


@cache
def session(*flags: str) -> ChunkKVSession:
    """Return a session on one thread over engine_dir of the same flags."""
    return ChunkKVSession.from_dir(engine_dir(*flags), threads=1)
