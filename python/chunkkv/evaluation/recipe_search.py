"""Finds a recipe for chunkkv-build: the settings, reuse groups and leader that lose least at the fewest groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError
from chunkkv.evaluation.calibration import FULL_CACHE, Advance, Calibration, Candidate, Groups, MeasuredCandidate
from chunkkv.evaluation.full_cache_check import WEAK_BELOW
from chunkkv.evaluation.policies import Policy, parse_policies
from chunkkv.evaluation.statistics import paired_difference, wilson
from chunkkv.evaluation.texts.questions import PromptAndQuestions
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession
from chunkkv.settings import LEADERS, ChunkKVSettings

RECIPE_SETTINGS = ("window", "chunk_size", "sinks", "pooling", "boundaries", "score", "leader")
ENGINE_NAME = "the engine's"  # the candidate with the engine's own settings
_ROUNDING = 1e-12  # of a mean of shares: a loss of exactly max_loss is allowed

AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)
BeginStep = Callable[[str, int], Advance]  # called with a step's name and number of prompts; returns its Advance


@dataclass(frozen=True)
class SearchBounds:
    """How far reuse groups may grow.

    Parameters
    ----------
    max_group : int, default 4
        Most layers that share one choice.
    max_loss : float, default 0.01
        Share of all answers, 0 to 1, that the groups may lose together. Used where the prompts have questions.
    min_agreement : float, default 0.5
        Least Jaccard index, 0 to 1, of a layer's own choice with its leader's. Used where there are no questions.
    """

    max_group: int = 4
    max_loss: float = 0.01
    min_agreement: float = 0.5

    def __post_init__(self) -> None:
        if self.max_group < 1:
            raise ConfigError(f"max_group is {self.max_group}; give a whole number of at least 1")
        for name in ("max_loss", "min_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed is 0 to 1")


@dataclass(frozen=True)
class SearchResult:
    """What a search chose and measured.

    `measured` holds every candidate that was asked, the full cache first; it is empty where the prompts have no
    questions. `agreement` [layers,layers] is the mean Jaccard index of every two layers' own choices.
    """

    chosen: Candidate
    measured: tuple[MeasuredCandidate, ...]
    agreement: np.ndarray
    keeps: tuple[int, ...]
    num_prompts: int
    num_layers: int

    def recipe_settings(self) -> dict[str, Any]:
        """Return the chosen settings under the names of chunkkv-build's flags."""
        settings = {name: getattr(self.chosen.settings, name) for name in RECIPE_SETTINGS}
        return settings | {"layer_reuse": layer_reuse_text(self.chosen.settings.layer_groups)}

    def measurements(self, data: str, bounds: SearchBounds) -> dict[str, Any]:
        """Return as JSON values what a recipe says of how it was found; `data` is the name of the prompts."""
        bound = {"max_loss": bounds.max_loss} if self.measured else {"min_agreement": bounds.min_agreement}
        return {
            "data": data,
            "prompts": self.num_prompts,
            "max_group": bounds.max_group,
            **bound,
            "keep_ratios": [keep / KEEP_SCALE for keep in self.keeps],
            "rows": [_accuracy_row(candidate, self.keeps) for candidate in self.measured],
            "agreement": self.agreement.round(4).tolist(),
        }


