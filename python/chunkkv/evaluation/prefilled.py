"""One prompt after prefill, with its whole cache: what a policy chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from chunkkv import reference
from chunkkv.errors import ConfigError
from chunkkv.evaluation.requirements import check_queries
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.settings import ChunkKVSettings


@dataclass
class PrefilledPrompt:
    """One prompt after prefill.

    Parameters
    ----------
    ids : np.ndarray
        Token ids [L] int64.
    logits : np.ndarray
        Logits [vocab] float32 after the last token.
    cache : HostKVCache
        The full cache, of one row.
    queries : dict[int, np.ndarray]
        The last w rotated queries [Hq,w,D] of every layer that gives them: the leaders of the engine's groups.
    delimiter_table : np.ndarray or None
        Which tokens of the vocabulary end a clause or a line, bool [vocab]; None without a tokenizer.
    seed : int
        For policies that draw at random.
    engine_choice : Callable[[int], list[np.ndarray]], optional
        Returns per layer the positions that the engine's own compress graph keeps of N tokens; None for an engine
        without one.
    """

    ids: np.ndarray
    logits: np.ndarray
    cache: HostKVCache
    queries: dict[int, np.ndarray]
    delimiter_table: np.ndarray | None
    seed: int
    engine_choice: Callable[[int], list[np.ndarray]] | None = None
    _scores: dict[tuple, np.ndarray] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.cache.keys)

    @cached_property
    def is_delimiter(self) -> np.ndarray:
        """Which tokens [L] end a clause or a line; raises ConfigError without a tokenizer."""
        if self.delimiter_table is None:
            raise ConfigError("boundaries is 'delimiter', which needs an engine with a tokenizer")
        return self.delimiter_table[self.ids]

    def key(self, layer: int) -> np.ndarray:
        """Return the rotated keys [Hkv,L,D] float32 of a layer."""
        return self.cache.float_keys(layer)[0]

    def query(self, layer: int, window: int) -> np.ndarray:
        """Return the last `window` rotated queries [Hq,w,D]; raises ConfigError where the engine does not give them."""
        check_queries(layer, window, self.queries, next(iter(self.queries.values())).shape[1])
        query = self.queries[layer]
        return query[:, query.shape[1] - window :]

    def token_scores(self, layer: int, settings: ChunkKVSettings) -> np.ndarray:
        """Return the token scores [L] float32 of a layer (docs/method.md, section 2); computed once per settings."""
        ways = (settings.window, settings.pooling, settings.score, settings.window_reduce, settings.head_reduce)
        key = (layer, *ways, settings.value_norm)
        if key not in self._scores:
            self._scores[key] = reference.token_scores(
                self.query(layer, settings.window),
                self.key(layer),
                settings.window,
                settings.pooling,
                settings.score,
                value=self.cache.float_values(layer)[0] if settings.value_norm == "on" else None,
                window_reduce=settings.window_reduce,
                head_reduce=settings.head_reduce,
            )
        return self._scores[key]
