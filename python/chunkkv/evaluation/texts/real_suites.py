"""Suites on real text: a planted code, a planted keeper, and a passage to repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.prompt_writer import PromptWriter
from chunkkv.evaluation.texts.questions import Example, Question
from chunkkv.evaluation.texts.real_tasks import TASKS, make_tasks
from chunkkv.evaluation.texts.real_texts import KINDS, RealText, real_text
from chunkkv.evaluation.texts.suites import Cell, Suite
from chunkkv.settings import ChunkKVSettings

_ABOUT = {
    "code": "a code of five digits planted in real text",
    "keeper": "a name and a place planted in real text",
    "copy": "a passage of a real text to repeat; nothing is planted",
}
_SPARE_TOKENS = 24  # that an answer may have beside the expected ones
_ASKED_TOKENS = 64  # most tokens of a question with the chat template's end


def real_suites(own_text: RealText | None = None) -> dict[str, Suite]:
    """Return the suites by name; passages come from `own_text` where it is given, else from the shipped kinds."""
    texts = {kind: real_text(kind) for kind in KINDS} if own_text is None else {own_text.kind: own_text}
    content = hashlib.sha256("".join(text.fingerprint for text in texts.values()).encode()).hexdigest()

    def cells(lengths: Sequence[int], settings: ChunkKVSettings) -> list[Cell]:
        return [{"length": length, "text": kind} for length in lengths for kind in texts]

    return {
        task: Suite(task, _ABOUT[task], cells, _maker(task, texts), general=True, content=content) for task in TASKS
    }


def _maker(task: str, texts: dict[str, RealText]) -> Callable[[PromptWriter, Cell], Example]:
    def make(writer: PromptWriter, cell: Cell) -> Example:
        return _example(writer, texts[cell["text"]], task, cell["length"])

    return make


def _example(writer: PromptWriter, text: RealText, task: str, length: int) -> Example:
    tokenizer, frame = writer.tokenizer, writer.frame

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, False)

    room = length - len(frame.before) - _ASKED_TOKENS
    if room < _ASKED_TOKENS:
        raise ConfigError(f"lengths has {length}; suite {task} needs prompts of at least {3 * _ASKED_TOKENS} tokens")
    made = make_tasks(text, room, encode, tokenizer.decode, writer.random, plant=task != "copy")
    wanted = next(one for one in made.tasks if one.name == task)
    # Without a chat template the answer is begun for the model, which may know no questions.
    begun = "" if frame.after else f"\n{wanted.lead.rstrip()}"
    ids = (*encode(wanted.question + begun), *frame.after)
    answer = encode(wanted.lead + wanted.answer)
    question = Question(ids, wanted.answer.strip(), tuple(answer), len(answer) + _SPARE_TOKENS, "contains")
    before = len(frame.before)
    first, end = (before + len(encode(made.passage.text[:place])) for place in wanted.span)
    return Example((*frame.before, *encode(made.passage.text)), (question,), ((first, end),))