def search_recipe(
    session: ChunkKVSession,
    prompts: Sequence[PromptAndQuestions],
    keeps: Sequence[int],
    policies: Sequence[Policy],
    bounds: SearchBounds,
    begin: BeginStep = lambda name, total: lambda: None,
) -> SearchResult:
    """Search settings, reuse groups and leader for an engine by measuring on prompts.

    Parameters
    ----------
    session : ChunkKVSession
        An engine in which every layer scores for itself (--chunkkv_layer_reuse 1).
    prompts : Sequence[PromptAndQuestions]
        Token ids with questions. With questions, candidates are compared by right answers; where no prompt has any,
        groups are made by agreement of the layers alone.
    keeps : Sequence[int]
        Keep ratios in shares of 10,000.
    policies : Sequence[Policy]
        Settings to try beside the engine's own (see parse_buildable_policies); not used without questions.
    bounds : SearchBounds
        How far groups may grow.
    begin : BeginStep
        Told of every step and called back after each of its prompts, for a progress bar.

    Raises
    ------
    ConfigError, EngineMismatchError
        As Calibration.
    """
    tried = policies if all(questions for _, questions in prompts) else ()
    calibration = Calibration(session, prompts, keeps, tried, begin("prefill", len(prompts)))
    chosen: Candidate
    measured: list[MeasuredCandidate] = []
    if calibration.asks:
        chosen, measured, agreement = _search_by_answers(calibration, tried, bounds, begin)
    else:
        chosen, agreement = _search_by_agreement(calibration, bounds, begin)
    return SearchResult(
        chosen, tuple(measured), agreement, calibration.keeps, calibration.num_prompts, calibration.num_layers
    )


def parse_buildable_policies(text: str, engine: ChunkKVSettings) -> list[Policy]:
    """Return the policies that `text` lists, none where it is blank; raises ConfigError for one no engine can have."""
    policies = parse_policies(text, engine) if text.strip() else []
    for policy in policies:
        if not policy.is_buildable:
            raise ConfigError(
                f"policies names {policy.name}, which no engine can be built with; give chunkkv with settings"
            )
    return policies


def _search_by_answers(
    calibration: Calibration, policies: Sequence[Policy], bounds: SearchBounds, begin: BeginStep
) -> tuple[MeasuredCandidate, list[MeasuredCandidate], np.ndarray]:
    """Return the best candidate, all that were measured, and the agreement of layers."""
    count, layers = calibration.num_prompts, calibration.num_layers
    full = calibration.full(begin(FULL_CACHE, count))
    if full.accuracy < WEAK_BELOW:
        raise ConfigError(
            f"the full cache answers {full.accuracy:.0%} of {count} prompts right, less than {WEAK_BELOW:.0%}: a "
            "recipe would rest on no evidence. Give shorter prompts, or the chat template of a model that was tuned "
            "for instructions (--chat)"
        )
    ungrouped = [Candidate(ENGINE_NAME, calibration.engine)]
    ungrouped += [Candidate(policy.name, policy.settings) for policy in policies]
    singles = calibration.measure(ungrouped, begin("settings", count))
    base = singles[0]
    for other in singles[1:]:
        _, low, _ = paired_difference((other.right - singles[0].right).mean(axis=0).tolist())
        if low > 0 and other.accuracy > base.accuracy:
            base = other
    agreement = calibration.agreement(base.settings, begin("agreement", count))
    advance = begin("groups", count * 2 * (layers - 1))
    grown = [
        _with_groups_named(base, groups_by_answers(calibration, base, leader, bounds, advance), leader)
        for leader in LEADERS
    ]
    fixed = [
        _with_groups_named(base, layer_groups(layers, size), leader)
        for size in (2, 4)
        if size <= layers
        for leader in LEADERS
    ]
    proposals = {
        candidate.name: candidate
        for candidate in (*grown, *fixed)
        if len(candidate.settings.layer_groups) < layers  # more is the base again
    }
    measured = {
        candidate.name: candidate
        for candidate in calibration.measure(list(proposals.values()), begin("proposals", count))
    }
    chosen = best([base, *(measured[candidate.name] for candidate in grown if candidate.name in measured)])
    return chosen, [full, *singles, *measured.values()], agreement


