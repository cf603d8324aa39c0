"""The scorer "reread" on ONNX Runtime: a prompt is read again over its full cache, and its tokens' attention kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from chunkkv.engine.directory import COMPRESS_FILE, GIVEN_FILE, REREAD_FILE
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeCompress, OnnxRuntimeStep, load_graph
from chunkkv.rereading import Piece
from chunkkv.settings import ChunkKVSettings

_QUERIES_AT_ONCE = 64  # more would take more memory, and as measured also more time


class OnnxRuntimeReread:
    """The graphs that score by a second reading and choose by its scores; loaded when a request first needs them.

    Parameters
    ----------
    engine_dir : Path
        The engine directory.
    step : OnnxRuntimeStep
        The graph that reads.
    settings : ChunkKVSettings
        What the engine was built with.
    block : int
        The most tokens that are read at once.
    """

    def __init__(self, engine_dir: Path, step: OnnxRuntimeStep, settings: ChunkKVSettings, block: int) -> None:
        self._step, self._block, self._sinks = step, block, settings.sinks
        self._each = settings.of_one_part().heads == "each"
        self._graph = load_graph(engine_dir / REREAD_FILE, step.threads)
        file = COMPRESS_FILE if settings.score == "given" else GIVEN_FILE
        self.compress = OnnxRuntimeCompress(engine_dir / file, settings.with_score("given"), step.threads)

    def no_scores(self, length: int) -> dict[int, np.ndarray]:
        """Return scores of zero for a prompt: per part that scores [H,length] float32."""
        parts = self._step.layout.parts
        return {part: np.zeros((len(parts[part].kv_heads), length), np.float32) for part in self._step.query_heads}

    def read(
        self,
        cache: HostKVCache,
        length: int,
        pieces: Sequence[Piece],
        scores: dict[int, np.ndarray],
        slots: Sequence[int] | None = None,
        position: int = 0,
    ) -> Iterator[int]:
        """Read pieces again behind a prompt, and raise `scores` to what its tokens receive; a block per item.

        Yields the number of tokens of each block.

        Parameters
        ----------
        cache : HostKVCache
            One row that holds the prompt, with room for the longest piece behind it.
        length : int
            Tokens of the prompt.
        pieces : sequence of Piece
            What is read again.
        scores : dict of int to numpy.ndarray
            Per part that scores [H,length] float32.
        slots : sequence of int or None, default None
            Slots that are filled before the prompt, one number for each length class; None for none.
        position : int, default 0
            Logical position of the prompt's first token.
        """
        layout = self._step.layout
        first = layout.slots(0) if slots is None else tuple(slots)
        for piece in pieces:
            for done in range(0, len(piece.ids), self._block):
                ids = piece.ids[done : done + self._block]
                at = tuple(count + length + done for count in first)
                queries = self._step.append_block(cache, ids, at, position + length + done, query_count=len(ids))[1]
                for part, query in queries.items():
                    start = first[layout.parts[part].length_class]
                    seen = (start + piece.start, start + piece.stop), (start + length, start + length + done)
                    received = self._received(cache, part, query[0], *seen)
                    of_piece = scores[part][:, piece.start : piece.stop]
                    np.maximum(of_piece, received, out=of_piece)
                yield len(ids)

    def for_compress(self, scores: dict[int, np.ndarray], tokens: int) -> dict[int, np.ndarray]:
        """Return scores as the compress graph takes them, [1,tokens] or [1,H,tokens]; those behind a prompt are 0."""
        given = {}
        for part, of_heads in scores.items():
            of_choice = of_heads if self._each else of_heads.max(axis=0)
            padded = np.zeros((1, *of_choice.shape[:-1], tokens), np.float32)
            padded[0, ..., : of_choice.shape[-1]] = of_choice
            given[part] = padded
        return given

    def _received(
        self, cache: HostKVCache, part: int, query: np.ndarray, piece: tuple[int, int], own: tuple[int, int]
    ) -> np.ndarray:
        """Return the largest attention [H,P] that the tokens of a piece receive from one block.

        Parameters
        ----------
        cache : HostKVCache
            One row.
        part : int
            The part whose keys are read.
        query : numpy.ndarray
            The block's queries [g*H,S,D]. They see the sinks, the piece, and the second reading up to themselves.
        piece : tuple of int
            Slots of the piece: its first, and that behind its last.
        own : tuple of int
            Slots of the second reading: its first, and that of the block's first token.
        """
        count, (start, stop) = query.shape[1], piece
        sinks = min(self._sinks, start)
        ranges = ((0, sinks), piece, (own[0], own[1] + count))
        keys = np.concatenate([cache.float_keys(part, first, last)[0] for first, last in ranges], axis=1)
        keys = np.ascontiguousarray(keys.swapaxes(1, 2))[:, None]
        by_head = query.reshape(len(keys), -1, *query.shape[1:])
        seen_at_first = keys.shape[-1] - count
        largest = np.zeros((len(keys), stop - start), np.float32)
        for first in range(0, count, _QUERIES_AT_ONCE):
            queries = np.ascontiguousarray(by_head[:, :, first : first + _QUERIES_AT_ONCE])
            last_seen = seen_at_first + first + np.arange(queries.shape[2])[:, None]
            mask = np.where(np.arange(keys.shape[-1]) <= last_seen, np.float32(0), np.float32(-np.inf))
            (received,) = self._graph.run(None, {"query": queries, "key": keys, "mask": mask})
            np.maximum(largest, received[:, sinks : sinks + stop - start], out=largest)
        return largest
