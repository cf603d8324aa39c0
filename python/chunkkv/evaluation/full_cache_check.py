"""Watches how well the full cache answers: where it cannot, an evaluation says nothing about compression."""

from __future__ import annotations

from chunkkv.evaluation.records import Record

WEAK_BELOW = 0.7  # share of right answers
FEWEST = 10  # prompts before a share is judged during a run


class FullCacheCheck:
    """Counts the full cache's right answers per suite and mode, and words a warning where they are few.

    Parameters
    ----------
    chat : bool
        Whether prompts are in the model's chat template, for the advice in the warning.
    """

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._shares: dict[tuple[str, str], list[float]] = {}
        self._warned: set[tuple[str, str]] = set()

    def take(self, record: Record) -> str | None:
        """Count a record; return a warning the first time that its suite and mode prove weak, else None."""
        name = (record["suite"], record["mode"])
        shares = self._shares.setdefault(name, [])
        right = next((outcome["right"] for outcome in record["outcomes"] if outcome["policy"] == "full"), None)
        if right:
            shares.append(sum(right) / len(right))
        return self._warning(name) if len(shares) >= FEWEST else None

    def remaining(self) -> list[str]:
        """Return the warnings of suites and modes that are weak and were not reported yet, for the end of a run."""
        return [warning for name in self._shares if (warning := self._warning(name))]

    def _warning(self, name: tuple[str, str]) -> str | None:
        shares = self._shares[name]
        if name in self._warned or not shares or (right := sum(shares) / len(shares)) >= WEAK_BELOW:
            return None
        self._warned.add(name)
        advice = "try shorter prompts or another suite"
        if not self._chat:
            advice += "; an instruction-tuned model needs its chat template (--chat)"
        return (
            f"suite {name[0]}, question {name[1]}: the full cache answers {right:.0%} of {len(shares)} prompts right, "
            f"less than {WEAK_BELOW:.0%}, so this says little about compression: {advice}"
        )
