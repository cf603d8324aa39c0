"""Runs suites with policies on one engine; results are appended as they come, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.policies import Choice, Policy, check_policy
from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.runner import Answers, PromptRunner
from chunkkv.evaluation.statistics import jaccard
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import Example
from chunkkv.evaluation.texts.suites import Cell, Suite, check_suite
from chunkkv.evaluation.texts.templates import Wording
from chunkkv.session import ChunkKVSession
from chunkkv.settings import KEEP_SCALE, ChunkKVSettings

RECORDS_FILE = "records.jsonl"
FORMAT, FORMAT_VERSION = "chunkkv-evaluation", 1
MODES = ("in", "after")
SAMPLES = 8  # examples per cell whose agreement between layers and answers are recorded, too
_ANSWER_CHARACTERS = 120

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be run: every suite's cells for the prompt lengths, in the modes, `examples` of each.

    `keeps` are shares of 10,000. `engine` says which engine it is, so that results of two are never mixed.
    """

    suites: tuple[Suite, ...]
    policies: tuple[Policy, ...]
    keeps: tuple[int, ...]
    lengths: tuple[int, ...]
    modes: tuple[str, ...]
    examples: int
    seed: int
    wording: Wording
    chat: bool = False
    engine: str = ""

    def header(self, settings: ChunkKVSettings) -> Record:
        """Return what the first line of the results says of the run, as plain JSON values."""
        policies = [{"name": policy.name, "settings": policy.settings.to_dict()} for policy in self.policies]
        files = {suite.name: suite.content for suite in self.suites if suite.content}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "engine": self.engine,
            "settings": settings.to_dict(),
            "suites": [suite.name for suite in self.suites],
            **({"files": files} if files else {}),
            "policies": policies,
            "keeps": list(self.keeps),
            "lengths": list(self.lengths),
            "modes": list(self.modes),
            "examples": self.examples,
            "seed": self.seed,
            "wording": self.wording.name,
            "chat": self.chat,
        }


@dataclass(frozen=True)
class _Work:
    """One example in one mode."""

    suite: Suite
    cell: Cell
    mode: str
    index: int

    def key(self) -> Record:
        return {"suite": self.suite.name, "mode": self.mode, "cell": self.cell, "index": self.index}


class Evaluator:
    """Runs a plan on a session; raises ConfigError for a plan that the engine or the wording cannot serve.

    At every keep ratio all policies keep the same number of tokens: N(L) of the engine's settings, with min_tokens
    raised to what the most demanding policy needs.
    """

    def __init__(self, session: ChunkKVSession, plan: Plan) -> None:
        engine, self._tokenizer = settings_and_tokenizer(session)
        for suite in plan.suites:
            check_suite(suite, plan.wording.general)
        longest = session.limits.max_input_len
        if too_long := next((length for length in plan.lengths if length > longest), None):
            raise ConfigError(f"lengths has {too_long}; this engine takes prompts of at most {longest} tokens")
        for policy in plan.policies:
            check_policy(policy, engine)
        self._plan, self._engine = plan, engine
        self._runner = PromptRunner(session)
        self._frame = PromptFrame(self._tokenizer, plan.chat)
        least = max(policy.least_tokens for policy in plan.policies)
        self._budget = _with_least(engine, max(engine.min_tokens, least))
        self._sees_caches = self._runner.sees_caches()
        named = [policy.name for policy in plan.policies if policy.rule not in ("full", "engine")]
        if named and not self._sees_caches:
            raise ConfigError(
                f"policies names {named[0]}, but this engine compacts within prefill: give full and engine only, or "
                "build for backend onnxruntime"
            )

    def work(self) -> list[_Work]:
        """Return the examples to run, in order."""
        plan = self._plan
        return [
            _Work(suite, cell, mode, index)
            for suite in plan.suites
            for cell in suite.cells(plan.lengths, self._engine)
            for mode in plan.modes
            if mode in suite.modes
            for index in range(1 if "line" in cell else plan.examples)
        ]

    def run(self, folder: Path, advance: Callable[[int], None] = lambda count: None) -> list[Record]:
        """Run what is missing in `folder` and return all records; `advance` is told of every example that is there.

        Raises ConfigError where the folder holds the results of another run.
        """
        header = self._plan.header(self._engine)
        path = folder / RECORDS_FILE
        records = _resumed(path, header)
        work = self.work()
        _check_order(path, records, work)
        advance(len(records))
        with path.open("a", encoding="utf-8") as file:
            if not records and file.tell() == 0:
                _append(file, header)
            for item in work[len(records) :]:
                records.append(self._run(item))
                _append(file, records[-1])
                advance(1)
        return records

    def _run(self, work: _Work) -> Record:
        seed = work.suite.seed(self._plan.seed, work.cell, work.index)
        example = work.suite.make(PromptWriter(self._tokenizer, self._plan.wording, self._frame, seed), work.cell)
        ids, questions = example.prompt(work.mode)
        variants = list(self._variants(len(ids)))
        if self._sees_caches:
            prompt = self._runner.prefill(ids, seed=work.index + (self._plan.seed << 32))
            choices: list[Choice | None] = [policy.keep(prompt, kept) for policy, _, kept in variants]
            answers = self._runner.answer(prompt, [choice for choice in choices if choice is not None], questions)
        else:
            choices = [None] * len(variants)
            answers = [self._runner.answer_compressed(ids, kept, questions) for _, _, kept in variants]
        outcomes = []
        for (policy, keep, kept), choice, given in zip(variants, choices, answers, strict=True):
            outcome = {"policy": policy.name, "keep": keep, "kept": kept, **self._judged(questions, given)}
            if choice is not None:
                outcome |= _seen(policy, choice, example, len(ids), work.index < SAMPLES)
            if work.index >= SAMPLES:
                del outcome["answers"]
            outcomes.append(outcome)
        return {**work.key(), "tokens": len(ids), "pieces": [q.pieces() for q in questions], "outcomes": outcomes}

    def _variants(self, length: int) -> Iterator[tuple[Policy, int, int]]:
        """Yield policy, keep per 10,000 and kept tokens; what keeps everything runs once."""
        for policy in self._plan.policies:
            for keep in self._plan.keeps:
                if not policy.compresses:
                    yield policy, KEEP_SCALE, length
                    break
                if keep < KEEP_SCALE:
                    yield policy, keep, self._budget.kept_tokens(length, keep)

    def _judged(self, questions: Sequence[Any], answers: Answers) -> Record:
        texts = [self._tokenizer.decode(tokens) for tokens in answers]
        asked = list(zip(questions, answers, texts, strict=True))
        return {
            "right": [int(question.is_right(tokens, text)) for question, tokens, text in asked],
            "through": [question.right_through(tokens, text) for question, tokens, text in asked],
            "answers": [text[:_ANSWER_CHARACTERS] for text in texts],
        }


