"""Scores of the library beside those of the reference, for one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.op_cases import OpCase, OpInputs

from chunkkv import reference
from chunkkv.native import BatchRows, Chunks
from native.native_op import NativeOp, dequantize, quantize

TOLERANCE = 1e-5  # of docs/method.md: closer scores may be ranked either way


def seen_keys(op: NativeOp, key: NDArray[Any]) -> NDArray[Any]:
    """Return the keys that the scores of `op` are about: as given, or as the cache holds them."""
    return key if op.key_storage is None else dequantize(quantize(key, op.key_storage))


def expected_scores(op: NativeOp, case: OpCase, inputs: OpInputs, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the reference's token scores and chunk means of one row."""
    length, settings = case.lengths[row], case.settings
    key = seen_keys(op, inputs.key[row, :, :length])
    options = settings.window, settings.pooling, settings.score
    tokens = reference.token_scores(inputs.query[row], key, *options, head_reduce=settings.head_reduce)
    flags = None if inputs.is_delimiter is None else inputs.is_delimiter[row, :length]
    starts = reference.chunk_starts(length, settings, flags)
    return tokens, reference.chunk_scores(tokens, starts, length - settings.window)


def largest_error(op: NativeOp, case: OpCase, storage: str, chunks_alone: bool) -> float:
    """Return the largest relative error of a chunk's score, and of a token's where the call gives them."""
    inputs = case.inputs(storage)
    rows = BatchRows(op.memory.put(inputs.lengths), inputs.key.shape[2])
    chunks = None
    if inputs.is_delimiter is not None:
        chunks = op.chunks(inputs.is_delimiter, rows, case.settings)
    chunk_scores, token_scores = op.score(inputs.query, inputs.key, rows, case.settings, chunks, not chunks_alone)
    given, worst = op.memory.get(chunk_scores), 0.0
    for row, length in enumerate(case.lengths):
        if token_scores is None and case.settings.kept_tokens(length) == length:
            continue  # kept whole: nobody reads its scores, and the library skips it
        tokens, means = expected_scores(op, case, inputs, row)
        worst = max(worst, _relative(given[row, : len(means)], means, case.settings.score))
        if token_scores is not None:
            own = op.memory.get(token_scores)[row]
            worst = max(worst, _relative(own[:length], tokens, case.settings.score))
            assert not own[length - case.settings.window :].any(), "scores behind the ranked tokens are not zero"
    return worst


def _relative(given: NDArray[Any], expected: NDArray[Any], score: str) -> float:
    assert np.isfinite(given).all()
    scale = np.abs(expected).max() if score == "logits" else np.maximum(np.abs(expected), 1e-3 * np.abs(expected).max())
    difference = np.abs(given.astype(np.float64) - expected)
    return float((difference / np.where(expected == 0, np.inf, scale)).max(initial=0.0))


def bits_of_scores(op: NativeOp, inputs: OpInputs, case: OpCase, chunks_alone: bool) -> list[bytes]:
    """Return the bits of every row's chunk scores, and of its token scores where the call gives them."""
    rows = BatchRows(op.memory.put(inputs.lengths), inputs.key.shape[2])
    chunks: Chunks | None = None
    if inputs.is_delimiter is not None:
        chunks = op.chunks(inputs.is_delimiter, rows, case.settings)
    scores, tokens = op.score(inputs.query, inputs.key, rows, case.settings, chunks, not chunks_alone)
    content = [op.memory.get(scores)] + ([] if tokens is None else [op.memory.get(tokens)])
    return [b"".join(part[row].tobytes() for part in content) for row in range(len(inputs.lengths))]
