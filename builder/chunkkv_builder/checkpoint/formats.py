"""Chooses the reader for a checkpoint's format."""

from __future__ import annotations

from pathlib import Path

from chunkkv_builder.checkpoint.gguf import GgufCheckpoint, is_gguf
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.checkpoint.interface import Checkpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`: a Hugging Face directory, or a GGUF file or a folder with one.

    Every tensor is checked against the configuration. Raises CheckpointError for anything missing, damaged or
    misshaped, ConfigError for a model that is not supported.
    """
    if is_gguf(Path(path)):
        return GgufCheckpoint.open(path)
    return HuggingFaceCheckpoint.open(path)