def _with_least(settings: ChunkKVSettings, least: int) -> ChunkKVSettings:
    values = settings.to_dict()
    return ChunkKVSettings.from_dict({**values, "min_tokens": least, "budget_tokens": 0})


def _seen(policy: Policy, choice: Choice, example: Example, length: int, sample: bool) -> Record:
    """Return the share of the answers' tokens that was kept, on average over layers, and how the layers agree."""
    useful = [position for first, end in example.spans for position in range(first, end)]
    found: Record = {}
    if useful:
        found["useful"] = round(float(np.mean([np.isin(useful, kept).mean() for kept in choice])), 4)
    if sample and policy.compresses:
        agreement = jaccard(choice, policy.settings.sinks, length - policy.settings.window)
        found["jaccard"] = [[round(float(value), 4) for value in row] for row in agreement]
    return found


def _is_whole(record: Record) -> bool:
    """Return whether a record has what tables are made of."""
    outcomes, pieces = record.get("outcomes"), record.get("pieces")
    if not (isinstance(record.get("tokens"), int) and isinstance(outcomes, list) and isinstance(pieces, list)):
        return False
    known = {"policy": str, "keep": int, "kept": int, "right": list, "through": list}
    return all(
        isinstance(outcome, dict)
        and all(isinstance(outcome.get(name), kind) for name, kind in known.items())
        and len(outcome["right"]) == len(outcome["through"]) == len(pieces) > 0
        for outcome in outcomes
    )


def _append(file: Any, record: Record) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _resumed(path: Path, header: Record) -> list[Record]:
    """Return the records of an earlier run of the same plan; a line that was cut off is removed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    records = read_records(path, whole)
    if len(records) == 1:  # a run that never began
        records, whole = [], b""
    if records and records[0] != json.loads(json.dumps(header)):
        changed = sorted(name for name in header if records[0].get(name) != json.loads(json.dumps(header[name])))
        raise ConfigError(
            f"output_dir {path.parent} holds the results of another run, with other {', '.join(changed)}: "
            "give another directory, or the same flags to go on"
        )
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return records[1:]


def read_records(path: Path, data: bytes | None = None) -> list[Record]:
    """Return the header and the records of a results file; raises ConfigError for anything else."""
    try:
        lines = (path.read_bytes() if data is None else data).decode("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (ValueError, OSError, RecursionError) as problem:
        raise ConfigError(f"{path} cannot be read as results of an evaluation: {problem}") from None
    known = not records or (isinstance(records[0], dict) and records[0].get("format") == FORMAT)
    if not known or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{path} is no file of results; give another output_dir")
    if records and records[0].get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version is {records[0].get('format_version')!r}, not {FORMAT_VERSION}")
    return records


def _check_order(path: Path, records: list[Record], work: list[_Work]) -> None:
    for number, (record, item) in enumerate(zip(records, work, strict=False), 2):
        if not _is_whole(record):
            raise ConfigError(f"{path} line {number} is damaged; remove it and what follows it to go on from there")
        if any(record.get(name) != value for name, value in item.key().items()):
            raise ConfigError(f"{path} has {record.get('suite')!r} where {item.key()} was to come; remove the file")
    if len(records) > len(work):
        raise ConfigError(f"{path} holds {len(records)} records for {len(work)} examples; remove the file")
