"""Finds which KV heads read far, and what they and the others should keep, by a second reading of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.full_cache_check import WEAK_BELOW
from chunkkv.evaluation.head_proposals import largest, proposals_after, proposals_in_prompt
from chunkkv.evaluation.measured_heads import (
    ENGINE,
    FULL,
    BeginStep,
    HeadCandidate,
    MeasuredHeads,
    measure_after,
    measure_in_prompt,
    scorer_name,
)
from chunkkv.evaluation.probes import Prober, check_prober_settings
from chunkkv.evaluation.recipe_search import RECIPE_SETTINGS
from chunkkv.evaluation.settings_search import better, group_fields, groupings, variations
from chunkkv.evaluation.texts.calibration_texts import CalibrationPrompt
from chunkkv.session import ChunkKVSession


@dataclass(frozen=True)
class HeadSearchResult:
    """What a search found.

    Parameters
    ----------
    demand : numpy.ndarray
        The share of its tokens that every head keeps where all tokens compete [layers,H], mean over the prompts.
    per_prompt : numpy.ndarray
        The same for each prompt that was read again [prompts,layers,H].
    measured : tuple of MeasuredHeads
        All candidates, asked as the search was told: the full cache first and the engine's own settings second.
    in_prompt : tuple of MeasuredHeads
        The full cache, the engine's own settings, changes of them, groups of layers and partitions, with the question
        in the prompt.
    taken : MeasuredHeads
        Those of `in_prompt` whose settings the proposals have: the engine's own, or others that are surely better.
    keep_per_10k : int
        The keep ratio that they were proposed for, in shares of 10,000.
    """

    demand: np.ndarray
    per_prompt: np.ndarray
    measured: tuple[MeasuredHeads, ...]
    in_prompt: tuple[MeasuredHeads, ...]
    taken: MeasuredHeads
    keep_per_10k: int

    def best(self, reread: bool = True) -> MeasuredHeads:
        """Return what answers best; with reread=False of those that need no second reading at run time.

        Candidates are the engine's own settings or those that were taken in their place, and what splits the budget. A
        ranking of all heads is none: it takes flags alone, and a recipe would hold nothing of what was found.
        """
        return max((one for one in self.measured if self._may_be_chosen(one, reread)), key=_merit)

    def _may_be_chosen(self, one: MeasuredHeads, reread: bool) -> bool:
        settings = one.candidate.settings
        if settings is None or (one.candidate.reread and not reread):
            return False
        if settings.budget_split == "uniform":
            return one.candidate.name in (ENGINE, self.taken.candidate.name)
        return not settings.ranks_heads

    def without_recipe(self) -> MeasuredHeads | None:
        """Return the ranking of all heads that answers best, where it is better than the proposal; else None."""
        settings = [one.candidate.settings for one in self.measured]
        rankings = [one for one, of_it in zip(self.measured, settings, strict=True) if of_it and of_it.ranks_heads]
        best = max((self.chosen, *rankings), key=_merit)
        return None if best is self.chosen else best

    @property
    def chosen(self) -> MeasuredHeads:
        """The proposal."""
        return self.best()

    def recipe_settings(self, chosen: MeasuredHeads) -> dict[str, Any]:
        """Return a proposal under the names of chunkkv-build's flags."""
        settings = chosen.candidate.settings
        assert settings is not None
        values: dict[str, Any] = {name: getattr(settings, name) for name in RECIPE_SETTINGS if name != "leader"}
        values |= {"layer_reuse": "1"}
        for name in ("window_reduce", "head_reduce", "value_norm", "heads", "min_tokens", "budget_split"):
            values[name] = getattr(settings, name)
        if settings.budget_split == "classes":
            values["reading_heads"] = [list(heads) for heads in settings.reading_heads]
            for name in ("reading_share_per_10k", "local_share_per_10k", "local_policy"):
                values[name] = getattr(settings, name)
        return values

    def rows(self) -> list[dict[str, Any]]:
        """Return what every candidate answers after compression, and its gain over the engine's own settings."""
        return [one.row(self.measured[1]) for one in self.measured]

    def rows_in_prompt(self) -> list[dict[str, Any]]:
        """Return the same with the question in the prompt; groups of layers as a recipe takes them."""
        return [{**one.row(self.in_prompt[1]), **group_fields(one.candidate)} for one in self.in_prompt]

    def agreement(self) -> int:
        """Return how many of the reading heads every single prompt would have found, too."""
        count = self._reading()
        found = [set(largest(one, count)) for one in (self.demand, *self.per_prompt)]
        return len(set.intersection(*found))

    def _reading(self) -> int:
        settings = self.chosen.candidate.settings
        return sum(map(len, settings.reading_heads)) if settings is not None else 0


