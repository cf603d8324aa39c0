"""Prefills a prompt once, keeps of it what many policies choose, and lets each answer: all as rows of one decode."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.errors import BackendUnavailableError, RequestError
from chunkkv.evaluation.prefilled import PrefilledPrompt
from chunkkv.evaluation.texts.questions import Question
from chunkkv.executors.onnxruntime.prefill import BlockwisePrefiller
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession

CACHE_BYTES = 1 << 30  # of the rows that are decoded together; one row may have more

Answers = list[list[int]]  # per question the generated token ids


class PromptRunner:
    """Runs prompts on a session's engine; raises BackendUnavailableError where its caches cannot be read.

    Answers are greedy. The same calls in the same order give the same answers, whatever ran before.
    """

    def __init__(self, session: ChunkKVSession) -> None:
        self.session = session
        self._executor = session._executor
        tokenizer = session.tokenizer
        vocab_size = session.limits.vocab_size
        self._delimiters = None if tokenizer is None else tokenizer.delimiter_token_table(vocab_size=vocab_size)

    def sees_caches(self) -> bool:
        """Return whether the engine leaves a prompt's whole cache where a policy can look at it."""
        return isinstance(self._executor.prefiller(), BlockwisePrefiller)

    def prefill(self, ids: np.ndarray, seed: int = 0) -> PrefilledPrompt:
        """Prefill one prompt [L] and keep all of it; raises RequestError for a prompt the engine cannot take."""
        prefiller: Any = self._executor.prefiller()
        if not isinstance(prefiller, BlockwisePrefiller):
            raise BackendUnavailableError(
                "this engine compacts within prefill, so no policy but 'engine' can choose: "
                "build for backend onnxruntime to compare policies"
            )
        request = make_requests([ids], None, self.session.limits, None, None, None, 0)[0]
        cache = self._executor.new_cache(1, len(ids))
        logits, queries = prefiller.fill(request.ids, cache, threading.Event())
        assert logits is not None
        found = {layer: query[0] for layer, query in queries.items()}
        prompt = PrefilledPrompt(request.ids, logits, cache, found, self._delimiters, seed)
        if self.session.settings is not None:
            prompt.engine_choice = lambda kept: self._engine_choice(prompt, queries, kept)
        return prompt

    def _engine_choice(self, prompt: PrefilledPrompt, queries: dict[int, np.ndarray], kept: int) -> list[np.ndarray]:
        settings = self.session.settings
        assert settings is not None
        executor: Any = self._executor
        out = executor.new_cache(1, kept)
        chosen = executor.compress(prompt.cache, queries, prompt.ids, settings.keep_per_10k, kept, out).kept_indices
        return [chosen[settings.leader_of(group)] for group in settings.layer_groups for _ in group]

    def answer(
        self, prompt: PrefilledPrompt, choices: Sequence[Sequence[np.ndarray]], questions: Sequence[Question]
    ) -> list[Answers]:
        """Answer every question on every choice's cache; a choice lists per layer the ascending positions kept.

        Each question starts from the compressed prompt, not from the answers to others.
        """
        answers: list[Answers] = [[] for _ in choices]
        room = self._room(len(prompt), questions)
        for numbers in self._batches(choices, room):
            lengths = np.array([[len(kept) for kept in choices[number]] for number in numbers], np.int32)  # [B,layers]
            cache = self._executor.new_cache(len(numbers), int(lengths.max()) + room)
            for row, number in enumerate(numbers):
                _compact(prompt.cache, choices[number], cache, row)
            decoder = self._decoder(cache, lengths)
            for question in questions:
                found = self._ask(decoder, lengths, (len(prompt), prompt.logits), question)
                for number, tokens in zip(numbers, found, strict=True):
                    answers[number].append(tokens)
        return answers

    def answer_compressed(self, ids: np.ndarray, kept: int, questions: Sequence[Question]) -> Answers:
        """Answer every question on what the engine itself keeps of a prompt: `kept` tokens; runs on any executor."""
        settings = self.session.settings
        budget = None if settings is None or kept >= len(ids) else kept
        request = make_requests([ids], None, self.session.limits, settings, None if budget else 1.0, budget, 0)[0]
        if request.kept_tokens != kept:
            raise RequestError(f"{kept} tokens were to be kept, this engine keeps {request.kept_tokens}")
        room = self._room(len(ids), questions)
        cache = self._executor.new_cache(1, self._executor.capacity_for(kept + room))
        prefilled = self._executor.prefiller().run([request], cache.rows(0, 1), threading.Event())[0]
        decoder = self._executor.decoder(cache)
        lengths = np.array([[kept]], np.int32)
        return [self._ask(decoder, lengths, (len(ids), prefilled.logits), question)[0] for question in questions]

    def _room(self, length: int, questions: Sequence[Question]) -> int:
        """Return how many tokens may follow a prompt of `length`; raises RequestError where the engine has no room."""
        room = max(len(question.ids) + question.max_new_tokens for question in questions)
        if length + room > self.session.limits.max_seq_len:
            raise RequestError(
                f"a prompt of {length} tokens with question and answer makes {length + room}; this engine takes "
                f"{self.session.limits.max_seq_len}: ask for a shorter one, or build with a larger --max_seq_len"
            )
        return room

    def _batches(self, choices: Sequence[Sequence[np.ndarray]], room: int) -> list[list[int]]:
        """Return the choices in batches of like size: layers of unequal length apart, large caches apart from small."""
        token_bytes = self._executor.kv_bytes_per_token
        most = [max(map(len, choice)) for choice in choices]
        uneven = [min(map(len, choice)) < size for choice, size in zip(choices, most, strict=True)]
        batches: list[list[int]] = []
        for number in sorted(range(len(choices)), key=lambda number: (uneven[number], most[number], number)):
            last = batches[-1] if batches else []
            rows = len(last) + 1
            fits = rows <= self.session.limits.max_batch_size
            fits = fits and rows * (most[number] + room) * token_bytes <= CACHE_BYTES
            if last and fits and uneven[last[0]] == uneven[number]:
                last.append(number)
            else:
                batches.append([number])
        return batches

    def _decoder(self, cache: Any, lengths: np.ndarray) -> Any:
        """Return a decoder for rows whose layers hold `lengths` [B,layers] tokens."""
        executor: Any = self._executor
        even = (lengths == lengths[:, :1]).all()
        return executor.decoder(cache) if even else executor.layer_lengths_decoder(cache)

    def _ask(
        self, decoder: Any, lengths: np.ndarray, prefilled: tuple[int, np.ndarray], question: Question
    ) -> list[list[int]]:
        """Feed the question to all rows, then generate until every row is finished; returns each row's tokens."""
        length, logits = prefilled
        rows = len(lengths)
        steps = 0
        tokens: list[list[int]] = [[] for _ in range(rows)]
        logits = np.broadcast_to(logits, (rows, len(logits)))
        for token in question.ids:
            logits = _step(decoder, [token] * rows, length + steps, lengths + steps)
            steps += 1
        while True:
            for row in range(rows):
                if not self._finished(question, tokens[row]):
                    tokens[row].append(int(logits[row].argmax()))
            if all(self._finished(question, given) for given in tokens):
                return tokens
            logits = _step(decoder, [given[-1] for given in tokens], length + steps, lengths + steps)
            steps += 1

    def _finished(self, question: Question, given: list[int]) -> bool:
        if not given:
            return False
        return (
            given[-1] in self.session.eos_token_ids
            or len(given) >= question.max_new_tokens
            or question.is_settled(given)
        )


def _step(decoder: Any, tokens: list[int], position: int, lengths: np.ndarray) -> np.ndarray:
    """Run one step: a token per row at one logical position, written behind `lengths` [B,layers] slots; [B,vocab]."""
    decoder.input_ids[:, 0] = tokens
    decoder.position_ids[:, 0] = position
    decoder.cache_lengths[:] = lengths[:, 0]
    if hasattr(decoder, "layer_lengths"):
        decoder.layer_lengths[:] = lengths.T
    return decoder.run()


def _compact(full: Any, choice: Sequence[np.ndarray], out: Any, row: int) -> None:
    """Copy the kept positions of every layer to the first slots of a row (section 5 of the op contract)."""
    for source, target in ((full.keys, out.keys), (full.values, out.values)):
        for layer, kept in enumerate(choice):
            target[layer][row, :, : len(kept)] = source[layer][0][:, kept]
