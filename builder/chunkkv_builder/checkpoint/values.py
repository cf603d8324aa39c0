"""What every reader of checkpoints does with a tensor's values."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 - makes NumPy know "bfloat16"
import numpy as np

from chunkkv.errors import CheckpointError


def converted(values: np.ndarray, dtype: str, name: str, file: Path) -> np.ndarray:
    """Return `values`, tensor `name` of `file`, as `dtype`.

    Raises CheckpointError where a value is, or becomes, infinite or NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.asarray(values).astype(np.dtype(dtype), copy=False)
    if not np.isfinite(result).all():
        raise CheckpointError(
            f"{file}: tensor {name!r} has a value that is not finite in {dtype}; every answer would be lost to it: "
            "download the file again or choose a wider dtype"
        )
    return result
