"""Finds which KV heads read far, and what they and the others should keep, by a second reading of a few prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.full_cache_check import WEAK_BELOW
from chunkkv.evaluation.probes import Answered, KeptHeads, Probe, Prober, check_prober_settings
from chunkkv.evaluation.recipe_search import RECIPE_SETTINGS
from chunkkv.evaluation.statistics import bootstrap_mean
from chunkkv.evaluation.texts.calibration_texts import CalibrationPrompt
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings

# Of the budget, what reading heads take together; the others share the rest.
BUDGET_SHARES = (0.45, 0.65, 0.85)
FULL, ENGINE = "full cache", "the engine's settings"
_LARGEST_SHARE = 100_000  # of a reading head, in shares of 10,000
BeginStep = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class HeadCandidate:
    """Settings with a name, and whether a second reading scores; `settings` None is the full cache."""

    name: str
    settings: ChunkKVSettings | None
    reread: bool = False


@dataclass(frozen=True)
class MeasuredHeads:
    """What a candidate answered: `right` and `log_probability` are means over the tasks of each prompt [prompts]."""

    candidate: HeadCandidate
    right: tuple[float, ...]
    log_probability: tuple[float, ...]


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
        All candidates, the full cache first and the engine's own settings second.
    keep_per_10k : int
        The keep ratio that they were proposed for, in shares of 10,000.
    """

    demand: np.ndarray
    per_prompt: np.ndarray
    measured: tuple[MeasuredHeads, ...]
    keep_per_10k: int

    def best(self, reread: bool = True) -> MeasuredHeads:
        """Return what answers best; with reread=False of those that need no second reading at run time."""
        return max((one for one in self.measured[1:] if reread or not one.candidate.reread), key=_merit)

    @property
    def chosen(self) -> MeasuredHeads:
        """The proposal."""
        return self.best()

    def recipe_settings(self, chosen: MeasuredHeads) -> dict[str, Any]:
        """Return a proposal under the names of chunkkv-build's flags."""
        settings = chosen.candidate.settings
        assert settings is not None
        values: dict[str, Any] = {name: getattr(settings, name) for name in RECIPE_SETTINGS if name != "leader"}
        values |= {"head_reduce": settings.head_reduce, "layer_reuse": "1", "min_tokens": settings.min_tokens}
        values["budget_split"] = settings.budget_split
        if settings.budget_split == "classes":
            values["reading_heads"] = [list(heads) for heads in settings.reading_heads]
            for name in ("reading_share_per_10k", "local_share_per_10k", "local_policy"):
                values[name] = getattr(settings, name)
        return values

    def rows(self) -> list[dict[str, Any]]:
        """Return every candidate's right answer tokens, and its paired difference to the engine's own settings."""
        base = self.measured[1]
        return [
            {
                "name": one.candidate.name,
                "scorer": scorer_name(one.candidate),
                "right": round(float(np.mean(one.right)), 4),
                "log_probability": round(float(np.mean(one.log_probability)), 4),
                **dict(zip(("gain", "low", "high"), _gain(one, base), strict=True)),
            }
            for one in self.measured
        ]

    def agreement(self) -> int:
        """Return how many of the reading heads every single prompt would have found, too."""
        count = self._reading()
        found = [set(_largest(one, count)) for one in (self.demand, *self.per_prompt)]
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
) -> HeadSearchResult:
    """Find the reading heads on some prompts, and measure proposals on others, asked after compression.

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

    Raises
    ------
    ConfigError
        Where the full cache itself answers too little, so that nothing can be said about compression.
    """
    prober = Prober(session)
    check_prober_settings(prober.settings)
    advance, demands = begin("second reading", len(found_on)), []
    for prompt in found_on:
        demands.append(prober.probe(prompt).demand(keep_per_10k))
        advance()
    per_prompt = np.stack(demands)
    demand = per_prompt.mean(axis=0)
    candidates = [
        HeadCandidate(FULL, None),
        HeadCandidate(ENGINE, prober.settings),
        *(
            one
            for one in proposals(prober.settings, demand, keep_per_10k, count)
            if second_reading or scorer_name(one) != "reread"
        ),
    ]
    measured = _measure(prober, measured_on, candidates, keep_per_10k, begin)
    check_full_cache(measured[0])
    return HeadSearchResult(demand, per_prompt, tuple(measured), keep_per_10k)


