"""Answers that are written greedily instead of fed, for the comparison with a program that cannot be fed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.real.choices import Attention
from benchmarks.real.contexts import Asked, Context
from benchmarks.real.full_cache import Engine, FullCache
from benchmarks.real.policies import FULL, GREEDY, LEAST, RULES
from chunkkv.text.tokenizer import Tokenizer

CONTEXTS = {1_000: 12, 2_000: 4}
TASKS = ("code", "keeper")
KEEPS = (2_000, 1_000)
POLICY = "ChunkKV"


def answer_room(asked: Asked) -> int:
    """Return how many tokens an answer may have."""
    return len(asked.answer) + 8


def holds(tokenizer: Tokenizer, asked: Asked, tokens: Sequence[int]) -> str:
    """Return 1 where a written answer holds the expected value, else 0."""
    value = tokenizer.decode(list(asked.answer[asked.first_scored :])).strip()
    return str(int(value in tokenizer.decode(list(tokens))))


def write(engine: Engine, full: FullCache, kept: np.ndarray | None, room: int) -> list[int]:
    """Return the greedy answer behind what is kept of a prompt; its first token comes from the full cache."""
    size = len(full) if kept is None else kept.shape[2]
    cache = engine.filled(full, kept, room)
    tokens = [full.next_token]
    while len(tokens) < room and tokens[-1] not in engine.session.eos_token_ids:
        step = len(tokens) - 1
        logits = engine.session.executor.score_block(cache, np.array(tokens[-1:]), size + step, len(full) + step)
        tokens.append(int(logits[-1].argmax()))
    return tokens


def written(engine: Engine, context: Context, known: set[str]) -> Iterator[tuple[str, int, str]]:
    """Yield key, kept tokens and 1 or 0 for each answer that is not known yet."""
    text: FullCache | None = None
    delimiters = engine.tokenizer.delimiter_token_table(vocab_size=engine.session.limits.vocab_size)
    for task in TASKS:
        keys = {(FULL, 10_000): "", **{(POLICY, keep): "" for keep in KEEPS}}
        missing = [place for place in keys if f"{GREEDY}|{task}|{place[0]}|{place[1]}" not in known]
        if not missing:
            continue
        asked = next(one for one in context.asked if one.name == task)
        text = text or engine.prefill(context.ids)
        full = engine.append(text, asked.question)
        attention = Attention(full, delimiters[full.ids])
        for policy, keep in missing:
            count = min(len(full), max(LEAST, len(full) * keep // 10_000))
            kept = None if policy == FULL else attention.kept(RULES[POLICY], count)
            answer = write(engine, full, kept, answer_room(asked))
            yield f"{GREEDY}|{task}|{policy}|{keep}", count, holds(engine.tokenizer, asked, answer)
