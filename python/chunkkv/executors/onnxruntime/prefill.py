"""Prefill in blocks over a full cache, then compress once: for engines whose graphs do one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkkv import profiling
from chunkkv.errors import EngineMismatchError
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.interface import CancelSignal, Choice, Prefiller, PrefillProgress, PrefillResult, no_progress
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeCompress, OnnxRuntimeStep
from chunkkv.executors.onnxruntime.prompt_blocks import PromptBlocksGraph, TextBlock, text_blocks
from chunkkv.executors.onnxruntime.rereading import OnnxRuntimeReread
from chunkkv.requests import Request
from chunkkv.rereading import Piece


class OnnxRuntimePrefiller(Prefiller[HostKVCache]):
    """Prefills one prompt at a time in blocks; the full cache is reused between prompts of one length.

    Parameters
    ----------
    step : OnnxRuntimeStep
        The graph that appends a block.
    compress_graph : OnnxRuntimeCompress or None
        The graph that compresses; None for an engine without ChunkKV.
    block : int
        The largest block, in tokens.
    window : int
        The observation window in tokens, at most `block`: the last block of a prompt holds at least as many.
    reread : callable
        Returns what scores by a second reading; called where a request asks for it.
    prompt_blocks : PromptBlocksGraph or None, default None
        Appends all blocks of a prompt but the last; None leaves them to `step`.
    """

    max_rows = 1

    def __init__(
        self,
        step: OnnxRuntimeStep,
        compress_graph: OnnxRuntimeCompress | None,
        block: int,
        window: int,
        reread: Callable[[], OnnxRuntimeReread],
        prompt_blocks: PromptBlocksGraph | None = None,
    ) -> None:
        self._step, self._compress_graph, self._block, self._window = step, compress_graph, block, window
        self._reread, self._prompt_blocks = reread, prompt_blocks
        self._full: HostKVCache | None = None

    def start(
        self, requests: Sequence[Request], out: HostKVCache, progress: PrefillProgress = no_progress
    ) -> OnnxRuntimePrefillRun:
        """Return the prefill of the one prompt in `requests`, a block per step and then compression as a step.

        A second reading comes between them. A prompt of which every token stays is written straight to `out`.
        """
        (request,) = requests
        length = len(request.ids)
        if request.kept_tokens == length:
            return OnnxRuntimePrefillRun(self, request, out, None, progress)
        needed = length + max((len(piece.ids) for piece in request.reread), default=0)
        if self._full is None or max(self._full.capacity) != needed:
            self._full = None  # frees the old one before the new one is allocated
            self._full = self.new_cache(1, needed)
        return OnnxRuntimePrefillRun(self, request, self._full, out, progress)

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> HostKVCache:
        """Return an empty cache of `rows` rows; `capacity` slots each, or one number for each length class."""
        return self._step.new_cache(rows, capacity)

    def fill(
        self, ids: np.ndarray, cache: HostKVCache, cancel: CancelSignal, *, filled: int = 0
    ) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """Write the keys and values of a whole prompt to a cache of one row; see BlockwisePrefiller.fill."""
        logits: np.ndarray | None = None
        queries: dict[int, np.ndarray] = {}
        blocks = self.blocks(ids, cache, filled=filled)
        while not cancel.is_set():
            try:
                made = next(blocks)
            except StopIteration:
                return logits, queries
            if made is not None:
                logits, queries = made
        return None, {}

    def blocks(
        self, ids: np.ndarray, cache: HostKVCache, progress: PrefillProgress = no_progress, filled: int = 0
    ) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray]] | None]:
        """Append a prompt to a cache of one row, a block per item: its last logits and its window's queries.

        The first `filled` slots hold what stands before `ids`. Blocks before the last may give nothing.
        """
        without_logits, with_logits = self.text_blocks(len(ids))
        for stop in self.append_without_logits(cache, ids, without_logits, self._step.layout.slots(filled), filled):
            progress(stop, len(ids))
            yield None
        for block in with_logits:
            tokens, place = ids[block.start : block.stop], filled + block.start
            made = self._step.append_prompt_block(cache, tokens, place, block.is_last)
            progress(block.stop, len(ids))
            yield made

    def text_blocks(self, length: int) -> tuple[list[TextBlock], list[TextBlock]]:
        """Return the blocks in which a text of `length` tokens is appended: those without logits, and those with."""
        blocks = text_blocks(length, self._block, self._window, self._prompt_blocks is not None)
        first = next(number for number, block in enumerate(blocks) if block.needs_logits)
        return blocks[:first], blocks[first:]

    def append_without_logits(
        self, cache: HostKVCache, ids: np.ndarray, blocks: Sequence[TextBlock], slots: Sequence[int], position: int
    ) -> Iterator[int]:
        """Append the blocks of a text that need no logits, one per item: the tokens of the text up to its end.

        The text ids [S] begins at `slots`, a number for each length class, and at `position`. Nothing else may use the
        cache before the iterator has ended or was closed.
        """
        if not blocks:
            return
        assert self._prompt_blocks is not None, "without that graph every block needs its logits"
        with self._prompt_blocks.text(cache) as text:
            for block in blocks:
                place = [count + block.start for count in slots]
                text.append(ids[block.start : block.stop], place, position + block.start, block.is_last)
                yield block.stop

    def compress(
        self,
        full: HostKVCache,
        queries: Mapping[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: HostKVCache,
        window: int = 0,
        is_spent: bool = False,
    ) -> Choice:
        """Choose what one row keeps and copy it to `out`; raises EngineMismatchError for an engine without ChunkKV.

        With `is_spent` the memory of `full` is given back, and its contents become meaningless.
        """
        if self._compress_graph is None:
            raise EngineMismatchError("this engine was built without ChunkKV and cannot compress: build with --chunkkv")
        if self._compress_graph.takes_scores:
            raise EngineMismatchError("this engine was built with score 'given' and needs scorer 'reread'")
        return self._compress_graph.run(full, queries, ids, keep_per_10k, budget_tokens, out, window, is_spent)

    def reread_scores(self, full: HostKVCache, length: int, pieces: Sequence[Piece]) -> dict[int, np.ndarray]:
        """Return what the tokens of a prompt receive from a second reading; see BlockwisePrefiller.reread_scores."""
        scores = self.reread.no_scores(length)
        for _ in self.reread.read(full, length, pieces, scores):
            pass
        return scores

    def compress_scored(
        self,
        full: HostKVCache,
        scores: dict[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: HostKVCache,
        is_spent: bool = False,
    ) -> Choice:
        """Choose by the scores of a second reading, as `reread_scores` gives them; else as `compress`."""
        given = self.reread.for_compress(scores, max(full.capacity))
        return self.reread.compress.run(full, given, ids, keep_per_10k, budget_tokens, out, is_spent=is_spent)

    @property
    def reread(self) -> OnnxRuntimeReread:
        """What scores by a second reading."""
        return self._reread()


class OnnxRuntimePrefillRun:
    """The prefill of one prompt, a block per step; see PrefillRun.

    Parameters
    ----------
    prefiller : OnnxRuntimePrefiller
        Runs the graphs.
    request : Request
        The prompt.
    cache : HostKVCache
        One row for the whole prompt.
    compressed : HostKVCache or None
        One row for what compression keeps; None keeps every token in `cache`.
    progress : PrefillProgress
        Is told after each block.
    """

    def __init__(
        self,
        prefiller: OnnxRuntimePrefiller,
        request: Request,
        cache: HostKVCache,
        compressed: HostKVCache | None,
        progress: PrefillProgress,
    ) -> None:
        self._prefiller, self._request, self._cache, self._compressed = prefiller, request, cache, compressed
        self._prefill_s, self._state = 0.0, _PromptState(request.read_tokens, request.read_tokens, progress)
        # It must not hold this run: dropping the run closes it, and with that ends what still writes to the cache.
        self._blocks = _read(prefiller, request, cache, self._state)

    @property
    def tokens_left(self) -> int:
        """See PrefillRun."""
        return self._state.tokens_left

    def step(self) -> list[PrefillResult] | None:
        """Run the next block, or after the last one the compression."""
        if not self.tokens_left:
            return [self._compress()]
        started = time.perf_counter()
        with profiling.range_of("prefill", (self._request,)):
            next(self._blocks)
        self._prefill_s += time.perf_counter() - started
        if self.tokens_left or self._compressed is not None:
            return None
        return [PrefillResult(self._state.logits, prefill_s=self._prefill_s)]

    def _compress(self) -> PrefillResult:
        assert self._compressed is not None, "a run that compresses nothing ends with its last block"
        started, request, state = time.perf_counter(), self._request, self._state
        rest = request.ids, request.keep_per_10k, request.budget_tokens, self._compressed
        with profiling.range_of("compress", (request,)):
            if state.scores:
                choice = self._prefiller.compress_scored(self._cache, state.scores, *rest, is_spent=True)
            else:
                choice = self._prefiller.compress(self._cache, state.queries, *rest, request.window, is_spent=True)
        seconds = time.perf_counter() - started
        scratch, lengths = self._cache.nbytes, choice.kept_lengths
        return PrefillResult(state.logits, choice, self._prefill_s, seconds, scratch, lengths)


@dataclass
class _PromptState:
    """What the prefill of one prompt has made so far.

    Parameters
    ----------
    total, tokens_left : int
        Tokens that are read altogether, and of them those that no block has run yet.
    progress : PrefillProgress
        Is told after each block.
    logits : array [vocab] or None, default None
        Behind the prompt's last token.
    queries, scores : dict of arrays, default {}
        The window's queries of each part, and what a second reading gives its tokens; empty before they are there.
    """

    total: int
    tokens_left: int
    progress: PrefillProgress
    logits: np.ndarray | None = None
    queries: dict[int, np.ndarray] = field(default_factory=dict)
    scores: dict[int, np.ndarray] = field(default_factory=dict)

    def count(self, done: int, total: int) -> None:
        """Take the tokens that were run, of all readings together; `total` counts those of one reading."""
        self.tokens_left = self.total - done
        self.progress(done, self.total)


def _read(prefiller: OnnxRuntimePrefiller, request: Request, cache: HostKVCache, state: _PromptState) -> Iterator[None]:
    """Run the prompt and then its second reading, a block per item."""
    for given in prefiller.blocks(request.ids, cache, state.count):
        if given is not None:
            state.logits, state.queries = given
        yield
    if request.reread:
        reread, length = prefiller.reread, len(request.ids)
        state.scores = reread.no_scores(length)
        for size in reread.read(cache, length, request.reread, state.scores):
            state.count(state.total - state.tokens_left + size, state.total)
            yield
