"""What ChunkKV keeps of one prompt, and why: prefill alone, with the choice of every layer-reuse group."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np

from chunkkv import reference
from chunkkv.cache_layout import CacheLayout
from chunkkv.errors import EngineMismatchError
from chunkkv.executors.interface import Choice, Executor, KVCache, PrefillProgress
from chunkkv.requests import Request
from chunkkv.results import GroupChoice, Inspection
from chunkkv.sampling import check_finite
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer


def check_inspects(settings: ChunkKVSettings | None) -> ChunkKVSettings:
    """Return the settings; raises EngineMismatchError for an engine without ChunkKV."""
    if settings is None:
        raise EngineMismatchError(
            "this engine was built without ChunkKV, so there is no choice to show: build with --chunkkv"
        )
    return settings


def inspect_prompt(
    executor: Executor[KVCache],
    settings: ChunkKVSettings,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    request: Request,
    progress: PrefillProgress,
    scorer: str,
) -> Inspection:
    """Prefill one prompt and return what every group keeps; see ChunkKVSession.inspect."""
    if not executor.capabilities.reports_choice and request.kept_tokens < len(request.ids):
        raise EngineMismatchError(
            "this engine does not tell which tokens it keeps: inspect one built from the same checkpoint with "
            "--backend onnxruntime"
        )
    cache = executor.new_cache(1, executor.capacity_for(request.class_lengths))
    prefilled = executor.prefiller().run([request], cache, threading.Event(), progress)[0]
    assert prefilled.logits is not None  # nothing cancels it
    check_finite(prefilled.logits)
    flags = None
    if settings.boundaries == "delimiter" and tokenizer is not None:
        flags = tokenizer.delimiter_token_table(vocab_size=vocab_size)[request.ids]
    texts = [tokenizer.token_text(int(i)) if tokenizer else str(i) for i in request.ids]
    return Inspection(
        tokens=tuple(texts),
        token_ids=tuple(int(i) for i in request.ids),
        kept_tokens=request.kept_tokens,
        settings=settings,
        groups=tuple(_choices(settings, executor.cache_layout, len(request.ids), flags, prefilled.choice)),
        scorer=scorer,
    )


def _choices(
    settings: ChunkKVSettings, layout: CacheLayout, length: int, flags: np.ndarray | None, choice: Choice | None
) -> Iterator[GroupChoice]:
    """Yield every choice: of each group, or of each class of its heads, or of each head that chooses for itself."""
    nothing = np.zeros(length, np.float32)
    starts = np.zeros(0, np.int64) if choice is None else reference.chunk_starts(length, settings, flags)
    for group in settings.layer_groups:
        leader = settings.leader_of(group)
        for number in layout.of_layer(leader):
            part = layout.parts[number]
            made = partial(GroupChoice, group, leader, head_class=part.head_class)
            if choice is None:  # the whole prompt is kept, so nothing was scored
                every = np.arange(length, dtype=np.int32)
                yield made(every, nothing, starts, kv_heads=part.kv_heads)
                continue
            scores = choice.token_scores.get(number)
            kept = choice.kept_indices[number][..., : choice.kept_lengths[part.length_class]]  # padding stands behind
            chunks = starts if scores is not None else np.zeros(0, np.int64)
            if kept.ndim == 1:
                yield made(kept, nothing if scores is None else scores, chunks, kv_heads=part.kv_heads)
                continue
            for place, head in enumerate(part.kv_heads):
                yield made(kept[place], nothing if scores is None else scores[place], chunks, kv_heads=(head,))
