"""What the builder needs of a checkpoint, whatever its format; each format has one reader in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from chunkkv_builder.checkpoint.blocks import StoredBlocks
from chunkkv_builder.checkpoint.model_config import ModelConfig


class Checkpoint(Protocol):
    """A model's configuration, weights and tokenizer, complete and well-shaped.

    Tensors have the names and shapes of chunkkv_builder.checkpoint.tensor_shapes, the layout of Hugging Face's
    checkpoints (a projection is [out, in]); a reader of another format translates.
    """

    @property
    def path(self) -> Path:
        """The file or directory that was opened, for messages."""

    @property
    def config(self) -> ModelConfig:
        """The model; its `dtype` is the one the weights are stored in."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """A directory with the tokenizer's files under Hugging Face's names, None where there is no tokenizer."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the checkpoint was read, each a sentence."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in layer order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data; raises CheckpointError for a name that is none."""

    def converted(self, name: str, dtype: str) -> np.ndarray:
        """Return a tensor in `dtype`, one of model_config.DTYPES.

        Raises CheckpointError for a name that is none, and where a value is or becomes infinite or NaN.
        """

    def stored_type(self, name: str) -> str:
        """Return the type a tensor is stored in: one of model_config.DTYPES, or the format's name of a quantised one.

        Raises CheckpointError for a name that is none.
        """

    def stored_blocks(self, name: str, bits: int) -> StoredBlocks | None:
        """Return a weight's own blocks of 32 values as codes of `bits` bits, which stand for exactly its values.

        None where it is not stored in such blocks, or in blocks of more bits; always None for formats without them.
        """
