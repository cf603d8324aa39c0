"""Tables of the measurement on the real model, computed from the outcomes of every single question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.real.measure import AFTER, FOLLOWS, IN
from benchmarks.real.policies import FULL, GREEDY, KEEPS, OPENVINO, OPENVINO_FULL

TASKS = ("code", "keeper", "copy")
RESAMPLES = 4_000
FEWEST = 4  # contexts of a row
FEWEST_OF_A_LENGTH = 2  # contexts of a cell that is about one length alone
_MODES = {IN: "question in the prompt", AFTER: "asked afterwards"}
Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one question: kept tokens per head, share of right tokens, all right, mean log p."""

    kept: int
    right: float
    exact: bool
    log_probability: float


class Outcomes:
    """The outcomes in results-real.json, by context."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.contexts: list[dict[str, Any]] = values["contexts"]
        self._rows: dict[tuple[str, str, str, int], list[Outcome | None]] = {}
        for key, entries in values["outcomes"].items():
            mode, task, policy, keep = key.split("|")
            self._rows[mode, task, policy, int(keep)] = [_outcome(entry) for entry in entries]

    def only(self, length: int) -> Outcomes:
        """Return the outcomes of the contexts of one length."""
        chosen = [index for index, context in enumerate(self.contexts) if context["length"] == length]
        part = Outcomes({"contexts": [self.contexts[index] for index in chosen], "outcomes": {}})
        part._rows = {key: [entries[index] for index in chosen] for key, entries in self._rows.items()}
        return part

    def keeps(self) -> list[int]:
        """Return the measured ones of KEEPS, the shares kept per 10,000, falling."""
        return sorted({keep for *_, keep in self._rows if keep in KEEPS}, reverse=True)

    def of(self, mode: str, task: str, policy: str, keep: int) -> list[Outcome | None]:
        """Return the outcomes per context; those of the full cache at every share."""
        key = (mode, task, policy, 10_000 if policy in (FULL, OPENVINO_FULL) else keep)
        return self._rows.get(key, [None] * len(self.contexts))

    def mean(self, mode: str, task: str, policy: str, keep: int, value: Callable[[Outcome], float]) -> float | None:
        """Return the mean of a value over the contexts; None where nothing was measured."""
        values = [value(one) for one in self.of(mode, task, policy, keep) if one is not None]
        return float(np.mean(values)) if values else None

    def difference(
        self, mode: str, policy: str, other: str, keep: int, value: Callable[[Outcome], float], tasks: Sequence[str]
    ) -> tuple[Interval, int] | None:
        """Return `policy` minus `other` on the same contexts, averaged over tasks, and the number of contexts.

        The interval is a bootstrap over contexts. None where fewer than FEWEST contexts have both.
        """
        pairs = [
            list(zip(self.of(mode, task, policy, keep), self.of(mode, task, other, keep), strict=True))
            for task in tasks
        ]
        differences: list[float] = []
        for context in zip(*pairs, strict=True):
            known = [value(first) - value(second) for first, second in context if first and second]
            if len(known) == len(tasks):
                differences.append(float(np.mean(known)))
        if len(differences) < FEWEST:
            return None
        return bootstrap(differences), len(differences)


def _outcome(entry: list[Any] | None) -> Outcome | None:
    if entry is None:
        return None
    kept, right, log_probability = entry
    mean = float("nan") if log_probability is None else log_probability / len(right)
    return Outcome(kept, right.count("1") / len(right), "0" not in right, mean)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of values, one per context, and the ends of its 95 % bootstrap interval."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def right_tokens(outcome: Outcome) -> float:
    """Return the share of right answer tokens in points."""
    return 100 * outcome.right


def count(outcomes: Outcomes, mode: str, policy: str, keep: int, tasks: Sequence[str] = TASKS) -> int:
    """Return how many contexts a policy was measured on with all tasks."""
    tasks = (FOLLOWS,) if mode == FOLLOWS else tasks
    rows = [outcomes.of(mode, task, policy, keep) for task in tasks]
    return sum(None not in context for context in zip(*rows, strict=True))


def methods(outcomes: Outcomes, mode: str, policies: Sequence[str], keeps: Sequence[int] = ()) -> str:
    """Return right tokens (exact answers) in % by task and share kept; `n` are contexts."""
    keeps = keeps or outcomes.keeps()
    lines = [f"| {_MODES[mode]} | n | {' | '.join(f'keep {keep / 100:g} %' for keep in keeps)} |"]
    lines.append("| --- | ---: |" + " ---: |" * len(keeps))
    for policy in policies:
        counts = sorted({count(outcomes, mode, policy, keep) for keep in keeps} - {0})
        cells = []
        for keep in keeps:
            parts = [_cell(outcomes, mode, task, policy, keep) for task in TASKS]
            cells.append(" / ".join(parts) if all(parts) else "")
        if counts and counts[-1] >= FEWEST:
            lines.append(
                f"| {policy} | {'–'.join(map(str, counts[:: max(len(counts) - 1, 1)]))} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _cell(outcomes: Outcomes, mode: str, task: str, policy: str, keep: int) -> str:
    right = outcomes.mean(mode, task, policy, keep, right_tokens)
    exact = outcomes.mean(mode, task, policy, keep, lambda one: 100.0 * one.exact)
    return "" if right is None or exact is None else f"{right:.0f} ({exact:.0f})"


def differences(
    outcomes: Outcomes,
    mode: str,
    policies: Sequence[str],
    other: str,
    tasks: Sequence[str] = TASKS,
    keeps: Sequence[int] = (),
) -> str:
    """Return every policy minus `other` in points of right tokens; bold where the interval leaves out zero.

    Shares at which none of them was measured have no column.
    """
    policies = [policy for policy in policies if policy != other]
    keeps = [
        keep
        for keep in keeps or outcomes.keeps()
        if any(outcomes.difference(mode, policy, other, keep, right_tokens, tasks) for policy in policies)
    ]
    lines = [f"| {_MODES[mode]}, minus {other} | {' | '.join(f'keep {keep / 100:g} %' for keep in keeps)} |"]
    lines.append("| --- |" + " ---: |" * len(keeps))
    for policy in policies:
        cells = [outcomes.difference(mode, policy, other, keep, right_tokens, tasks) for keep in keeps]
        if any(cells):
            lines.append(f"| {policy} | {' | '.join(interval(cell[0]) if cell else '' for cell in cells)} |")
    return "\n".join(lines)


def losses(outcomes: Outcomes, mode: str, policies: Sequence[str]) -> str:
    """Return policies minus the full cache, by kind of question."""
    keeps = outcomes.keeps()
    lines = [f"| {_MODES[mode]}, minus the full cache | {' | '.join(f'keep {keep / 100:g} %' for keep in keeps)} |"]
    lines.append("| --- |" + " ---: |" * len(keeps))
    for policy in policies:
        for name, tasks in (("codes and names", TASKS[:2]), ("copying", TASKS[2:])):
            cells = [outcomes.difference(mode, policy, FULL, keep, right_tokens, tasks) for keep in keeps]
            if any(cells):
                lines.append(
                    f"| {policy}, {name} | {' | '.join(interval(cell[0]) if cell else '' for cell in cells)} |"
                )
    return "\n".join(lines)


def by_length(outcomes: Outcomes, mode: str, policies: Sequence[str], keep: int) -> str:
    """Return right tokens in % by task for every length of text, with the number of contexts behind them."""
    lengths = sorted({context["length"] for context in outcomes.contexts})
    lines = [f"| {_MODES[mode]}, keep {keep / 100:g} % | {' | '.join(f'{length:,} tokens' for length in lengths)} |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for policy in policies:
        parts = [outcomes.only(length) for length in lengths]
        cells = []
        for part in parts:
            means = [part.mean(mode, task, policy, keep, right_tokens) for task in TASKS]
            number = count(part, mode, policy, keep)
            known = [f"{mean:.0f}" for mean in means if mean is not None]
            cells.append(f"{' / '.join(known)} ({number})" if number >= FEWEST_OF_A_LENGTH else "")
        if any(cells):
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_openvino(outcomes: Outcomes, policy: str) -> str:
    """Return written answers with the right value in %, and by how many points `policy` is ahead."""
    tasks = TASKS[:2]
    lines = [
        "| right answers, code / keeper | n | kept | keep 20 % | ChunkKV ahead | kept | keep 10 % | ChunkKV ahead |"
    ]
    lines.append("| --- |" + " ---: |" * 7)
    for name in (FULL, policy, OPENVINO_FULL, *OPENVINO):
        cells, number = [], 0
        for keep in (2_000, 1_000):
            found = outcomes.difference(GREEDY, policy, name, keep, right_tokens, tasks)
            if found is None:
                cells += ["", "", ""]
                continue
            means = [outcomes.mean(GREEDY, task, name, keep, right_tokens) for task in tasks]
            kept = [outcomes.mean(GREEDY, task, name, keep, lambda one: float(one.kept)) for task in tasks]
            number = max(number, found[1])
            cells.append(f"{np.mean([one for one in kept if one is not None]):.0f}")
            cells.append(" / ".join(f"{mean:.0f}" for mean in means if mean is not None))
            cells.append("" if name == policy else interval(found[0]))
        if any(cells):
            lines.append(f"| {name} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def perplexities(outcomes: Outcomes, policies: Sequence[str]) -> str:
    """Return how much the perplexity of the text that follows grows over the full cache's, in %."""
    keeps = [keep for keep in outcomes.keeps() if any(count(outcomes, FOLLOWS, name, keep) for name in policies)]
    lines = [f"| text that follows | n | {' | '.join(f'keep {keep / 100:g} %' for keep in keeps)} |"]
    lines.append("| --- | ---: |" + " ---: |" * len(keeps))
    for policy in policies:
        cells, most = [], 0
        for keep in keeps:
            found = outcomes.difference(FOLLOWS, FULL, policy, keep, lambda one: one.log_probability, (FOLLOWS,))
            most = max(most, found[1] if found else 0)
            grown = [float(100 * np.expm1(nats)) for nats in found[0]] if found else None
            cells.append("{:+.0f} % ({:+.0f} to {:+.0f})".format(*grown) if grown else "")
        if any(cells):
            lines.append(f"| {policy} | {most} | {' | '.join(cells)} |".replace("-", "−"))
    return "\n".join(lines)


def interval(values: Interval) -> str:
    """Return a mean with its interval; bold where the interval leaves out zero."""
    mean, low, high = values
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
    return f"**{text}**" if low > 0 or high < 0 else text


def kept_note(outcomes: Outcomes) -> str:
    """Return how many contexts of which length were measured."""
    counts: dict[int, int] = {}
    for context in outcomes.contexts:
        counts[context["length"]] = counts.get(context["length"], 0) + 1
    listed = [f"{number} of about {length:,} tokens" for length, number in sorted(counts.items())]
    return f"{len(outcomes.contexts)} contexts: {', '.join(listed)}"
