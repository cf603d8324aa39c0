"""Prompts of a calibration with their whole caches: what any choice of tokens per head answers, without a build."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from chunkkv import reference
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.evaluation.lm_eval.continuations import log_probabilities
from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.texts.calibration_texts import AnswerTask, CalibrationPrompt
from chunkkv.executors.inside import HeadScorer
from chunkkv.executors.interface import Capabilities
from chunkkv.reference_layers import head_classes, select_ranked
from chunkkv.rereading import pieces_of
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.repeat_words import repeat_words

KeptHeads = list[list[np.ndarray]]  # per layer and KV head the kept positions [N], ascending


@dataclass(frozen=True)
class Answered:
    """The scored tokens of one answer: how many are the most likely ones, and their mean log probability."""

    right: float
    log_probability: float


@dataclass
class Probe:
    """The whole cache of one prompt, and what its tokens received from a second reading.

    Parameters
    ----------
    ids : numpy.ndarray
        The prompt [L] int64.
    keys, values : list of numpy.ndarray
        Per layer [H,L,D] float32.
    queries : list of numpy.ndarray
        Per layer the last W queries [Hq,W,D].
    received : numpy.ndarray
        The largest attention [layers,H,L] float32; of shape [0] where the prompt was not read again.
    is_delimiter : numpy.ndarray
        Which tokens end a clause or a line [L] bool.
    tasks : tuple of AnswerTask
        What is asked.
    """

    ids: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    queries: list[np.ndarray]
    received: np.ndarray
    is_delimiter: np.ndarray
    tasks: tuple[AnswerTask, ...]
    _scores: dict[tuple[object, ...], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)

    def demand(self, keep_per_10k: int) -> np.ndarray:
        """Return the share of its tokens that every head keeps, [layers,H], where all tokens of all heads compete.

        They compete by what they received; `keep_per_10k` of 10,000 stay in all.
        """
        count = max(self.received.size * keep_per_10k // 10_000, 1)
        least = np.partition(self.received.ravel(), -count)[-count]
        return (self.received >= least).mean(axis=2)

    def kept(self, settings: ChunkKVSettings, keep_per_10k: int, reread: bool) -> KeptHeads:
        """Return what an engine with `settings` keeps, by its own window or by a second reading."""
        length, heads = len(self), len(self.keys[0])
        if settings.budget_split == "ranked":
            return self._ranked(settings, keep_per_10k, reread)
        lengths, chosen = settings.class_lengths(length, keep_per_10k), []
        for layer in range(len(self.keys)):
            of_layer: list[np.ndarray] = [np.empty(0, np.int32)] * heads
            for head_class, members in head_classes(settings, layer, heads):
                kept = self._class_keeps(settings, (layer, members), head_class, lengths[head_class == "local"], reread)
                for head in members:
                    of_layer[head] = kept
            chosen.append(of_layer)
        for group in settings.layer_groups:
            for layer in group:
                chosen[layer] = chosen[settings.leader_of(group)]
        return chosen

    def _ranked(self, settings: ChunkKVSettings, keep_per_10k: int, reread: bool) -> KeptHeads:
        heads = len(self.keys[0])
        parts = [members for _, members in head_classes(settings, 0, heads)]  # whole layers, or every head alone
        scores = [
            [self._scored(settings, layer, members, reread) for members in parts] for layer in range(len(self.keys))
        ]
        number = settings.kept_tokens(len(self), keep_per_10k)
        kept = iter(select_ranked(np.array(scores), len(self), number, settings, self.is_delimiter))
        return [[next(kept)] * heads if len(parts) == 1 else [next(kept) for _ in parts] for _ in self.keys]

    def _class_keeps(
        self, settings: ChunkKVSettings, part: tuple[int, tuple[int, ...]], head_class: str, count: int, reread: bool
    ) -> np.ndarray:
        if count >= len(self):
            return np.arange(len(self), dtype=np.int32)
        if head_class == "local" and settings.local_policy == "recent":
            return reference.recent_tokens(len(self), count, settings.sinks)
        scores = self._scored(settings, *part, reread)
        return reference.select_tokens(scores, len(self), count, settings, self.is_delimiter)

    def _scored(self, settings: ChunkKVSettings, layer: int, heads: tuple[int, ...], reread: bool) -> np.ndarray:
        """Return the token scores [L] of some heads of a layer."""
        names = ("window", "pooling", "score", "window_reduce", "head_reduce", "value_norm")
        known = (layer, heads, reread, *(getattr(settings, name) for name in names))
        if known not in self._scores:
            self._scores[known] = self._score(settings, layer, heads, reread)
        return self._scores[known]

    def _score(self, settings: ChunkKVSettings, layer: int, heads: tuple[int, ...], reread: bool) -> np.ndarray:
        if reread:
            received = self.received[layer, list(heads)].max(axis=0)
            return reference.given_scores(received, settings.window, settings.pooling)
        group = len(self.queries[layer]) // len(self.keys[layer])
        members = [head * group + member for head in heads for member in range(group)]
        return reference.token_scores(
            self.queries[layer][members, -settings.window :],
            self.keys[layer][list(heads)],
            settings.window,
            settings.pooling,
            settings.score,
            value=self.values[layer][list(heads)] if settings.value_norm == "on" else None,
            window_reduce=settings.window_reduce,
            head_reduce=settings.head_reduce,
        )


class Prober:
    """Makes probes on an engine, and answers with what is kept of them.

    Raises EngineMismatchError for an engine without ChunkKV or a tokenizer, and BackendUnavailableError for one that
    cannot hand out a prompt's cache, read a prompt again, or hold another number of tokens in every head.

    Parameters
    ----------
    session : ChunkKVSession
        An engine in which every layer scores for itself and keeps equally many tokens.
    """

    def __init__(self, session: ChunkKVSession) -> None:
        self.settings, tokenizer = settings_and_tokenizer(session)
        check_probes(session.executor.capabilities)
        self._session, self._words = session, repeat_words(tokenizer)
        self._prefiller = session.executor.blockwise_prefiller()
        self._delimiters = tokenizer.delimiter_token_table(vocab_size=session.limits.vocab_size)

    @cached_property
    def _scorer(self) -> HeadScorer:
        return self._session.executor.head_scorer()

    def probe(self, prompt: CalibrationPrompt, reread: bool = True) -> Probe:
        """Run a prompt, and read it again with `reread`."""
        ids, length = np.array(prompt.ids, np.int64), len(prompt.ids)
        pieces = pieces_of(ids, self._words, self._session.limits.max_seq_len - length) if reread else ()
        cache = self._prefiller.new_cache(1, length + max((len(piece.ids) for piece in pieces), default=0))
        _, queries = self._prefiller.fill(ids, cache, threading.Event())
        received = self._prefiller.reread_scores(cache, length, pieces) if reread else {}
        return Probe(
            ids,
            [array[0, :, :length].astype(np.float32) for array in cache.keys],
            [array[0, :, :length].astype(np.float32) for array in cache.values],
            [queries[layer][0] for layer in range(len(cache.keys))],
            np.stack([received[layer] for layer in sorted(received)]) if reread else np.zeros(0, np.float32),
            self._delimiters[ids],
            prompt.tasks,
        )

    def asked(self, probe: Probe, task: AnswerTask) -> Probe:
        """Return the probe of a prompt that goes on with the question of a task, which is all that it asks.

        The block that is run holds at least as many tokens as the window, so tokens before the question may run again.
        """
        ids = np.concatenate([probe.ids, np.array(task.question, np.int64)])
        start = min(len(probe), len(ids) - self.settings.window)
        cache = self._prefiller.new_cache(1, len(ids))
        for sources, targets in ((probe.keys, cache.keys), (probe.values, cache.values)):
            for source, target in zip(sources, targets, strict=True):
                target[0, :, :start] = source[:, :start]
        _, queries = self._prefiller.fill(ids[start:], cache, threading.Event(), filled=start)
        return Probe(
            ids,
            [array[0, :, : len(ids)] for array in cache.keys],
            [array[0, :, : len(ids)] for array in cache.values],
            [queries[layer][0] for layer in range(len(cache.keys))],
            np.zeros(0, np.float32),
            self._delimiters[ids],
            (dataclasses.replace(task, question=()),),
        )

    def answers(self, probe: Probe, kept: KeptHeads | None) -> list[Answered]:
        """Return how every task of a probe is answered on what is kept of it; None keeps everything."""
        layers = range(len(probe.keys))
        if kept is None:
            keys, values = ([list(array) for array in arrays] for arrays in (probe.keys, probe.values))
        else:
            keys, values = (
                [[arrays[layer][head][positions] for head, positions in enumerate(kept[layer])] for layer in layers]
                for arrays in (probe.keys, probe.values)
            )
        return [self._answer(task, keys, values, len(probe)) for task in probe.tasks]

    def _answer(
        self, task: AnswerTask, keys: Sequence[Sequence[np.ndarray]], values: Sequence[Sequence[np.ndarray]], at: int
    ) -> Answered:
        block = np.array([*task.question, *task.answer[:-1]], np.int64)
        logits = self._scorer.score_block(keys, values, block, at, len(task.question) + task.first_scored - 1)
        expected = np.array(task.answer[task.first_scored :], np.int64)
        right = float((logits.argmax(axis=1) == expected).mean())
        return Answered(right, float(log_probabilities(logits, expected).mean()))


def check_probes(capabilities: Capabilities) -> None:
    """Raise BackendUnavailableError for an engine that lacks an ability which probes need."""
    needed = {
        "hand out a prompt's whole cache": capabilities.blockwise_prefill,
        "read a prompt a second time": capabilities.rereads,
        "hold another number of tokens in every head": capabilities.head_lengths,
    }
    if missing := next((ability for ability, able in needed.items() if not able), None):
        raise BackendUnavailableError(
            f"this engine cannot {missing}, which finding the heads that read far takes: build the checkpoint for "
            "backend onnxruntime, with --kv_cache_dtype float32 or float16"
        )


def check_prober_settings(settings: ChunkKVSettings) -> None:
    """Raise ConfigError for an engine whose layers or heads do not choose for themselves."""
    if settings.budget_split != "uniform" or any(len(group) > 1 for group in settings.layer_groups):
        raise ConfigError(
            f"budget_split is {settings.budget_split!r} with layer groups {settings.layer_groups}; calibration looks "
            "at every head of every layer: build the engine with --chunkkv alone, without a recipe"
        )
    if settings.heads != "shared":
        raise ConfigError(
            f"heads is {settings.heads!r}; reading heads are found where the heads of a class keep the same tokens: "
            "build the engine with --chunkkv_heads shared"
        )
