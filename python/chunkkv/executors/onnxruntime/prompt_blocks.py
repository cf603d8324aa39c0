"""How a prompt is cut into blocks, and the graph that appends those whose logits nobody asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunkkv.engine.directory import HIDDEN, NEXT_HIDDEN, PREFILL_BLOCKS_FILES
from chunkkv.executors.cpus import usable_cores
from chunkkv.executors.file_pages import file_pages
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.graphs import GIVING_BACK, OnnxRuntimeStep, bind_arrays, bind_cache, load_graph

_WORTH_IT = 64  # tokens: an end of its own costs a run of the step graph


@dataclass(frozen=True)
class TextBlock:
    """One block of a text that is appended to a cache.

    Parameters
    ----------
    start, stop : int
        Its tokens.
    needs_logits : bool
        Whether its logits and queries are needed, which the step graph gives; else PromptBlocksGraph appends it.
    is_last : bool
        Whether it is the last one that its graph appends.
    """

    start: int
    stop: int
    needs_logits: bool
    is_last: bool


class PromptBlocksGraph:
    """The graph of all blocks of a prompt but the last, which multiplies whole numbers.

    It has one stage or several, each with some of the layers. Its weights stay where the file is mapped into memory, so
    processes share them. Between prompts they are not held.

    Parameters
    ----------
    paths : sequence of Path
        The files of its stages, in order.
    step : OnnxRuntimeStep
        The step graph of the same engine.
    """

    def __init__(self, paths: Sequence[Path], step: OnnxRuntimeStep) -> None:
        threads = _threads_of(step)
        with file_pages(paths[0].parent) as self.weights:
            self.stages = [BlocksStage(path, max(1, threads // len(paths))) for path in paths]
        self.step, self.is_parallel = step, _is_parallel(paths, step)

    def text(self, cache: HostKVCache) -> TextAppender:
        """Return what appends one text to a cache of one row; a context manager, and the cache is filled at its end."""
        return TextAppender(self, cache)


def prompt_blocks_of(engine_dir: Path, step: OnnxRuntimeStep) -> PromptBlocksGraph | None:
    """Return the graph of an engine directory, None where it has none or nothing would become faster.

    A step graph that multiplies whole numbers itself is as fast, unless each stage has a thread. The graph would map
    the same weights a second time.
    """
    stages = [path for path in (engine_dir / name for name in PREFILL_BLOCKS_FILES) if path.is_file()]
    if not stages or (step.multiplies_whole_numbers and not _is_parallel(stages, step)):
        return None
    return PromptBlocksGraph(stages, step)


def _threads_of(step: OnnxRuntimeStep) -> int:
    return step.threads or usable_cores()


def _is_parallel(stages: Sequence[Path], step: OnnxRuntimeStep) -> bool:
    """Return whether there are several stages, and a thread for each."""
    return 1 < len(stages) <= _threads_of(step)


class BlocksStage:
    """One stage of the graph; safe to use from several threads.

    Parameters
    ----------
    path : Path
        Its file.
    threads : int
        Intra-op threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._session = load_graph(path, threads, repacks=False)
        outputs = {value.name: value.shape for value in self._session.get_outputs()}
        self._hidden_size = int(outputs[NEXT_HIDDEN][1]) if NEXT_HIDDEN in outputs else None

    def run(
        self, cache: HostKVCache, inputs: Mapping[str, np.ndarray], hidden: np.ndarray | None, is_last: bool
    ) -> np.ndarray | None:
        """Append a block in the stage's layers; return the hidden states [S,hidden] float32 for the next stage.

        `inputs` are those of the step graph, `hidden` is what the stage before returned, None in the first one. The
        last stage returns None. After the last block of a text the memory that the stage worked in goes back to the
        system.
        """
        binding = bind_cache(self._session, cache)
        bind_arrays(binding, inputs if hidden is None else {**inputs, HIDDEN: hidden}, {})
        found = None
        if self._hidden_size is not None:
            found = np.empty((inputs["input_ids"].shape[1], self._hidden_size), np.float32)
            bind_arrays(binding, {}, {NEXT_HIDDEN: found})
        self._session.run_with_iobinding(binding, GIVING_BACK if is_last else None)
        return found


class TextAppender:
    """Appends the blocks of one text to a cache of one row.

    With several threads the stages work beside each other: while a block is in one stage, the next block is in the one
    before. So a block is complete only when the text ends, and nothing but this object may use the cache until then.
    Threads that split single operators would exchange all that one operator gives to the next, which can take
    longer than the work itself where cores share no cache.

    Parameters
    ----------
    graph : PromptBlocksGraph
        The graph.
    cache : HostKVCache
        The row.
    """

    def __init__(self, graph: PromptBlocksGraph, cache: HostKVCache) -> None:
        self._graph, self._cache = graph, cache
        self._worker = ThreadPoolExecutor(1, "chunkkv-blocks") if graph.is_parallel else None
        self._behind: Future[None] | None = None  # the newest block in the stages behind the first

    def __enter__(self) -> TextAppender:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until no stage writes to the cache any more; raise what went wrong, unless something else did."""
        if self._worker is not None:
            self._worker.shutdown()
        self._graph.weights.release()
        if kind is None:
            self._join()

    def append(self, ids: np.ndarray, slot: int | Sequence[int], position: int, is_last: bool) -> None:
        """Append the tokens ids [S] int64 at slots from `slot` and positions from `position`.

        `slot` is one number for each length class, or one for all of them. `is_last` says that no block of the text
        follows. Raises here or at the end of the text what goes wrong in a stage.
        """
        inputs = self._graph.step.block_inputs(ids, slot, position)
        hidden = self._graph.stages[0].run(self._cache, inputs, None, is_last)
        if self._worker is None:
            self._rest(inputs, hidden, is_last)
            return
        self._join()  # so that of all hidden states only those of one block wait
        self._behind = self._worker.submit(self._rest, inputs, hidden, is_last)

    def _rest(self, inputs: Mapping[str, np.ndarray], hidden: np.ndarray | None, is_last: bool) -> None:
        for stage in self._graph.stages[1:]:
            hidden = stage.run(self._cache, inputs, hidden, is_last)

    def _join(self) -> None:
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.result()


def text_blocks(length: int, block: int, window: int, has_graph: bool) -> list[TextBlock]:
    """Return the blocks in which a text is appended; see block_sizes.

    Where there is a PromptBlocksGraph, the last block of a long text is the window alone, and only it needs logits.
    """
    end = max(window, 1)
    is_parted = has_graph and length >= end + _WORTH_IT
    sizes = [*block_sizes(length - end, block, 0), end] if is_parted else block_sizes(length, block, window)
    stops = np.cumsum(sizes).tolist()
    return [
        TextBlock(
            stop - size, stop, needs_logits=not is_parted or stop == length, is_last=stop in stops[-1 - is_parted :]
        )
        for size, stop in zip(sizes, stops, strict=True)
    ]


def block_sizes(length: int, block: int, window: int) -> list[int]:
    """Split a prompt into prefill blocks of at most `block` tokens, the last with at least min(window, length).

    The scores need the queries of the whole window, and a block returns only its own. Requires window <= block.
    """
    sizes = [block] * (length // block)
    rest = length % block
    if rest:
        sizes.append(rest)
        if len(sizes) > 1 and rest < window:
            sizes[-2:] = [block + rest - window, window]
    return sizes