def search_heads(
    session: ChunkKVSession,
    found_on: Sequence[CalibrationPrompt],
    measured_on: Sequence[CalibrationPrompt],
    keep_per_10k: int,
    begin: BeginStep = lambda name, total: lambda: None,
    second_reading: bool = True,
    count: int | None = None,
    asked_later: bool = True,
) -> HeadSearchResult:
    """Find the reading heads on some prompts, and measure proposals on others.

    Changes of single settings, groups of layers and partitions of heads are measured with the question in the prompt,
    and partitions also where the question comes after compression.

    Parameters
    ----------
    session : ChunkKVSession
        An engine in which every layer chooses for itself and keeps equally many tokens.
    found_on, measured_on : sequence of CalibrationPrompt
        Prompts that are read again, and prompts with tasks.
    keep_per_10k : int
        The keep ratio that the proposal is for, in shares of 10,000.
    begin : callable
        Told of every step and its number of prompts, and called back after each of them.
    second_reading : bool, default True
        Whether to propose what needs scorer "reread" at run time.
    count : int or None, default None
        How many heads read; None tries several numbers.
    asked_later : bool, default True
        Whether questions come after compression. False leaves that measurement out, and what answers best with the
        question in the prompt is proposed.

    Raises
    ------
    ConfigError
        Where the full cache itself answers too little, so that nothing can be said about compression.
    """
    prober = Prober(session)
    check_prober_settings(prober.settings)
    per_prompt = _demands(prober, found_on, keep_per_10k, begin)
    demand = per_prompt.mean(axis=0)
    known = [HeadCandidate(FULL, None), HeadCandidate(ENGINE, prober.settings)]
    changed = variations(prober.settings)
    tried = [*known, *changed, *groupings(prober.settings, demand, keep_per_10k)]
    length = min(len(prompt.ids) for prompt in measured_on)
    tried += proposals_in_prompt(prober.settings, demand, keep_per_10k, length, count)
    in_prompt = tuple(measure_in_prompt(prober, measured_on, tried, keep_per_10k, begin))
    check_full_cache(in_prompt[0])
    taken = better(in_prompt[1], in_prompt[2 : 2 + len(changed)])
    settings = taken.candidate.settings
    assert settings is not None
    if not asked_later:
        return HeadSearchResult(demand, per_prompt, in_prompt, in_prompt, taken, keep_per_10k)
    later = proposals_after(settings, demand, keep_per_10k, length, count)
    later = [one for one in later if second_reading or scorer_name(one) != "reread"]
    candidates = [*known, *([] if taken is in_prompt[1] else [taken.candidate]), *later]
    measured = measure_after(prober, measured_on, candidates, keep_per_10k, begin)
    return HeadSearchResult(demand, per_prompt, tuple(measured), in_prompt, taken, keep_per_10k)


def _demands(prober: Prober, prompts: Sequence[CalibrationPrompt], keep_per_10k: int, begin: BeginStep) -> np.ndarray:
    """Return what every head wants on each prompt, [prompts,layers,H]."""
    advance, demands = begin("second reading", len(prompts)), []
    for prompt in prompts:
        demands.append(prober.probe(prompt).demand(keep_per_10k))
        advance()
    return np.stack(demands)


def check_full_cache(full: MeasuredHeads) -> None:
    """Raise ConfigError where the full cache answers too little for a proposal."""
    right = float(np.mean(full.right))
    if right < WEAK_BELOW:
        raise ConfigError(
            f"the full cache answers {right:.0%} of the answer tokens of {len(full.right)} prompts right, less than "
            f"{WEAK_BELOW:.0%}: a proposal would rest on no evidence. Give shorter prompts (--lengths), other texts "
            "(--text_file), or the chat template of an instruction-tuned model (--chat)"
        )


def _merit(measured: MeasuredHeads) -> float:
    """Return what proposals are compared by: log probability, which is finer than right tokens."""
    return float(np.mean(measured.log_probability))
