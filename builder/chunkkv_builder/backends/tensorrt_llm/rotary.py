"""The rotary table of a model whose context is stretched beyond the positions of its own table."""

from __future__ import annotations

from typing import Any

import numpy as np

from chunkkv.errors import ConfigError

TABLE, FREQUENCIES = "embed_positions_for_gpt_attention", "rotary_inv_freq"  # parameters of a model in TensorRT-LLM
_TOLERANCE = 1e-4


def stretched_table(model: Any, positions: int) -> np.ndarray | None:
    """Return a rotary table with a row for each of `positions`; None where the model's own suffices, or it has none.

    TensorRT-LLM's table ends at max_position_embeddings; its kernels compute what lies behind. ChunkKVRope reads a
    table only, so the missing rows are computed here, by the same frequencies.

    Parameters
    ----------
    model : tensorrt_llm PretrainedModel
        The model of a rank.
    positions : int
        The engine's max_seq_len.

    Returns
    -------
    float32 array [1, positions * rotary_dim] or None
        For each position cosine and sine of every frequency in turn, as TensorRT-LLM has them.

    Raises
    ------
    ConfigError
        Where the model's own table is not made of its frequencies.
    """
    parameters = dict(model.named_parameters())
    if TABLE not in parameters or FREQUENCIES not in parameters:
        return None
    own = np.asarray(parameters[TABLE].raw_value, np.float32)
    frequencies = np.asarray(parameters[FREQUENCIES].raw_value, np.float32).reshape(-1)
    rows = own.size // (2 * frequencies.size)
    if rows >= positions:
        return None
    amplitude = own.reshape(-1)[0]  # the cosine of position 0: 1, or YaRN's factor of attention
    last = own.reshape(rows, -1)[-1]
    if not np.allclose(_rows(rows - 1, rows, frequencies, amplitude), last, atol=_TOLERANCE * abs(amplitude)):
        raise ConfigError(
            f"max_seq_len is {positions}, beyond the {rows} positions of the rotary table, and this model's table is "
            f"not made of its {FREQUENCIES}: give --max_seq_len {rows} or less"
        )
    return np.concatenate([own.reshape(1, -1), _rows(rows, positions, frequencies, amplitude)], axis=1)


def _rows(first: int, end: int, frequencies: np.ndarray, amplitude: np.float32) -> np.ndarray:
    """Return the table's part [1, n] of the positions from `first` to before `end`."""
    angles = np.arange(first, end, dtype=np.float32)[:, None] * frequencies
    return (np.stack([np.cos(angles), np.sin(angles)], axis=-1) * amplitude).astype(np.float32).reshape(1, -1)
