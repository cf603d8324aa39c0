"""Section 8 of docs/method.md for implementations that take a window per row and choices per head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from support.op_cases import OpCase
from support.op_properties import PADDING_CONTENTS, Check, Select, assert_same_bits, differs_near_cut, kept_sets, run


def check_whole_window(select: Select, case: OpCase) -> int:
    """A window as long as the engine's is what an engine without windows of requests computes, bit for bit."""
    inputs = replace(case.inputs(), window=None)
    whole = replace(inputs, window=np.full(len(case.lengths), case.settings.window, dtype=np.int32))
    assert_same_bits(run(select, inputs, case.settings), run(select, whole, case.settings))
    return 0


def check_unseen_queries(select: Select, case: OpCase) -> int:
    """What stands in the queries before the last w never changes a bit of the result."""
    inputs = case.inputs()
    windows = np.array([1 + row % case.settings.window for row in range(len(case.lengths))], dtype=np.int32)
    plain = run(select, replace(inputs, window=windows), case.settings)
    for content in PADDING_CONTENTS:
        query = inputs.query.copy()
        for row, window in enumerate(windows):
            query[row, :, : case.settings.window - window] = content
        assert_same_bits(plain, run(select, replace(inputs, query=query, window=windows), case.settings))
    return 0


def check_equal_heads(select: Select, case: OpCase) -> int:
    """Where all heads are equal, each for itself keeps what they keep together."""
    inputs = case.inputs()
    group = case.heads // case.kv_heads
    alike = replace(
        inputs,
        query=np.tile(inputs.query[:, :group], (1, case.kv_heads, 1, 1)),
        key=np.repeat(inputs.key[:, :1], case.kv_heads, axis=1),
        value=None if inputs.value is None else np.repeat(inputs.value[:, :1], case.kv_heads, axis=1),
    )
    given = inputs.scores
    if given is not None and given.ndim == 3:
        given = given[:, 0]
    shared, each = (replace(case.settings, heads=heads) for heads in ("shared", "each"))
    of_each = None if given is None else np.repeat(given[:, None], case.kv_heads, axis=1)
    indices, lengths, scores = run(select, replace(alike, scores=given), shared)
    own, own_lengths, _ = run(select, replace(alike, scores=of_each), each)
    excused = 0
    for place, kept in enumerate(kept_sets(own, own_lengths)):
        row = place // case.kv_heads
        length = case.lengths[row]
        flags = None if inputs.is_delimiter is None else inputs.is_delimiter[row, :length]
        excused += differs_near_cut(kept, indices[row, : lengths[row]], scores[row], length, case.settings, flags)
    return excused


CHOICE_PROPERTIES: tuple[Check, ...] = (check_whole_window, check_unseen_queries, check_equal_heads)
