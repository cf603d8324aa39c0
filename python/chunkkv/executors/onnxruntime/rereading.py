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
        self._each = settings.heads == "each"
        self._graph = load_graph(engine_dir / REREAD_FILE, step.threads)
        file = COMPRESS_FILE if settings.score == "given" else GIVEN_FILE
        self.compress = OnnxRuntimeCompress(engine_dir / file, settings.with_score("given"), step.threads)

    def no_scores(self, length: int) -> dict[int, np.ndarray]:
        """Return scores of zero for a prompt: per part that scores [H,length] float32."""
        parts = self._step.layout.parts
        return {part: np.zeros((len(parts[part].kv_heads), length), np.float32) for part in self._step.query_heads}

    def read(
        self, cache: HostKVCache, length: int, pieces: Sequence[Piece], scores: dict[int, np.ndarray]
    ) -> Iterator[int]:
        """Read pieces again behind a prompt, and raise `scores` to what its tokens receive; a block per item.

        Yields the number of tokens of each block.

        Parameters
        ----------
        cache : HostKVCache
            One row that holds the prompt in its first slots, with room for the longest piece behind it.
        length : int
            Tokens of the prompt.
        pieces : sequence of Piece
            What is read again.
        scores : dict of int to numpy.ndarray
            Per part that scores [H,length] float32.
        """
        for piece in pieces:
            for done in range(0, len(piece.ids), self._block):
                ids = piece.ids[done : done + self._block]
                at = length + done
                queries = self._step.append_block(cache, ids, at, at, query_count=len(ids))[1]
                for part, query in queries.items():
                    self._observe(cache.keys[part][0], query[0], (piece.start, piece.stop), (length, at), scores[part])
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

    def _observe(
        self, key: np.ndarray, query: np.ndarray, piece: tuple[int, int], own: tuple[int, int], scores: np.ndarray
    ) -> None:
        """Raise the scores [H,L] of the tokens of `piece` by one block's queries [g*H,S,D] and the keys [H,C,D].

        The queries see the sinks, the piece, and the tokens of the second reading from slot `own[0]` on up to
        themselves, of which the first one lies in slot `own[1]`.
        """
        count, (start, stop) = query.shape[1], piece
        sinks = min(self._sinks, start)
        ranges = ((0, sinks), piece, (own[0], own[1] + count))
        keys = np.concatenate([key[:, first:last] for first, last in ranges], axis=1)
        keys = np.ascontiguousarray(keys.swapaxes(1, 2))[:, None]
        by_head = query.reshape(len(key), -1, *query.shape[1:])
        seen_at_first = keys.shape[-1] - count
        for first in range(0, count, _QUERIES_AT_ONCE):
            queries = np.ascontiguousarray(by_head[:, :, first : first + _QUERIES_AT_ONCE])
            last_seen = seen_at_first + first + np.arange(queries.shape[2])[:, None]
            mask = np.where(np.arange(keys.shape[-1]) <= last_seen, np.float32(0), np.float32(-np.inf))
            (received,) = self._graph.run(None, {"query": queries, "key": keys, "mask": mask})
            of_piece = received[:, sinks : sinks + stop - start]
            np.maximum(scores[:, start:stop], of_piece, out=scores[:, start:stop])
