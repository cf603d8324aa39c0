"""Measures policies on contexts; every outcome is written as it comes, so that a run that was cut off goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.real.choices import Attention
from benchmarks.real.contexts import Context
from benchmarks.real.full_cache import Engine, FullCache, Scored
from benchmarks.real.policies import (
    FULL,
    KEEPS,
    LEAST,
    ONLY_AFTER,
    ONLY_IN,
    OWN,
    RANDOM,
    RULES,
    STREAMING,
    random_chunks,
    streaming,
)
from chunkkv.evaluation.records import append_record

if TYPE_CHECKING:
    from benchmarks.real.peers import Peers
    from benchmarks.real.products import Product

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
    tasks: Sequence[str],
    policies: Sequence[str],
    keeps: Sequence[int] = KEEPS,
    modes: Sequence[str] = (AFTER, FOLLOWS, IN),
) -> list[Wanted]:
    """Return all outcomes of a context: the full cache, and policies where they can be."""
    everything = []
    for mode in modes:
        names = [name for name in policies if name not in (ONLY_AFTER if mode == IN else ONLY_IN)]
        for task in (FOLLOWS,) if mode == FOLLOWS else tasks:
            everything.append(Wanted(mode, task, FULL, 10_000))
            everything += [Wanted(mode, task, policy, keep) for policy in names for keep in keeps]
    return everything


class Measurement:
    """Measures outcomes of contexts on one engine; `peers` adds kvpress, `products` policies with their own engines."""

    def __init__(
        self, engine: Engine, peers: Peers | None = None, products: Mapping[str, Product] = MappingProxyType({})
    ) -> None:
        self.engine, self.peers, self.products = engine, peers, products
        tokenizer = engine.tokenizer
        self.delimiters = tokenizer.delimiter_token_table(vocab_size=engine.session.limits.vocab_size)

    def run(self, context: Context, missing: Iterable[Wanted]) -> Iterator[tuple[Wanted, int, Scored]]:
        """Yield the outcome, the tokens kept per head on average, and the scores, for all that is missing."""
        todo: dict[tuple[str, str], list[Wanted]] = {}
        for one in missing:
            todo.setdefault((one.mode, one.task), []).append(one)
        if all(one.policy in self.products for outcomes in todo.values() for one in outcomes):
            text = _Prompt(self, context, None, np.array(context.ids))
        else:
            full = self.engine.prefill(context.ids)
            text = _Prompt(self, context, full, full.ids)
        for (mode, task), outcomes in todo.items():
            if mode == FOLLOWS:
                yield from text.score(outcomes, (), context.following, 1)
                continue
            asked = next(one for one in context.asked if one.name == task)
            if mode == AFTER:
                yield from text.score(outcomes, asked.question, asked.answer, asked.first_scored)
            else:
                yield from text.asked(asked.question).score(outcomes, (), asked.answer, max(asked.first_scored, 1))


class _Prompt:
    """One prompt that is compressed: what was computed of it is kept for the next policy."""

    def __init__(
        self, run: Measurement, context: Context, full: FullCache | None, ids: np.ndarray, before: _Prompt | None = None
    ) -> None:
        self._run, self._context, self._full, self._ids, self._before = run, context, full, ids, before

    def asked(self, question: Sequence[int]) -> _Prompt:
        """Return the prompt that goes on with a question."""
        full = self._full and self._run.engine.append(self._full, question)
        ids = np.concatenate([self._ids, np.array(question)])
        return _Prompt(self._run, self._context, full, ids, before=self)

    @property
    def full(self) -> FullCache:
        """The full cache."""
        assert self._full is not None
        return self._full

    @property
    def peers(self) -> Peers:
        """kvpress."""
        assert self._run.peers is not None, "this policy needs the extra peers"
        return self._run.peers

    @cached_property
    def attention(self) -> Attention:
        """Attention of the last queries."""
        return Attention(self.full, self._run.delimiters[self._ids])

    @cached_property
    def reading(self) -> tuple[np.ndarray | None, list[Any]]:
        """KVzip's scores where the prompt ends with the text, and the inputs of all layers."""
        if self._before is None:
            return self.peers.read(self._ids)
        return None, self.peers.read_on(self.full, self._before.reading[1])

    @cached_property
    def presses(self) -> Any:
        """What kvpress scores."""
        from benchmarks.real.peers import PromptScores

        zipped, hidden = self.reading
        return PromptScores(self.peers, self.full, hidden, zipped)

    def score(
        self, outcomes: Sequence[Wanted], fed: Sequence[int], answer: Sequence[int], first: int
    ) -> Iterator[tuple[Wanted, int, Scored]]:
        """Yield outcome, kept tokens per head and scored answer of all outcomes, kvpress's together at the end."""
        length, masked = len(self._ids), []
        for one in outcomes:
            if one.policy == FULL:
                yield one, length, self._run.engine.score(self.full, None, fed, answer, first)
            elif one.policy in self._run.products:
                yield one, *self._run.products[one.policy].score(self._ids, one.keep, fed, answer, first)
            elif one.policy in OWN:
                kept = self._kept(one)
                yield one, kept.shape[2], self._run.engine.score(self.full, kept, fed, answer, first)
            else:
                masked.append(one)
        if masked:
            masks = [self.presses.kept(one.policy, self._count(one)) for one in masked]
            for one, mask, scored in zip(
                masked, masks, self.peers.score(self.full, masks, fed, answer, first), strict=True
            ):
                yield one, int(mask.sum() // mask[..., 0].size), scored

    def _count(self, one: Wanted) -> int:
        length = len(self._ids)
        return min(length, max(LEAST, length * one.keep // 10_000))

    def _kept(self, one: Wanted) -> np.ndarray:
        """Return positions [layers,Hkv,N]."""
        length, count = len(self._ids), self._count(one)
        shape = (len(self.full.keys), self.full.keys[0].shape[0])
        if one.policy == STREAMING:
            return streaming(length, count, shape)
        if one.policy == RANDOM:
            return random_chunks(length, count, shape, seed=len(self._context.name))
        rule = RULES[one.policy]
        if rule.request_window < 0:
            question = length - len(self._context.ids) or rule.window
            rule = replace(rule, request_window=min(max(question, _FEWEST_WINDOW), rule.window))
        return self.attention.kept(rule, count)


def measured(*paths: Path) -> dict[str, dict[str, Any]]:
    """Return per context the outcomes in results files; a last line that was cut off is left out."""
    contexts: dict[str, dict[str, Any]] = {}
    texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]
    for line in (line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()):
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
                path, {**context_head(context), "seconds": round(time.process_time() - start, 1), "outcomes": pending}
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


def context_head(context: Context) -> dict[str, Any]:
    """Return what a record says of its context."""
    return {
        "context": context.name,
        "kind": context.kind,
        "length": context.length,
        "tokens": len(context.ids),
    }
