"""Going on with a filled row on ONNX Runtime: the step graph appends blocks, the compress graph compresses a text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from chunkkv import profiling
from chunkkv.cache_layout import Slots
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.interface import CancelSignal, PrefillProgress, PrefillResult, no_progress
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeStep
from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefiller
from chunkkv.requests import Request


class OnnxRuntimeContinuer:
    """Appends texts to rows of caches in host memory; see Continuer.

    Parameters
    ----------
    step : OnnxRuntimeStep
        The graph that appends a block.
    prefiller : OnnxRuntimePrefiller
        Cuts a text into blocks, appends those that are not asked for, and compresses it.
    block : int
        The largest block, in tokens.
    """

    def __init__(self, step: OnnxRuntimeStep, prefiller: OnnxRuntimePrefiller, block: int) -> None:
        self.block = block
        self._step, self._prefiller = step, prefiller

    def copy(self, source: HostKVCache, slots: Sequence[int], out: HostKVCache) -> None:
        """Copy the filled slots of `source` to the first slots of `out`."""
        start = self._step.layout.slots(0)
        _copy_slots(source, start, slots, out, start)

    def append(self, cache: HostKVCache, ids: np.ndarray, slots: Sequence[int], position: int) -> np.ndarray:
        """Append the tokens ids [S] int64 and return the logits [vocab] after the last; see Continuer.append."""
        return self._step.append_block(cache, ids, slots, position)[0]

    def extend(
        self,
        cache: HostKVCache,
        slots: Sequence[int],
        position: int,
        request: Request,
        cancel: CancelSignal,
        progress: PrefillProgress = no_progress,
    ) -> PrefillResult:
        """Append a text and keep a part of it; see Continuer.extend."""
        started, length = time.perf_counter(), len(request.ids)
        compresses, total = request.kept_tokens < length, request.read_tokens
        row = cache
        if compresses:  # all keys of the text are needed at once, before some of them go
            longest = max((len(piece.ids) for piece in request.reread), default=0)
            row = self._step.new_cache(1, _plus(slots, length + longest))
            self.copy(cache, slots, row)
        logits: np.ndarray | None = None
        queries: dict[int, np.ndarray] = {}
        done = 0
        with profiling.range_of("prefill", (request,)):
            without_logits, with_logits = self._prefiller.text_blocks(length)
            for done in self._prefiller.append_without_logits(row, request.ids, without_logits, slots, position):
                progress(done, total)
                if cancel.is_set():
                    return PrefillResult(None)
            for block in with_logits:
                if cancel.is_set():
                    return PrefillResult(None)
                ids = request.ids[block.start : block.stop]
                logits, queries = self._step.append_block(row, ids, _plus(slots, block.start), position + block.start)
                done = block.stop
                progress(done, total)
            scores: dict[int, np.ndarray] = {}
            if request.reread:
                scores = self._prefiller.reread.no_scores(length)
                for size in self._prefiller.reread.read(row, length, request.reread, scores, slots, position):
                    if cancel.is_set():
                        return PrefillResult(None)
                    done += size
                    progress(done, total)
        prefill_s, whole = time.perf_counter() - started, self._step.layout.slots(length)
        if not compresses:
            return PrefillResult(logits, prefill_s=prefill_s, kept_lengths=whole)
        started, start = time.perf_counter(), self._step.layout.slots(0)
        text, out = self._step.new_cache(1, length), self._step.new_cache(1, request.class_lengths)
        _copy_slots(row, slots, whole, text, start)
        with profiling.range_of("compress", (request,)):
            budget = request.keep_per_10k, request.budget_tokens
            if scores:
                choice = self._prefiller.compress_scored(text, scores, request.ids, *budget, out, is_spent=True)
            else:
                choice = self._prefiller.compress(text, queries, request.ids, *budget, out, is_spent=True)
        _copy_slots(out, start, choice.kept_lengths, cache, slots)
        scratch = row.nbytes + text.nbytes + out.nbytes
        seconds = time.perf_counter() - started
        return PrefillResult(logits, choice, prefill_s, seconds, scratch, choice.kept_lengths)

    def to_host(self, cache: HostKVCache, slots: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the filled slots as arrays [H,N,D]; see Continuer.to_host."""
        return {
            f"{kind}.{number}": array[0, :, : slots[part.length_class]]
            for number, part in enumerate(self._step.layout.parts)
            for kind, array in (("key", cache.keys[number]), ("value", cache.values[number]))
        }

    def from_host(self, arrays: Mapping[str, np.ndarray], cache: HostKVCache) -> None:
        """Write arrays as `to_host` returns them to the first slots of `cache`."""
        for kind, parts in (("key", cache.keys), ("value", cache.values)):
            for number, target in enumerate(parts):
                source = arrays[f"{kind}.{number}"]
                target[0, :, : source.shape[1]] = source

    def host_layout(self, slots: Sequence[int]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return type and shape of the arrays that `to_host` returns; see Continuer.host_layout."""
        layout, head_dim = self._step.layout, self._step.head_dim
        shapes = [(len(part.kv_heads), slots[part.length_class], head_dim) for part in layout.parts]
        dtype = self._step.cache_dtype
        return {f"{kind}.{part}": (dtype, shape) for part, shape in enumerate(shapes) for kind in ("key", "value")}


def _plus(slots: Sequence[int], tokens: int) -> Slots:
    return tuple(count + tokens for count in slots)


def _copy_slots(
    source: HostKVCache, first: Sequence[int], counts: Sequence[int], out: HostKVCache, place: Sequence[int]
) -> None:
    """Copy `counts` slots from `first` of `source` to `place` of `out`, one number of each for each length class."""
    for arrays, targets in ((source.keys, out.keys), (source.values, out.values)):
        for part, array, target in zip(source.layout.parts, arrays, targets, strict=True):
            start, count, to = (numbers[part.length_class] for numbers in (first, counts, place))
            target[:, :, to : to + count] = array[:, :, start : start + count]
