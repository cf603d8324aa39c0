"""Hypothesis strategies for op inputs beyond the table of support/op_cases.py.

In a file of their own: importing hypothesis would nearly double the start of native/probe.py, of which every
planted bug, order and race check is a run of its own.
"""

from __future__ import annotations

from hypothesis import strategies as st

from chunkkv.settings import ChunkKVSettings
from support.op_cases import OpCase


@st.composite
def op_settings(draw: st.DrawFn) -> ChunkKVSettings:
    """Draw valid settings small enough that every branch is reached with short prompts."""
    window, chunk_size, sinks = draw(st.integers(1, 8)), draw(st.integers(1, 7)), draw(st.integers(0, 5))
    score = draw(st.sampled_from(("softmax", "softmax", "softmax", "logits", "given")))
    of_weights = {"window_reduce": ("mean", "max"), "head_reduce": ("mean", "max"), "value_norm": ("off", "on")}
    words = {name: draw(st.sampled_from(words)) for name, words in of_weights.items() if score == "softmax"}
    return ChunkKVSettings(
        window=window,
        chunk_size=chunk_size,
        sinks=sinks,
        min_tokens=window + chunk_size + sinks + draw(st.integers(0, 4)),
        keep_per_10k=draw(st.integers(1, 10_000)),
        pooling=draw(st.sampled_from((1, 3, 5))),
        score=score,
        boundaries=draw(st.sampled_from(("fixed", "delimiter"))),
        heads=draw(st.sampled_from(("shared", "each"))),
        **words,
    )


@st.composite
def op_cases(draw: st.DrawFn) -> OpCase:
    """Draw a whole case: settings, heads, a ragged batch and per-row budgets."""
    settings = draw(op_settings())
    lengths = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=4)))
    rows = len(lengths)
    kv_heads = draw(st.integers(1, 3))
    ratios = st.tuples(*[st.integers(1, 10_000)] * rows)
    budgets = st.tuples(*[st.one_of(st.just(0), st.integers(settings.min_tokens, 60 + settings.min_tokens))] * rows)
    return OpCase(
        name="drawn",
        settings=settings,
        lengths=lengths,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        keep_per_10k=draw(st.none() | ratios),
        budget_tokens=draw(st.none() | budgets),
        extra_padding=draw(st.integers(0, 5)),
        delimiter_rate=draw(st.sampled_from((0.0, 0.2, 0.6, 1.0))),
        contrast=draw(st.sampled_from((0.1, 2.0, 6.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
        window=draw(st.none() | st.tuples(*[st.integers(1, settings.window)] * rows)),
    )