def check_full_cache(full: MeasuredHeads) -> None:
    """Raise ConfigError where the full cache answers too little for a proposal."""
    right = float(np.mean(full.right))
    if right < WEAK_BELOW:
        raise ConfigError(
            f"the full cache answers {right:.0%} of the answer tokens of {len(full.right)} prompts right, less than "
            f"{WEAK_BELOW:.0%}: a proposal would rest on no evidence. Give shorter prompts (--lengths), other texts "
            "(--text_file), or the chat template of an instruction-tuned model (--chat)"
        )


def proposals(
    engine: ChunkKVSettings, demand: np.ndarray, keep_per_10k: int, count: int | None = None
) -> list[HeadCandidate]:
    """Return settings with classes of heads, and one ranking of all layers.

    Reading heads keep everything at `keep_per_10k`; there are `count` of them, or as many as BUDGET_SHARES allow. Local
    heads keep recent tokens without any scores, or the chunks of a second reading.
    """
    layers, heads = demand.shape
    least = engine.window + engine.sinks + engine.chunk_size
    plain = dataclasses.replace(engine, min_tokens=least, keep_per_10k=keep_per_10k, budget_tokens=0)
    share = min(KEEP_SCALE * KEEP_SCALE // keep_per_10k, _LARGEST_SHARE)
    found = []
    most = demand.size * KEEP_SCALE // share
    if count is not None and not 0 < count <= most:
        raise ConfigError(
            f"heads is {count}; 1 to {most} of {demand.size} heads can keep everything at this keep ratio"
        )
    counts = {round(demand.size * KEEP_SCALE * part / share) for part in BUDGET_SHARES} if count is None else {count}
    for number in sorted(counts - {0}):
        reading = _by_layer(_largest(demand, number), layers, heads)
        local = round((demand.size * KEEP_SCALE - number * share) / (demand.size - number))
        for policy, reread in (("recent", False), ("chunks", True)):
            settings = dataclasses.replace(
                plain,
                budget_split="classes",
                num_kv_heads=heads,
                reading_heads=reading,
                reading_share_per_10k=share,
                local_share_per_10k=local,
                local_policy=policy,
            )
            others = "others sinks and recent tokens" if policy == "recent" else "others chunks"
            found.append(HeadCandidate(f"{number} of {demand.size} heads read, {others}", settings, reread))
    ranked = dataclasses.replace(plain, budget_split="ranked")
    return [*found, HeadCandidate("one ranking of all layers", ranked, True)]


def _measure(
    prober: Prober,
    prompts: Sequence[CalibrationPrompt],
    candidates: Sequence[HeadCandidate],
    keep_per_10k: int,
    begin: BeginStep,
) -> list[MeasuredHeads]:
    """Return what every candidate answers, asked after compression."""
    advance, answers = begin("answers", len(prompts)), []
    for prompt in prompts:
        probe = prober.probe(prompt, reread=any(one.reread for one in candidates))
        answers.append([prober.answers(probe, _kept(one, probe, keep_per_10k)) for one in candidates])
        advance()
    return [
        MeasuredHeads(
            candidate,
            tuple(_mean(of_prompt[number], "right") for of_prompt in answers),
            tuple(_mean(of_prompt[number], "log_probability") for of_prompt in answers),
        )
        for number, candidate in enumerate(candidates)
    ]


def _kept(candidate: HeadCandidate, probe: Probe, keep_per_10k: int) -> KeptHeads | None:
    if candidate.settings is None:
        return None
    return probe.kept(candidate.settings, keep_per_10k, candidate.reread)


def _mean(answers: Sequence[Answered], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in answers]))


def _merit(measured: MeasuredHeads) -> float:
    """Return what proposals are compared by: log probability, which is finer than right tokens."""
    return float(np.mean(measured.log_probability))


def _gain(one: MeasuredHeads, base: MeasuredHeads) -> list[float]:
    differences = [a - b for a, b in zip(one.right, base.right, strict=True)]
    return [round(value, 4) for value in bootstrap_mean(differences)]


def scorer_name(candidate: HeadCandidate) -> str:
    """Return the scorer that a context of such an engine needs; "none" where nothing is scored."""
    settings = candidate.settings
    if settings is None or (settings.budget_split == "classes" and settings.local_policy == "recent"):
        return "none"
    return "reread" if candidate.reread else "window"


def _largest(demand: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-demand.ravel(), kind="stable")[:count].tolist())


def _by_layer(numbers: Sequence[int], layers: int, heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(n - layer * heads for n in numbers if n // heads == layer) for layer in range(layers))
