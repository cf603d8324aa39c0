"""Finds reuse groups, leaders and settings for an engine's model by measuring: agreement of layers, answers lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError, EngineMismatchError
from chunkkv.evaluation.policies import Policy
from chunkkv.evaluation.report.agreement import jaccard
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.texts.questions import Question
from chunkkv.session import ChunkKVSession
from chunkkv.settings import KEEP_SCALE, LEADERS, ChunkKVSettings

MOST_CACHE_BYTES = 4 << 30  # of all prompts together: each is prefilled once and stays
FULL = "full cache"

Groups = tuple[tuple[int, ...], ...]
Advance = Callable[[], None]


@dataclass(frozen=True)
class Candidate:
    """Settings with a name, and per keep ratio and prompt the share of right answers [keeps,prompts], None unasked."""

    name: str
    settings: ChunkKVSettings
    right: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """Mean over keep ratios and prompts; 0 where nothing was asked."""
        return 0.0 if self.right is None else float(self.right.mean())


class Calibration:
    """Prompts of an engine, prefilled once, on which any settings are tried at the same numbers of kept tokens.

    `prompts` are token ids [L] with questions, none where there are no answers to expect. Raises ConfigError for
    prompts that are too many or too short to be compressed, EngineMismatchError for an engine without ChunkKV or with
    layers that share a choice.
    """

    def __init__(
        self,
        session: ChunkKVSession,
        prompts: Sequence[tuple[np.ndarray, Sequence[Question]]],
        keeps: Sequence[int],
        candidates: Sequence[Policy] = (),
        advance: Advance = lambda: None,
    ) -> None:
        engine = session.settings
        if engine is None or any(len(group) > 1 for group in engine.layer_groups):
            raise EngineMismatchError(
                "calibration looks at every layer's own choice: build the engine with --chunkkv and "
                "--chunkkv_layer_reuse 1"
            )
        size = sum(len(ids) for ids, _ in prompts) * session._executor.kv_bytes_per_token
        if size > MOST_CACHE_BYTES:
            raise ConfigError(
                f"prompts: the caches of {len(prompts)} prompts take {size >> 20} MiB, {MOST_CACHE_BYTES >> 20} are "
                "allowed: give fewer or shorter ones"
            )
        self.engine, self.keeps = engine, tuple(keeps)
        self.asks = all(questions for _, questions in prompts)
        self._tokenizer, self._runner = session.tokenizer, PromptRunner(session)
        needed = [engine.min_tokens, *(policy.least_tokens for policy in candidates)]
        self._budget = dataclasses.replace(engine, min_tokens=max(needed), budget_tokens=0)
        self._prompts = []
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
        """Return [layers,layers]: mean Jaccard of what every two layers would keep by their own scores."""
        policy = Policy("agreement", "chunkkv", with_groups(settings, layer_groups(self.num_layers, 1)))
        found = []
        for prompt, _ in self._prompts:
            for kept in self._kept(len(prompt)):
                end = len(prompt) - settings.window
                found.append(jaccard(policy.keep(prompt, kept), settings.sinks, end))
            advance()
        return np.mean(found, axis=0)

    def measure(self, candidates: Sequence[Candidate], advance: Advance = lambda: None) -> list[Candidate]:
        """Return the candidates with the share of right answers on every prompt at every keep ratio."""
        right = np.zeros((len(candidates), len(self.keeps), self.num_prompts))
        for number, (prompt, questions) in enumerate(self._prompts):
            choices = [
                Policy(candidate.name, "chunkkv", candidate.settings).keep(prompt, kept)
                for candidate in candidates
                for kept in self._kept(len(prompt))
            ]
            answers = self._runner.answer(prompt, choices, questions)
            shares = [self._share(questions, given) for given in answers]
            right[:, :, number] = np.reshape(shares, right.shape[:2])
            advance()
        return [dataclasses.replace(one, right=shares) for one, shares in zip(candidates, right, strict=True)]

    def full(self, advance: Advance = lambda: None) -> Candidate:
        """Return what the whole cache answers; all keep ratios show the same."""
        shares = []
        for prompt, questions in self._prompts:
            everything = [np.arange(len(prompt))] * self.num_layers
            shares.append(self._share(questions, self._runner.answer(prompt, [everything], questions)[0]))
            advance()
        return Candidate(FULL, self.engine, np.tile(shares, (len(self.keeps), 1)))

    def _kept(self, length: int) -> list[int]:
        return [self._budget.kept_tokens(length, keep) for keep in self.keeps]

    def _share(self, questions: Sequence[Question], answers: Sequence[list[int]]) -> float:
        assert self._tokenizer is not None
        asked = zip(questions, answers, strict=True)
        return float(np.mean([q.is_right(tokens, self._tokenizer.decode(tokens)) for q, tokens in asked]))


def with_groups(settings: ChunkKVSettings, groups: Groups, leader: str | None = None) -> ChunkKVSettings:
    """Return the settings with other reuse groups and, where given, another leader."""
    return dataclasses.replace(settings, layer_groups=groups, leader=leader or settings.leader)


def grow_groups(num_layers: int, most: int, accepts: Callable[[Groups, int], bool]) -> Groups:
    """Return groups made from the first layer to the last: a layer joins the group before it where `accepts` says so.

    `accepts` is asked with all groups as they would be, layers to come alone, and the number of the group that grew;
    no group gets more than `most` layers.
    """
    done: list[tuple[int, ...]] = []
    group: tuple[int, ...] = (0,)
    for layer in range(1, num_layers):
        alone = tuple((other,) for other in range(layer + 1, num_layers))
        grown = (*group, layer)
        if len(grown) <= most and accepts((*done, grown, *alone), len(done)):
            group = grown
        else:
            done.append(group)
            group = (layer,)
    return (*done, group)


def groups_by_agreement(agreement: np.ndarray, leader: str, most: int, least: float) -> Groups:
    """Return groups in which every layer's own choice agrees with its leader's by at least `least` (Jaccard)."""

    def accepts(groups: Groups, number: int) -> bool:
        group = groups[number]
        leads = group[0] if leader == "first" else group[-1]
        return min(float(agreement[leads, layer]) for layer in group) >= least

    return grow_groups(len(agreement), most, accepts)


def groups_by_answers(
    calibration: Calibration, base: Candidate, leader: str, most: int, max_loss: float, advance: Advance = lambda: None
) -> Groups:
    """Return groups that together lose at most `max_loss` of the answers that `base`, every layer alone, gets right.

    The loss is the mean over all prompts and keep ratios, as a share of all answers.
    """

    def accepts(groups: Groups, number: int) -> bool:
        trial = Candidate(layer_reuse_text(groups), with_groups(base.settings, groups, leader))
        (measured,) = calibration.measure([trial], advance)
        return base.accuracy - measured.accuracy <= max_loss + 1e-12

    return grow_groups(calibration.num_layers, most, accepts)


def proposals(find: Callable[[str], Groups]) -> dict[str, Groups]:
    """Return per leader the groups that `find` makes for it."""
    return {leader: find(leader) for leader in LEADERS}


def best(measured: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the fewest groups; of equals one with leader last, then the most accurate."""
    return min(measured, key=lambda one: (len(one.settings.layer_groups), one.settings.leader != "last", -one.accuracy))


def layer_reuse_text(groups: Groups) -> str:
    """Return groups as --chunkkv_layer_reuse takes them."""
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)
