"""Prefills once, applies each policy to a copy of the cache, and decodes all copies as one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from chunkkv.contexts.scorers import with_scorer
from chunkkv.errors import BackendUnavailableError, RequestError
from chunkkv.evaluation.prefilled import PrefilledPrompt
from chunkkv.evaluation.texts.questions import Question
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.interface import BlockwisePrefiller, Decoder
from chunkkv.requests import make_requests
from chunkkv.sampling import check_finite
from chunkkv.session import ChunkKVSession

CACHE_BYTES = 1 << 30  # of the rows that are decoded together; one row may have more

Answers = list[list[int]]  # per question the generated token ids


class PromptRunner:
    """Runs prompts on a session's engine; raises BackendUnavailableError where its caches cannot be read.

    Answers are greedy. The same calls in the same order give the same answers, whatever ran before.
    """

    def __init__(self, session: ChunkKVSession) -> None:
        self.session = session
        self._executor = session.executor
        tokenizer = session.tokenizer
        vocab_size = session.limits.vocab_size
        self._delimiters = None if tokenizer is None else tokenizer.delimiter_token_table(vocab_size=vocab_size)

    def sees_caches(self) -> bool:
        """Return whether a policy can look at a prompt's whole cache and say what each layer keeps."""
        return self._executor.capabilities.blockwise_prefill and self._one_choice_per_layer()

    def _one_choice_per_layer(self) -> bool:
        settings = self.session.settings
        return settings is None or (settings.budget_split == "uniform" and settings.heads == "shared")

    def _prefiller(self) -> BlockwisePrefiller:
        if not self.sees_caches():
            raise BackendUnavailableError(
                "this engine compacts within prefill, so no policy but 'engine' can choose: "
                "build for backend onnxruntime to compare policies"
                if self._one_choice_per_layer()
                else "the heads of a layer choose apart in this engine, or its layers keep unequal numbers of tokens, "
                "so no policy but 'engine' can choose: build one with budget_split 'uniform' and heads 'shared'"
            )
        return self._executor.blockwise_prefiller()

    def prefill(self, ids: np.ndarray, seed: int = 0, window: int = 0) -> PrefilledPrompt:
        """Prefill one prompt [L] and keep all of it; raises RequestError for a prompt the engine cannot take.

        The last `window` queries choose in policy "engine", 0 stands for all of the engine's window.
        """
        prefiller = self._prefiller()
        request = make_requests([ids], None, self.session.limits, None, None, None, 0)[0]
        cache = prefiller.new_cache(1, len(ids))
        logits, queries = prefiller.fill(request.ids, cache, threading.Event())
        assert logits is not None
        row_queries = {layer: query[0] for layer, query in queries.items()}
        prompt = PrefilledPrompt(request.ids, logits, cache, row_queries, self._delimiters, seed)
        settings = self.session.settings
        if settings is not None:

            def engine_choice(kept: int) -> list[np.ndarray]:
                out = prefiller.new_cache(1, kept)
                choice = prefiller.compress(cache, queries, request.ids, settings.keep_per_10k, kept, out, window)
                leaders = [settings.leader_of(group) for group in settings.layer_groups for _ in group]
                return [choice.kept_indices[leader] for leader in leaders]

            prompt.engine_choice = engine_choice
        return prompt

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
            cache = self._prefiller().new_cache(len(numbers), int(lengths.max()) + room)
            for row, number in enumerate(numbers):
                _compact(prompt.cache, choices[number], cache, row)
            batch = self._batch(cache, lengths, len(prompt))
            for question in questions:
                rows_tokens = self._ask(batch, prompt.logits, question)
                for number, tokens in zip(numbers, rows_tokens, strict=True):
                    answers[number].append(tokens)
        return answers

    def answer_compressed(
        self,
        ids: np.ndarray,
        kept: int,
        questions: Sequence[Question],
        of_context: bool = False,
        scorer: str | None = None,
    ) -> Answers:
        """Answer every question on what the engine itself keeps of a prompt, as in use; runs on any executor.

        Raises RequestError, BackendUnavailableError or EngineMismatchError for what the engine cannot do.

        Parameters
        ----------
        ids : numpy.ndarray
            The prompt [L] int64.
        kept : int
            How many of its tokens stay.
        questions : sequence of Question
            What follows.
        of_context : bool, default False
            Whether the questions were unknown when the prompt was compressed.
        scorer : str or None, default None
            What scores its tokens; None for what the engine takes by itself.
        """
        settings = self.session.settings
        budget = None if settings is None or kept >= len(ids) else kept
        request = make_requests([ids], None, self.session.limits, settings, None if budget else 1.0, budget, 0)[0]
        if request.kept_tokens != kept:
            raise RequestError(f"{kept} tokens were to be kept, this engine keeps {request.kept_tokens}")
        request, _ = with_scorer(self.session, request, scorer, of_context)
        room = self._room(len(ids), questions)
        cache = self._executor.new_cache(1, self._executor.capacity_for(request.slots(room)))
        prefilled = self._executor.prefiller().run([request], cache.rows(0, 1), threading.Event())[0]
        assert prefilled.logits is not None
        filled = np.array(prefilled.kept_lengths or request.class_lengths)[:, None]
        batch = _DecodeBatch(self._executor.decoder(cache), filled, len(ids))
        return [self._ask(batch, prefilled.logits, question)[0] for question in questions]

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

    def _batch(self, cache: HostKVCache, lengths: np.ndarray, prompt_tokens: int) -> _DecodeBatch:
        """Return the batch of a cache whose layers hold `lengths` [B,layers] tokens of one prompt."""
        if (lengths == lengths[:, :1]).all():
            return _DecodeBatch(self._executor.decoder(cache), lengths[:, 0], prompt_tokens)
        return _DecodeBatch(self._executor.layer_lengths_decoder(cache), lengths.T, prompt_tokens)

    def _ask(self, batch: _DecodeBatch, prefill_logits: np.ndarray, question: Question) -> list[list[int]]:
        """Feed the question to all rows, then generate until every row is finished; returns each row's tokens."""
        steps = 0
        tokens: list[list[int]] = [[] for _ in batch.rows]
        logits = np.broadcast_to(prefill_logits, (len(batch.rows), len(prefill_logits)))
        for token in question.ids:
            logits = batch.step([token] * len(batch.rows), steps)
            steps += 1
        while True:
            check_finite(logits)
            for row in batch.rows:
                if not self._finished(question, tokens[row]):
                    tokens[row].append(int(logits[row].argmax()))
            if all(self._finished(question, answer) for answer in tokens):
                return tokens
            # Finished rows take part too: an idle row may lose its slot 0, which the next question still needs.
            logits = batch.step([answer[-1] for answer in tokens], steps)
            steps += 1

    def _finished(self, question: Question, answer: list[int]) -> bool:
        if not answer:
            return False
        return (
            answer[-1] in self.session.eos_token_ids
            or len(answer) >= question.max_new_tokens
            or question.is_settled(answer)
        )


class _DecodeBatch:
    """Rows of one prompt that decode together, each behind what its policy kept.

    `filled` [B], [length_classes,B] or [layers,B] are the slots of the kept tokens, `prompt_tokens` the length of the
    whole prompt.
    """

    def __init__(self, decoder: Decoder, filled: np.ndarray, prompt_tokens: int) -> None:
        self._decoder, self._filled, self._prompt_tokens = decoder, filled, prompt_tokens
        self.rows = range(filled.shape[-1])

    def step(self, tokens: Sequence[int], steps: int) -> np.ndarray:
        """Append a token per row behind the kept ones and `steps` further tokens; return the logits [B,vocab]."""
        positions = [self._prompt_tokens + steps] * len(self.rows)
        return self._decoder.step(self.rows, tokens, positions, self._filled + steps)


def _compact(full: HostKVCache, choice: Sequence[np.ndarray], out: HostKVCache, row: int) -> None:
    """Copy the kept positions of every layer to the first slots of a row (docs/method.md, section 5)."""
    for source, target in ((full.keys, out.keys), (full.values, out.values)):
        for layer, kept in enumerate(choice):
            target[layer][row, :, : len(kept)] = source[layer][0][:, kept]
