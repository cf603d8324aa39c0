"""A conversation with an engine: a question is prefilled alone, behind what the cache holds of everything before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from chunkkv.contexts import Context, longest_prefix
from chunkkv.contexts.origin import Origin
from chunkkv.errors import RequestError
from chunkkv.executors.interface import PrefillProgress
from chunkkv.limits import KEEP_SCALE
from chunkkv.requests import Message, Prompt
from chunkkv.results import GenerationResult, StreamEvent
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession
from chunkkv.settings import keep_ratio_to_per_10k


class Conversation:
    """Questions and answers on one session, in the model's chat template where it has one, else as plain text.

    A document is compressed once. Behind it, each turn stays in the cache as it was decoded. Where a template writes
    earlier turns differently later, the conversation goes on from the last point that stays the same, at least from the
    document. An engine that cannot continue a context prefills everything for each question.

    Raises RequestError for an engine without a tokenizer, and for a ratio that is none.

    Parameters
    ----------
    session : ChunkKVSession
        The engine.
    document : str or None, default None
        A text that the questions are about.
    system : str or None, default None
        A system message; needs a chat template.
    keep_ratio : float or None, default None
        Share of the document that stays, in (0, 1], and of each turn that is longer than the engine's `min_tokens`.
        None takes the engine's own for the document and keeps turns whole.

    Attributes
    ----------
    turns : list of tuple
        Question and answer of every turn so far.
    last : GenerationResult or None
        The last answer.
    """

    def __init__(
        self,
        session: ChunkKVSession,
        document: str | None = None,
        system: str | None = None,
        keep_ratio: float | None = None,
    ) -> None:
        if session.tokenizer is None:
            raise RequestError("a conversation needs an engine with a tokenizer: build the checkpoint with its own")
        self._session, self._tokenizer = session, session.tokenizer
        if system is not None and not self.has_template:
            raise RequestError("a system message needs a chat template, which this model does not have; leave it out")
        self._document, self._system = document, system
        self._continues = session.executor.capabilities.continues_rows
        self.set_keep_ratio(keep_ratio)
        self.reset()

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def is_held(self) -> bool:
        """Whether a turn is prefilled alone; False where the engine prefills everything again."""
        return self._continues

    @property
    def keep_ratio(self) -> float | None:
        """Share that stays; None for the engine's own."""
        return self._keep_ratio

    @property
    def context(self) -> Context | None:
        """What the cache holds of the conversation; None before the first answer of one without a document."""
        return self._held[-1] if self._held else None

    def set_keep_ratio(self, keep_ratio: float | None) -> None:
        """Change the share that stays; the document is compressed again before the next question."""
        if keep_ratio is not None:
            keep_ratio_to_per_10k(keep_ratio)
            if self._session.settings is None and keep_ratio != 1.0:
                raise RequestError("this engine was built without ChunkKV and keeps every token")
        self._keep_ratio = keep_ratio
        self._held: list[Context] = []

    def reset(self) -> None:
        """Forget all turns; the document stays, and stays compressed."""
        self.turns: list[tuple[str, str]] = []
        self.last: GenerationResult | None = None
        self._held = self._held[:1] if self._document is not None else []
        self._transcript: list[int] = []  # what the model has read and written, where there is no template

    def compress_document(self, on_prefill: PrefillProgress | None = None) -> None:
        """Prefill and compress the document, unless that is done or there is none."""
        if self._held or self._document is None or not self._continues:
            return
        messages = self._messages_before()
        prompt = messages if self.has_template else self._document
        self._held = [self._session.compress(prompt, keep_ratio=self._keep_ratio, on_prefill=on_prefill)]

    def ask(
        self,
        text: str,
        sampling: SamplingParams,
        cancel: threading.Event | None = None,
        on_prefill: PrefillProgress | None = None,
    ) -> Iterator[StreamEvent]:
        """Return the events of the answer; the turn counts once its last event is taken, also where it was cancelled.

        Raises RequestError where question and answer do not fit the engine any more; the conversation stays as it was.
        """
        if not text.strip():
            raise RequestError("the question is empty; give at least one word")
        self.compress_document(on_prefill)
        messages = self._messages_with(text)
        ids = self._ids_of(text) if messages is None else np.array(self._tokenizer.encode_chat(messages), np.int64)
        room = self._session.limits.max_seq_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(ids)} tokens, and this engine takes {len(ids) + room}: begin a new one"
            )
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        base = longest_prefix(self._held, ids)
        held: list[Context] = []
        prompt: Prompt = ids if messages is None else messages  # with messages, the question alone observes
        events = self._session.generate(
            prompt if base is None else ids[len(base) :],
            sampling,
            keep_ratio=self._keep_ratio if base is None else None,
            context=base,
            stream=True,
            cancel=cancel,
            on_prefill=on_prefill,
            on_context=(lambda row, context: held.append(context)) if self._continues else None,
        )
        for event in events:
            if event.finished is not None and event.finished.token_ids:
                self._end_turn(text, ids, event.finished, base, held)
            yield event

    def _end_turn(
        self, text: str, ids: np.ndarray, result: GenerationResult, base: Context | None, held: list[Context]
    ) -> None:
        self.turns.append((text, result.text))
        self.last = result
        self._transcript = [*ids.tolist(), *result.token_ids]
        if held:
            first = self._held[:1] if self._document is not None else []
            self._held = [*first, self._compressed(base, held[0])]

    def _compressed(self, base: Context | None, whole: Context) -> Context:
        """Return `whole`, its last turn compressed where that was asked for and makes it shorter."""
        settings, executor = self._session.settings, self._session.executor
        if base is None or self._keep_ratio is None or settings is None or not executor.capabilities.compresses_turns:
            return whole
        turn = whole.token_ids[len(base) :]
        per_10k = round(self._keep_ratio * KEEP_SCALE)
        if settings.kept_tokens(len(turn), per_10k) == len(turn):
            return whole
        try:
            return base.extend(turn, keep_ratio=self._keep_ratio)
        except RequestError:  # an engine without attention scores has no room to read the turn again
            return whole

    def _messages_before(self) -> list[Message]:
        """Return the messages before the first question."""
        given = (("system", self._system), ("user", self._document))
        return [{"role": role, "content": text} for role, text in given if text is not None]

    def _messages_with(self, text: str) -> tuple[Message, ...] | None:
        """Return the whole conversation with `text` as the next question; None without a template."""
        if not self.has_template:
            return None
        origin = Origin(messages=tuple(self._messages_before()))
        for question, answer in self.turns:
            origin = origin.followed_by(question).followed_by([{"role": "assistant", "content": answer}])
        return origin.followed_by(text).messages

    def _ids_of(self, text: str) -> np.ndarray:
        """Return the token ids of the plain text with `text` at its end."""
        before = self._transcript
        if not before and self._document is not None:
            before = Origin(text=self._document).begin(self._tokenizer, add_special_tokens=True)
        ids = [*before, *self._tokenizer.encode("\n" + text, False)] if before else self._tokenizer.encode_prompt(text)
        return np.array(ids, np.int64)
