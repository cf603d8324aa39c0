"""Prefill in blocks over a full cache, then compress once: for engines whose graphs do one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

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
        for block in self.text_blocks(len(ids)):
            tokens, place = ids[block.start : block.stop], filled + block.start
            made = None
            if block.needs_logits:
                made = self._step.append_prompt_block(cache, tokens, place, block.is_last)
            else:
                self.append_without_logits(cache, tokens, place, place, block.is_last)
            progress(block.stop, len(ids))
            yield made

    def text_blocks(self, length: int) -> list[TextBlock]:
        """Return the blocks in which a text of `length` tokens is appended."""
        return text_blocks(length, self._block, self._window, self._prompt_blocks is not None)

    def append_without_logits(
        self, cache: HostKVCache, ids: np.ndarray, slot: int | Sequence[int], position: int, is_last: bool
    ) -> None:
        """Append a block of `text_blocks` that needs no logits; see PromptBlocksGraph.append."""
        assert self._prompt_blocks is not None, "without that graph every block needs its logits"
        self._prompt_blocks.append(cache, ids, slot, position, is_last)

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
        self._progress, self._prefill_s, self._total = progress, 0.0, request.read_tokens
        self.tokens_left = self._total
        self._scores: dict[int, np.ndarray] = {}
        self._blocks = self._read()

    def _read(self) -> Generator[None, None, None]:
        """Run the prompt and then its second reading, a block per item."""
        request, cache = self._request, self._cache
        for made in self._prefiller.blocks(request.ids, cache, self._count):
            if made is not None:
                self._logits, self._queries = made
            yield
        if request.reread:
            reread, length = self._prefiller.reread, len(request.ids)
            self._scores = reread.no_scores(length)
            for size in reread.read(cache, length, request.reread, self._scores):
                self._count(self._total - self.tokens_left + size, self._total)
                yield

    def _count(self, done: int, total: int) -> None:
        """Take the tokens that were run; `total` counts those of one reading."""
        self.tokens_left = self._total - done
        self._progress(done, self._total)

    def step(self) -> list[PrefillResult] | None:
        """Run the next block, or after the last one the compression."""
        if not self.tokens_left:
            return [self._compress()]
        started = time.perf_counter()
        with profiling.range_of("prefill", (self._request,)):
            next(self._blocks)
        self._prefill_s += time.perf_counter() - started
        if not self.tokens_left:
            self._blocks.close()  # else it keeps this run, and with it the whole cache, until Python looks for cycles
        if self.tokens_left or self._compressed is not None:
            return None
        return [PrefillResult(self._logits, prefill_s=self._prefill_s)]

    def _compress(self) -> PrefillResult:
        assert self._compressed is not None, "a run that compresses nothing ends with its last block"
        started, request = time.perf_counter(), self._request
        rest = request.ids, request.keep_per_10k, request.budget_tokens, self._compressed
        with profiling.range_of("compress", (request,)):
            if self._scores:
                choice = self._prefiller.compress_scored(self._cache, self._scores, *rest, is_spent=True)
            else:
                choice = self._prefiller.compress(self._cache, self._queries, *rest, request.window, is_spent=True)
        seconds = time.perf_counter() - started
        scratch, lengths = self._cache.nbytes, choice.kept_lengths
        return PrefillResult(self._logits, choice, self._prefill_s, seconds, scratch, lengths)
