"""How a prompt is cut into blocks, and the graph that appends those whose logits nobody asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    """The graph of all blocks of a prompt but the last: it multiplies in fewer bits than the step graph.

    Its weights stay where the file is mapped into memory, so processes share them. Between prompts they are not held.

    Parameters
    ----------
    path : Path
        The graph's file.
    step : OnnxRuntimeStep
        The step graph of the same engine.
    """

    def __init__(self, path: Path, step: OnnxRuntimeStep) -> None:
        with file_pages(path.parent) as self._weights:
            self._session = load_graph(path, step.threads, repacks=False)
        self._step = step

    def append(
        self, cache: HostKVCache, ids: np.ndarray, slot: int | Sequence[int], position: int, is_last: bool
    ) -> None:
        """Append the tokens ids [S] int64 of one row at slots from `slot` and positions from `position`.

        `slot` is one number for each length class, or one for all of them. After the last block of a text the memory
        that the graph worked in goes back to the system, and that of its weights to the system's cache of files.
        """
        binding = bind_cache(self._session, cache)
        inputs = self._step.block_inputs(ids, slot, position)
        bind_arrays(binding, inputs, {})
        self._session.run_with_iobinding(binding, GIVING_BACK if is_last else None)
        if is_last:
            self._weights.release()


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
