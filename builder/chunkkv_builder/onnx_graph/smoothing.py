"""Evens out the channels of what projections multiply, so that one scale for each token suits them all.

A product of whole numbers rounds its inputs to 8 bits with one scale for each token, and a channel that is far larger
than the others leaves few codes to them. So each channel is divided by a scale where it is made, and the columns of the
weights that read it are multiplied by it: the model stays the same, and its graph, too. That takes nothing but other
weights where a channel is made by a number of its own, in the weight of a norm, or in a row of up_proj, which is
multiplied with what comes from gate_proj only afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunkkv_builder.checkpoint.blocks import StoredBlocks
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.checkpoint.tensor_shapes import norm_before_mlp
from chunkkv_builder.onnx_graph.merged_weights import MERGED

# Of a channel beside the root mean square of all: channels that a calibration finds almost silent may speak elsewhere.
SMALLEST_SHARE = 0.1
SMOOTHED_SUFFIX = ".smoothed"  # of a tensor that divides channels, where another graph needs the one that does not


@dataclass(frozen=True)
class SharedInput:
    """An input that projections share, and the tensors by which its channels are scaled.

    Parameters
    ----------
    projection : str
        Name of a projection that reads it, in FusedStepGraph.
    divided : tuple of str
        Tensors that hold one number or row for each channel, and make it.
    multiplied : tuple of str
        Weights that hold one column for each channel, and read it.
    """

    projection: str
    divided: tuple[str, ...]
    multiplied: tuple[str, ...]


def shared_inputs(model: ModelConfig) -> list[SharedInput]:
    """Return the inputs whose channels can be scaled: all but that of o_proj, whose channels are large alike."""
    inputs = []
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        up = (f"{mlp}.up_proj.weight", *([f"{mlp}.up_proj.bias"] if model.mlp_bias else []))
        qkv = tuple(f"{attention}.{piece}_proj.weight" for piece in "qkv")
        inputs += [
            SharedInput(f"{attention}.{MERGED}", (f"{prefix}.input_layernorm.weight",), qkv),
            SharedInput(
                f"{mlp}.gate_proj",
                (norm_before_mlp(model, prefix),),
                (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            ),
            SharedInput(f"{mlp}.down_proj", up, (f"{mlp}.down_proj.weight",)),
        ]
    return inputs


def smoothing_scales(shares: np.ndarray) -> np.ndarray:
    """Return scales float32 [in] for channels with the mean squares `shares` [in], all tokens made equally large.

    A scale is the square root of a channel's root mean square. It leaves half of the channels' differences to the
    inputs and gives half to the weights, which are rounded to as many codes. It is 1 for what is not finite.
    """
    shares = np.where(np.isfinite(shares), shares, 1.0)
    return np.sqrt(np.maximum(np.sqrt(shares), SMALLEST_SHARE)).astype(np.float32)


class SmoothedCheckpoint:
    """A checkpoint with scaled channels, which computes what the given one does; satisfies Checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    scales : mapping
        Scales float32 [in], greater than 0, by SharedInput.projection. Inputs that it lacks stay as they are.
    """

    def __init__(self, checkpoint: Checkpoint, scales: Mapping[str, np.ndarray]) -> None:
        self._checkpoint = checkpoint
        self._divisors: dict[str, np.ndarray] = {}
        self._factors: dict[str, np.ndarray] = {}
        for shared in shared_inputs(checkpoint.config):
            if shared.projection in scales:
                self._divisors |= dict.fromkeys(shared.divided, scales[shared.projection])
                self._factors |= dict.fromkeys(shared.multiplied, scales[shared.projection])

    @property
    def path(self) -> Path:
        """The given checkpoint's."""
        return self._checkpoint.path

    @property
    def config(self) -> ModelConfig:
        """The given checkpoint's."""
        return self._checkpoint.config

    @property
    def tokenizer_dir(self) -> Path | None:
        """The given checkpoint's."""
        return self._checkpoint.tokenizer_dir

    @property
    def notes(self) -> tuple[str, ...]:
        """The given checkpoint's."""
        return self._checkpoint.notes

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in layer order."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, as Checkpoint does."""
        return self._checkpoint.shape(name)

    def stored_type(self, name: str) -> str:
        """Return the type of a tensor in the given checkpoint."""
        return self._checkpoint.stored_type(name)

    def stored_blocks(self, name: str, bits: int) -> StoredBlocks | None:
        """Return a weight's own blocks, as Checkpoint does; None for a scaled one, whose values no block holds."""
        if name in self._divisors or name in self._factors:
            return None
        return self._checkpoint.stored_blocks(name, bits)

    def converted(self, name: str, dtype: str) -> np.ndarray:
        """Return a tensor in `dtype`, scaled; raises as Checkpoint does."""
        tensor = self._checkpoint.converted(name, dtype)
        if name in self._factors:
            tensor = tensor * self._factors[name]
        if name in self._divisors:
            tensor = tensor / self._divisors[name].reshape(-1, *[1] * (tensor.ndim - 1))
        return tensor.astype(dtype, copy=False)
