"""Measures settings on an engine's prompts: how far the layers' choices agree, and how many answers stay right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError, EngineMismatchError
from chunkkv.evaluation.policies import Policy
from chunkkv.evaluation.prefilled import PrefilledPrompt
from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.statistics import jaccard
from chunkkv.evaluation.texts.questions import PromptAndQuestions, Question
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings

MAX_CACHE_BYTES = 4 << 30  # of all prompts together: each is prefilled once and stays
FULL_CACHE = "full cache"

Groups = tuple[tuple[int, ...], ...]
Advance = Callable[[], None]


@dataclass(frozen=True)
class Candidate:
    """Settings with a name."""

    name: str
    settings: ChunkKVSettings

    @property
    def accuracy(self) -> float:
        """Mean share of right answers; 0 where nothing was asked."""
        return 0.0


@dataclass(frozen=True)
class MeasuredCandidate(Candidate):
    """Settings with the share of right answers per keep ratio and prompt: `right` [keeps,prompts] float64."""

    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """Mean share of right answers over keep ratios and prompts."""
        return float(self.right.mean())


class Calibration:
    """Prompts of an engine, prefilled once, on which any settings are tried at the same numbers of kept tokens.

    Parameters
    ----------
    session : ChunkKVSession
        An engine in which every layer scores for itself (--chunkkv_layer_reuse 1), with a tokenizer.
    prompts : Sequence[PromptAndQuestions]
        Token ids [L] with questions; no questions where there are no answers to expect.
    keeps : Sequence[int]
        Keep ratios in shares of 10,000.
    policies : Sequence[Policy], default ()
        Policies that will be measured: every candidate keeps enough tokens for the most demanding of them.
    advance : Advance
        Called after each prompt is prefilled, for a progress bar.

    Raises
    ------
    ConfigError
        For prompts whose caches take more than MAX_CACHE_BYTES, or that are all too short to be compressed.
    EngineMismatchError
        For an engine without ChunkKV or tokenizer, or with layers that share a choice.
    """

    def __init__(
        self,
        session: ChunkKVSession,
        prompts: Sequence[PromptAndQuestions],
        keeps: Sequence[int],
        policies: Sequence[Policy] = (),
        advance: Advance = lambda: None,
    ) -> None:
        engine, self._tokenizer = settings_and_tokenizer(session)
        if any(len(group) > 1 for group in engine.layer_groups):
            raise EngineMismatchError(
                "calibration looks at every layer's own choice: build the engine with --chunkkv and "
                "--chunkkv_layer_reuse 1"
            )
        size = sum(len(ids) for ids, _ in prompts) * session.executor.kv_bytes_per_token
        if size > MAX_CACHE_BYTES:
            raise ConfigError(
                f"prompts: the caches of {len(prompts)} prompts take {size >> 20} MiB, {MAX_CACHE_BYTES >> 20} are "
                "allowed: give fewer or shorter ones"
            )
        self.engine, self.keeps = engine, tuple(keeps)
        self.asks = all(questions for _, questions in prompts)
        self._runner = PromptRunner(session)
        least = [engine.min_tokens, *(policy.least_tokens for policy in policies)]
        self._budget = dataclasses.replace(engine, min_tokens=max(least), budget_tokens=0)
        self._prompts: list[tuple[PrefilledPrompt, tuple[Question, ...]]] = []
        for number, (ids, questions) in enumerate(prompts):
            if self._budget.kept_tokens(len(ids), min(keeps)) < len(ids):
                self._prompts.append((self._runner.prefill(ids, seed=number), tuple(questions)))
            advance()
        if not self._prompts:
            raise ConfigError(
                f"data has no prompt that is compressed at keep {min(keeps) / KEEP_SCALE}: give some of more than "
                f"{self._budget.min_tokens} tokens"
            )

    @property
    def num_prompts(self) -> int:
        """Prompts that are long enough to be compressed."""
        return len(self._prompts)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.engine.layer_groups)

    def agreement(self, settings: ChunkKVSettings, advance: Advance = lambda: None) -> np.ndarray:
        """Return [layers,layers]: the mean Jaccard index of what every two layers would keep by their own scores.

        The mean is over prompts and keep ratios. `advance` is called after each prompt.
        """
        own_choice = dataclasses.replace(settings, layer_groups=layer_groups(self.num_layers, 1))
        policy = Policy("agreement", "chunkkv", own_choice)
        matrices = []
        for prompt, _ in self._prompts:
            for kept in self._kept(len(prompt)):
                end = len(prompt) - settings.window
                matrices.append(jaccard(policy.keep(prompt, kept), settings.sinks, end))
            advance()
        return np.mean(matrices, axis=0)

    def measure(self, candidates: Sequence[Candidate], advance: Advance = lambda: None) -> list[MeasuredCandidate]:
        """Return the candidates with the share of right answers on every prompt at every keep ratio."""
        right = np.zeros((len(candidates), len(self.keeps), self.num_prompts))
        for number, (prompt, questions) in enumerate(self._prompts):
            choices = [
                Policy(candidate.name, "chunkkv", candidate.settings).keep(prompt, kept)
                for candidate in candidates
                for kept in self._kept(len(prompt))
            ]
            answers = self._runner.answer(prompt, choices, questions)
            shares = [self._share_right(questions, token_ids) for token_ids in answers]
            right[:, :, number] = np.reshape(shares, right.shape[:2])
            advance()
        return [
            MeasuredCandidate(candidate.name, candidate.settings, shares)
            for candidate, shares in zip(candidates, right, strict=True)
        ]

    def full(self, advance: Advance = lambda: None) -> MeasuredCandidate:
        """Return what the whole cache answers; all keep ratios show the same."""
        shares = []
        for prompt, questions in self._prompts:
            everything = [np.arange(len(prompt))] * self.num_layers
            shares.append(self._share_right(questions, self._runner.answer(prompt, [everything], questions)[0]))
            advance()
        return MeasuredCandidate(FULL_CACHE, self.engine, np.tile(shares, (len(self.keeps), 1)))

    def _kept(self, length: int) -> list[int]:
        return [self._budget.kept_tokens(length, keep) for keep in self.keeps]

    def _share_right(self, questions: Sequence[Question], answers: Sequence[list[int]]) -> float:
        answered = zip(questions, answers, strict=True)
        return float(np.mean([q.is_right(tokens, self._tokenizer.decode(tokens)) for q, tokens in answered]))
