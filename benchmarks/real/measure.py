"""Measures policies on contexts; every outcome is written as it comes, so that a run that was cut off goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.real.choices import Attention, Rule
from benchmarks.real.contexts import Context
from benchmarks.real.full_cache import Engine, FullCache, Scored
from benchmarks.real.policies import (
    AFTER_OWN,
    FULL,
    KEEPS,
    LEAST,
    OWN,
    RANDOM,
    REREAD,
    RULES,
    STREAMING,
    Classes,
    layer_budgets,
    random_chunks,
    streaming,
)
from chunkkv.evaluation.records import append_record

if TYPE_CHECKING:
    from benchmarks.real.peers import Peers

IN, AFTER, FOLLOWS = "in", "after", "follows"
_FEWEST_WINDOW = 8
_FLUSH = 40  # outcomes that are written together


@dataclass(frozen=True)
class Wanted:
    """One outcome to measure: where the question stands, the task, the policy and the share kept per 10,000."""

    mode: str
    task: str
    policy: str
    keep: int

    @property
    def key(self) -> str:
        """The name of the outcome in the results file."""
        return f"{self.mode}|{self.task}|{self.policy}|{self.keep}"


def wanted(
    tasks: Sequence[str], peers: Sequence[str], classes: Sequence[str], keeps: Sequence[int] = KEEPS
) -> list[Wanted]:
    """Return all outcomes of a context."""
    everything = []
    reread = [name for name in (REREAD,) if peers]
    for mode, names, policies in (
        (IN, tasks, [*OWN, *[name for name in peers if "KVzip" not in name], *classes]),
        (AFTER, tasks, [*AFTER_OWN, *peers, *classes, *reread]),
        (FOLLOWS, (FOLLOWS,), [*AFTER_OWN, *peers, *classes, *reread]),
    ):
        for task in names:
            everything.append(Wanted(mode, task, FULL, 10_000))
            everything += [Wanted(mode, task, policy, keep) for policy in policies for keep in keeps]
    return everything


class Measurement:
    """Measures outcomes of contexts on one engine; `peers` adds kvpress and sets of tokens that differ by head."""

    def __init__(self, engine: Engine, peers: Peers | None = None, classes: dict[str, Classes] | None = None) -> None:
        self.engine, self.peers, self.classes = engine, peers, classes or {}
        tokenizer = engine.tokenizer
        self._delimiters = tokenizer.delimiter_token_table(vocab_size=engine.session.limits.vocab_size)

    def run(self, context: Context, missing: Iterable[Wanted]) -> Iterator[tuple[Wanted, int, Scored]]:
        """Yield the outcome, the tokens kept per head on average, and the scores, for all that is missing."""
        todo: dict[tuple[str, str], list[Wanted]] = {}
        for one in missing:
            todo.setdefault((one.mode, one.task), []).append(one)
        full = self.engine.prefill(context.ids)
        shared: _Prompt | None = None
        for (mode, task), outcomes in todo.items():
            fed: tuple[int, ...] = ()
            if mode == IN:
                asked = next(one for one in context.asked if one.name == task)
                whole = self.engine.append(full, asked.question)
                prompt = _Prompt(self, context, whole, len(asked.question), shared.zipped if shared else None)
                answer, first = asked.answer, max(asked.first_scored, 1)
            else:
                shared = prompt = shared or _Prompt(self, context, full, 0, None)
                if mode == AFTER:
                    asked = next(one for one in context.asked if one.name == task)
                    fed, answer, first = asked.question, asked.answer, asked.first_scored
                else:
                    answer, first = context.following, 1
            for outcome in outcomes:
                yield outcome, *prompt.score(outcome.policy, outcome.keep, fed, answer, first)


class _Prompt:
    """One compressed prompt: what was computed of it is kept for the next policy."""

    def __init__(
        self, run: Measurement, context: Context, full: FullCache, question: int, zipped: np.ndarray | None
    ) -> None:
        self._run, self._context, self._full, self._question = run, context, full, question
        self.zipped = zipped
        self._attention: Attention | None = None
        self._press: Any = None

    @property
    def attention(self) -> Attention:
        """Attention of the last queries."""
        if self._attention is None:
            self._attention = Attention(self._full, self._run._delimiters[self._full.ids])
        return self._attention

    def score(
        self, policy: str, keep: int, fed: Sequence[int], answer: Sequence[int], first: int
    ) -> tuple[int, Scored]:
        """Return the kept tokens per head and the scored answer."""
        length = len(self._full)
        if policy == FULL:
            return length, self._run.engine.score(self._full, None, fed, answer, first)
        count = min(length, max(LEAST, length * keep // 10_000))
        kept = self._kept(policy, keep, count)
        if kept.dtype == bool:
            from benchmarks.real.peers import same_count

            mask, even = kept, same_count(kept)
            if even is None:
                assert self._run.peers is not None
                return int(mask.sum() // mask[..., 0].size), self._run.peers.score(self._full, mask, fed, answer, first)
            kept = even
        return kept.shape[2], self._run.engine.score(self._full, kept, fed, answer, first)

    def _kept(self, policy: str, keep: int, count: int) -> np.ndarray:
        """Return positions [layers,Hkv,N], or a mask bool [layers,Hkv,L]."""
        length = len(self._full)
        shape = (len(self._full.keys), self._full.keys[0].shape[0])
        if policy == STREAMING:
            return streaming(length, count, shape)
        if policy == RANDOM:
            return random_chunks(length, count, shape, seed=len(self._context.name))
        if policy in RULES:
            return self.attention.kept(self._of_request(RULES[policy]), count)
        if policy in self._run.classes:
            return self._classes(self._run.classes[policy], keep)
        if policy == REREAD:
            rule = RULES["ChunkKV"]
            scores = self._zipped().max(axis=1)[:, : length - rule.window]
            mask = layer_budgets(scores, self.attention.starts(rule), rule.window, count)
            return np.broadcast_to(mask[:, None], (*shape, length))
        if self._press is None:
            from benchmarks.real.peers import PromptScores

            assert self._run.peers is not None, f"{policy} needs the extra peers"
            zipped = self._zipped() if not self._question else self.zipped
            self._press = PromptScores(self._run.peers, self._full, zipped)
        return self._press.kept(policy, count)

    def _zipped(self) -> np.ndarray:
        if self.zipped is None:
            assert self._run.peers is not None
            self.zipped = self._run.peers.kvzip_scores(self._full.ids)
        return self.zipped

    def _of_request(self, rule: Rule) -> Rule:
        if rule.request_window >= 0:
            return rule
        question = self._question or rule.window
        return replace(rule, request_window=min(max(question, _FEWEST_WINDOW), rule.window))

    def _classes(self, classes: Classes, keep: int) -> np.ndarray:
        length = len(self._full)
        reading, _ = classes.counts(length, keep)
        rule = replace(RULES["ChunkKV, a choice per head"])
        chosen = (
            self.attention.kept(rule, reading)
            if reading < length
            else np.broadcast_to(np.arange(length), (*classes.reading.shape, length))
        )
        return classes.mask(length, keep, chosen)


def measured(path: Path) -> dict[str, dict[str, Any]]:
    """Return per context the outcomes in a results file; a last line that was cut off is left out."""
    contexts: dict[str, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        record = json.loads(line)
        entry = contexts.setdefault(record["context"], {**record, "outcomes": {}, "seconds": 0.0})
        entry["outcomes"] |= record["outcomes"]
        entry["seconds"] += record["seconds"]
    return contexts


def measure_context(
    run: Measurement, context: Context, everything: Sequence[Wanted], path: Path, advance: Callable[[int], None]
) -> None:
    """Measure what `path` lacks of a context, and append it."""
    known = measured(path).get(context.name, {}).get("outcomes", {})
    missing = [one for one in everything if one.key not in known]
    advance(len(everything) - len(missing))
    if not missing:
        return
    pending: dict[str, Any] = {}
    start = time.process_time()

    def flush() -> None:
        nonlocal start
        if pending:
            append_record(
                path, {**_head(context), "seconds": round(time.process_time() - start, 1), "outcomes": pending}
            )
        pending.clear()
        start = time.process_time()

    for one, kept, scored in run.run(context, missing):
        right = "".join(map(str, scored.right))
        pending[one.key] = [kept, right, round(float(np.sum(scored.log_probabilities)), 3)]
        if len(pending) == _FLUSH:
            flush()
        advance(1)
    flush()


def _head(context: Context) -> dict[str, Any]:
    return {
        "context": context.name,
        "kind": context.kind,
        "length": context.length,
        "tokens": len(context.ids),
    }
