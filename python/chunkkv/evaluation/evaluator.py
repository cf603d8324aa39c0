"""Runs suites with policies on one engine; results are appended as they come, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunkkv.contexts.scorers import SCORERS, default_scorer
from chunkkv.errors import ConfigError
from chunkkv.evaluation.policies import KeptPositions, Policy, check_policy
from chunkkv.evaluation.records import (
    FORMAT,
    FORMAT_VERSION,
    RECORDS_FILE,
    Record,
    append_record,
    check_records,
    resume_records,
)
from chunkkv.evaluation.requirements import settings_and_tokenizer
from chunkkv.evaluation.run_time import READINGS, Work
from chunkkv.evaluation.runner import Answers, PromptRunner
from chunkkv.evaluation.statistics import jaccard
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import Example, Question
from chunkkv.evaluation.texts.suites import Cell, Suite, check_suite
from chunkkv.evaluation.texts.templates import Wording
from chunkkv.limits import KEEP_SCALE
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings

MODES = ("in", "after")
SAMPLES = 8  # examples per cell whose agreement between layers and answers are recorded, too
_ANSWER_CHARACTERS = 120

_Variant = tuple[Policy, int, int]  # a policy, what it keeps of 10,000 tokens, and what it keeps of a prompt


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Parameters
    ----------
    suites : tuple[Suite, ...]
        The suites, each once.
    policies : tuple[Policy, ...]
        The policies that are compared, each once.
    keeps : tuple[int, ...]
        Keep ratios in shares of 10,000, in (0, 10000]. A policy that compresses runs once per ratio below 10,000.
    lengths : tuple[int, ...]
        Prompt lengths in tokens of the generated suites.
    modes : tuple[str, ...]
        "in": the question is part of the compressed prompt. "after": it is asked of the compressed context.
    examples : int
        Examples per cell of a generated suite.
    seed : int
        Seed of all texts.
    wording : Wording
        How the generated texts are put.
    chat : bool, default False
        Whether prompts are put into the engine's chat template.
    engine : str, default ""
        Fingerprint of the engine (see engine_fingerprint), so that results of two engines are never mixed.
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
        """Return the first line of the results file: what the run is, as plain JSON values."""
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
class PlannedExample:
    """One example of a plan in one mode."""

    suite: Suite
    cell: Cell
    mode: str
    index: int

    def key(self) -> Record:
        """Return what identifies the example in the results file."""
        return {"suite": self.suite.name, "mode": self.mode, "cell": self.cell, "index": self.index}


class Evaluator:
    """Runs a plan on a session's engine.

    At every keep ratio all policies keep the same number of tokens: N(L) of the engine's settings, with min_tokens
    raised to what the most demanding policy needs.

    Parameters
    ----------
    session : ChunkKVSession
        The engine. Policies other than "full" and "engine" need one that leaves a prompt's whole cache readable
        (backend onnxruntime).
    plan : Plan
        What is run.

    Raises
    ------
    ConfigError
        For a plan that the engine or the wording cannot serve.
    EngineMismatchError
        For an engine without ChunkKV or without a tokenizer.
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
        self._session, self._plan, self._engine = session, plan, engine
        self._runner = PromptRunner(session)
        self._frame = PromptFrame(self._tokenizer, plan.chat)
        least = max(policy.least_tokens for policy in plan.policies)
        self._budget = dataclasses.replace(engine, min_tokens=max(engine.min_tokens, least), budget_tokens=0)
        self._sees_caches = self._runner.sees_caches()
        reading = [policy.name for policy in plan.policies if policy.reads_cache]
        if reading and not self._sees_caches:
            raise ConfigError(
                f"policies names {reading[0]}, but this engine compacts within prefill, or its heads or layers keep "
                "unequal tokens: give full and engine only, or build for backend onnxruntime with one choice per layer"
            )

    def examples(self) -> list[PlannedExample]:
        """Return the examples to run, in order."""
        plan = self._plan
        return [
            PlannedExample(suite, cell, mode, index)
            for suite in plan.suites
            for cell in suite.cells(plan.lengths, self._engine)
            for mode in plan.modes
            if mode in suite.modes
            for index in range(1 if "line" in cell else plan.examples)
        ]

    def work(self) -> Work:
        """Return what a prompt of the plan takes, on average over its modes."""
        together, alone, readings = 0, 0, 0.0
        below = sum(keep < KEEP_SCALE for keep in self._plan.keeps)
        for policy in self._plan.policies:
            rows = below if policy.compresses else 1
            if self._chooses_here(policy):
                together += rows
            else:
                alone += rows
                rereads = [self._rereads(policy, mode) for mode in self._plan.modes]
                readings += rows * float(np.mean([READINGS if again else 1.0 for again in rereads]))
        return Work(together, alone, readings, float(np.mean([mode == "after" for mode in self._plan.modes])))

    def _chooses_here(self, policy: Policy) -> bool:
        """Return whether a policy chooses from the prefill that all share; else the engine runs the prompt for it."""
        return self._sees_caches and policy.scorer is None

    def _rereads(self, policy: Policy, mode: str) -> bool:
        if policy.scorer is not None:
            return SCORERS[policy.scorer].rereads
        return policy.compresses and default_scorer(self._session, mode == "after").rereads

    def lengths_to_come(self, folder: Path) -> tuple[list[int], int]:
        """Return the lengths in tokens of the prompts that `folder` has no results of, and the number of all.

        A prompt of a file counts as long as the longest of `plan.lengths`.
        """
        planned = self.examples()
        path = folder / RECORDS_FILE
        done = max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0
        longest = max(self._plan.lengths, default=0)
        return [example.cell.get("length", longest) for example in planned[done:]], len(planned)

    def run(
        self,
        folder: Path,
        advance: Callable[[int], None] = lambda count: None,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> list[Record]:
        """Run the examples that `folder` has no results of, and return the records of all.

        Parameters
        ----------
        folder : Path
            Where the results are kept; made where it is missing. An interrupted run continues from here.
        advance : Callable[[int], None]
            Called with the number of examples that were done before, then with 1 after each example.
        on_record : Callable[[Record], None]
            Called with every record, those that were done before included.

        Raises
        ------
        ConfigError
            Where the folder holds the results of another run, or damaged ones.
        """
        path = folder / RECORDS_FILE
        records = resume_records(path, self._plan.header(self._engine))
        planned = self.examples()
        check_records(path, records, [example.key() for example in planned])
        advance(len(records))
        for record in records:
            on_record(record)
        for example in planned[len(records) :]:
            records.append(self._run(example))
            append_record(path, records[-1])
            on_record(records[-1])
            advance(1)
        return records

    def _run(self, planned: PlannedExample) -> Record:
        seed = planned.suite.seed(self._plan.seed, planned.cell, planned.index)
        writer = PromptWriter(self._tokenizer, self._plan.wording, self._frame, seed)
        example = planned.suite.make(writer, planned.cell)
        ids, questions = example.prompt(planned.mode)
        variants = list(self._variants(len(ids)))
        choices, answers = self._answered(planned, ids, questions, variants)
        is_sample = planned.index < SAMPLES
        outcomes = []
        for (policy, keep, kept), choice, token_ids in zip(variants, choices, answers, strict=True):
            outcome = {"policy": policy.name, "keep": keep, "kept": kept, **self._judged(questions, token_ids)}
            if choice is not None:
                outcome |= _choice_quality(policy, choice, example, len(ids), is_sample)
            if not is_sample:
                del outcome["answers"]
            outcomes.append(outcome)
        pieces = [question.pieces() for question in questions]
        return {**planned.key(), "tokens": len(ids), "pieces": pieces, "outcomes": outcomes}

    def _answered(
        self, planned: PlannedExample, ids: np.ndarray, questions: Sequence[Question], variants: Sequence[_Variant]
    ) -> tuple[list[KeptPositions | None], list[Answers]]:
        """Return what every variant keeps of a prompt, where that can be seen, and how it answers."""
        choices: list[KeptPositions | None] = [None] * len(variants)
        answers: list[Answers] = [[] for _ in variants]
        here = [number for number, variant in enumerate(variants) if self._chooses_here(variant[0])]
        if here:
            prompt = self._runner.prefill(ids, seed=planned.index + (self._plan.seed << 32))
            seen = [variants[number][0].keep(prompt, variants[number][2]) for number in here]
            for number, choice, found in zip(here, seen, self._runner.answer(prompt, seen, questions), strict=True):
                choices[number], answers[number] = choice, found
        for number, (policy, _, kept) in enumerate(variants):
            if number not in here:
                later = planned.mode == "after"
                answers[number] = self._runner.answer_compressed(ids, kept, questions, later, policy.scorer)
        return choices, answers

    def _variants(self, length: int) -> Iterator[_Variant]:
        """Yield policy, keep per 10,000 and kept tokens; what keeps everything runs once."""
        for policy in self._plan.policies:
            for keep in self._plan.keeps:
                if not policy.compresses:
                    yield policy, KEEP_SCALE, length
                    break
                if keep < KEEP_SCALE:
                    yield policy, keep, self._budget.kept_tokens(length, keep)

    def _judged(self, questions: Sequence[Question], answers: Answers) -> Record:
        texts = [self._tokenizer.decode(tokens) for tokens in answers]
        answered = list(zip(questions, answers, texts, strict=True))
        return {
            "right": [int(question.is_right(tokens, text)) for question, tokens, text in answered],
            "through": [question.right_through(tokens, text) for question, tokens, text in answered],
            "answers": [text[:_ANSWER_CHARACTERS] for text in texts],
        }


def _choice_quality(
    policy: Policy, choice: KeptPositions, example: Example, length: int, with_agreement: bool
) -> Record:
    """Return the share of the answers' tokens that was kept, mean over layers, and optionally how the layers agree."""
    answer_positions = [position for first, end in example.spans for position in range(first, end)]
    quality: Record = {}
    if answer_positions:
        quality["useful"] = round(float(np.mean([np.isin(answer_positions, kept).mean() for kept in choice])), 4)
    if with_agreement and policy.compresses:
        agreement = jaccard(choice, policy.settings.sinks, length - policy.settings.window)
        quality["jaccard"] = [[round(float(value), 4) for value in row] for row in agreement]
    return quality