def _search_by_agreement(
    calibration: Calibration, bounds: SearchBounds, begin: BeginStep
) -> tuple[Candidate, np.ndarray]:
    """Return the proposal with the fewest groups, and the agreement of layers."""
    agreement = calibration.agreement(calibration.engine, begin("agreement", calibration.num_prompts))
    base = Candidate(ENGINE_NAME, calibration.engine)
    proposals = [
        _with_groups_named(base, groups_by_agreement(agreement, leader, bounds.max_group, bounds.min_agreement), leader)
        for leader in LEADERS
    ]
    return best(proposals), agreement


def _with_groups_named(base: Candidate, groups: Groups, leader: str) -> Candidate:
    name = f"{base.name}, groups {layer_reuse_text(groups)}, leader {leader}"
    return Candidate(name, with_groups(base.settings, groups, leader))


def _accuracy_row(candidate: MeasuredCandidate, keeps: Sequence[int]) -> dict[str, Any]:
    cells = []
    for keep, right in zip(keeps, candidate.right, strict=True):
        low, high = wilson(float(right.sum()), len(right))
        numbers = {"accuracy": float(right.mean()), "low": low, "high": high}
        cells.append({"keep_ratio": keep / KEEP_SCALE, **{name: round(value, 4) for name, value in numbers.items()}})
    return {"name": candidate.name, "cells": cells}


def with_groups(settings: ChunkKVSettings, groups: Groups, leader: str) -> ChunkKVSettings:
    """Return the settings with other reuse groups and leader."""
    return dataclasses.replace(settings, layer_groups=groups, leader=leader)


def grow_groups(num_layers: int, max_group: int, accepts: Callable[[Groups, int], bool]) -> Groups:
    """Return groups made from the first layer to the last: a layer joins the group before it where `accepts` says so.

    `accepts` is called with all groups as they would be, later layers alone, and the number of the group that grew;
    no group gets more than `max_group` layers.
    """
    done: list[tuple[int, ...]] = []
    group: tuple[int, ...] = (0,)
    for layer in range(1, num_layers):
        alone = tuple((later,) for later in range(layer + 1, num_layers))
        grown = (*group, layer)
        if len(grown) <= max_group and accepts((*done, grown, *alone), len(done)):
            group = grown
        else:
            done.append(group)
            group = (layer,)
    return (*done, group)


def groups_by_agreement(agreement: np.ndarray, leader: str, max_group: int, min_agreement: float) -> Groups:
    """Return groups in which every layer's own choice agrees with its leader's by at least `min_agreement`.

    `agreement` [layers,layers] holds Jaccard indices; `leader` is "first" or "last".
    """

    def accepts(groups: Groups, number: int) -> bool:
        group = groups[number]
        leads = group[0] if leader == "first" else group[-1]
        return min(float(agreement[leads, layer]) for layer in group) >= min_agreement

    return grow_groups(len(agreement), max_group, accepts)


def groups_by_answers(
    calibration: Calibration,
    base: MeasuredCandidate,
    leader: str,
    bounds: SearchBounds,
    advance: Advance = lambda: None,
) -> Groups:
    """Return groups that together lose at most bounds.max_loss of the answers of `base`, where every layer is alone.

    The loss is the mean over all prompts and keep ratios, as a share of all answers.
    """

    def accepts(groups: Groups, number: int) -> bool:
        trial = Candidate(layer_reuse_text(groups), with_groups(base.settings, groups, leader))
        (measured,) = calibration.measure([trial], advance)
        return base.accuracy - measured.accuracy <= bounds.max_loss + _ROUNDING

    return grow_groups(calibration.num_layers, bounds.max_group, accepts)


def best(candidates: Sequence[AnyCandidate]) -> AnyCandidate:
    """Return the candidate with the fewest groups; of equals one with leader last, then the most accurate."""
    return min(
        candidates,
        key=lambda candidate: (
            len(candidate.settings.layer_groups),
            candidate.settings.leader != "last",
            -candidate.accuracy,
        ),
    )


def layer_reuse_text(groups: Groups) -> str:
    """Return groups as --chunkkv_layer_reuse takes them."""
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)
