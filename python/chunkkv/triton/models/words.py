"""TensorRT-LLM's word lists [2,n] int32: row 0 has the ids of all words, row 1 where each ends, padded with -1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chunkkv.errors import RequestError


def pack(words: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the words' token ids as one list [2,n]; n is at least 1."""
    ids = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    size = max(len(ids), len(ends), 1)
    packed = np.zeros((2, size), np.int32)
    packed[1] = -1
    packed[0, : len(ids)] = ids
    packed[1, : len(ends)] = ends
    return packed


def unpack(array: np.ndarray | None, name: str) -> list[list[int]]:
    """Return the words of a list [2,n] or [1,2,n]; raises RequestError where its ends do not ascend within it."""
    if array is None or array.size == 0:
        return []
    if array.size % 2 or array.ndim < 2 or array.shape[-2] != 2:
        raise RequestError(f"{name} has shape {list(array.shape)}; give [2,n]: ids and ends")
    ids, ends = array.reshape(2, -1).tolist()
    ends = [end for end in ends if end >= 0]
    if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= len(ids)):
        raise RequestError(f"{name} has ends {ends}; they must ascend from 1 to at most {len(ids)}")
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
