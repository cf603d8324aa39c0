"""Settings that calibration tries, and what each of them answers: after compression, or with the question in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.evaluation.probes import Answered, KeptHeads, Probe, Prober
from chunkkv.evaluation.statistics import bootstrap_mean
from chunkkv.evaluation.texts.calibration_texts import CalibrationPrompt
from chunkkv.settings import ChunkKVSettings

FULL, ENGINE = "full cache", "the engine's settings"
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

    def gain(self, base: MeasuredHeads) -> tuple[float, float, float]:
        """Return how many more tokens are right than with `base` on the same prompts, and its 95 % interval."""
        return bootstrap_mean([a - b for a, b in zip(self.right, base.right, strict=True)])

    def row(self, base: MeasuredHeads) -> dict[str, Any]:
        """Return its right answer tokens and the gain over `base` as JSON values."""
        return {
            "name": self.candidate.name,
            "scorer": scorer_name(self.candidate),
            "right": round(float(np.mean(self.right)), 4),
            "log_probability": round(float(np.mean(self.log_probability)), 4),
            **{name: round(value, 4) for name, value in zip(("gain", "low", "high"), self.gain(base), strict=True)},
        }


def measure_after(
    prober: Prober,
    prompts: Sequence[CalibrationPrompt],
    candidates: Sequence[HeadCandidate],
    keep: int,
    begin: BeginStep,
) -> list[MeasuredHeads]:
    """Return what every candidate answers where prompts are compressed and asked later; `keep` is per 10,000."""
    advance, answers = begin("asked after compression", len(prompts)), []
    for prompt in prompts:
        probe = prober.probe(prompt, reread=any(one.reread for one in candidates))
        answers.append([prober.answers(probe, _kept(one, probe, keep)) for one in candidates])
        advance()
    return _measured(candidates, answers)


def measure_in_prompt(
    prober: Prober,
    prompts: Sequence[CalibrationPrompt],
    candidates: Sequence[HeadCandidate],
    keep: int,
    begin: BeginStep,
) -> list[MeasuredHeads]:
    """Return what every candidate answers where the question ends the prompt; `keep` is per 10,000."""
    advance, answers = begin("question in the prompt", len(prompts)), []
    for prompt in prompts:
        text = prober.probe(prompt, reread=False)
        of_prompt: list[list[Answered]] = [[] for _ in candidates]
        for task in prompt.tasks:
            probe = prober.asked(text, task)
            for answered, one in zip(of_prompt, candidates, strict=True):
                answered += prober.answers(probe, _kept(one, probe, keep))
        answers.append(of_prompt)
        advance()
    return _measured(candidates, answers)


def scorer_name(candidate: HeadCandidate) -> str:
    """Return the scorer that a context of such an engine needs; "none" where nothing is scored."""
    settings = candidate.settings
    if settings is None:
        return "none"
    keeps_all = settings.keep_per_10k * settings.reading_share_per_10k >= 10_000**2
    if settings.budget_split == "classes" and settings.local_policy == "recent" and keeps_all:
        return "none"
    return "reread" if candidate.reread else "window"


def _kept(candidate: HeadCandidate, probe: Probe, keep: int) -> KeptHeads | None:
    if candidate.settings is None:
        return None
    return probe.kept(candidate.settings, keep, candidate.reread)


def _measured(
    candidates: Sequence[HeadCandidate], answers: Sequence[Sequence[Sequence[Answered]]]
) -> list[MeasuredHeads]:
    return [
        MeasuredHeads(
            candidate,
            tuple(_mean(of_prompt[number], "right") for of_prompt in answers),
            tuple(_mean(of_prompt[number], "log_probability") for of_prompt in answers),
        )
        for number, candidate in enumerate(candidates)
    ]


def _mean(answers: Sequence[Answered], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in answers]))
