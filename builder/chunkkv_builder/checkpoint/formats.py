"""Chooses the reader for a checkpoint's format."""

from __future__ import annotations

from pathlib import Path

from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.checkpoint.interface import Checkpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`; every tensor is checked against its configuration.

    Raises CheckpointError for anything missing, damaged or misshaped, ConfigError for a model that is not supported.
    """
    return HuggingFaceCheckpoint.open(path)
