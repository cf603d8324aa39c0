"""What a prompt is read again with, so that its own repetition says which of its tokens are needed later.

The scorer "reread" (KVzip's method) writes an instruction to repeat behind the prompt, and then the prompt's tokens
once more. The attention that a token of the prompt receives from them is its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import RequestError

PIECE_TOKENS = 2048  # of the prompt that are repeated behind one instruction
REMINDER_TOKENS = 8  # of the piece before, which say where the next one begins
_SMALLEST_PIECE = 64


@dataclass(frozen=True)
class RepeatWords:
    """Token ids around what is repeated.

    Parameters
    ----------
    whole : tuple of int
        The instruction to repeat everything.
    part : tuple of int
        The instruction to repeat a part; the tokens that this part begins behind are added to it.
    turn : tuple of int
        What ends the user's message and begins the answer, as the chat template writes it.
    frame : tuple of int, default ()
        What the chat template writes before a user's first message. It is not repeated.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    turn: tuple[int, ...]
    frame: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a prompt that is read again.

    Parameters
    ----------
    start, stop : int
        Its tokens in the prompt; their attention is measured.
    ids : numpy.ndarray
        What is read behind the prompt [S] int64: the instruction and those tokens.
    """

    start: int
    stop: int
    ids: np.ndarray


def pieces_of(
    ids: np.ndarray, words: RepeatWords, room: int, before: Sequence[int] | np.ndarray = ()
) -> tuple[Piece, ...]:
    """Return what is read behind the prompt ids [L] int64, piece by piece; together they cover it.

    Left out are the frame of the chat template before the text, and an end of the user's message behind it. Behind a
    context every piece is a part of what stands before, and the first one begins behind the context's last tokens.

    Parameters
    ----------
    ids : numpy.ndarray
        The prompt.
    words : RepeatWords
        The instructions.
    room : int
        Positions that the engine has behind the prompt. Raises RequestError where they are too few.
    before : sequence of int or numpy.ndarray, default ()
        Token ids of the context that the prompt goes on with.
    """
    text = np.concatenate([np.asarray(before, np.int64)[-REMINDER_TOKENS:], ids])
    held = len(text) - len(ids)
    start = len(words.frame) if not held and _begins(ids, words.frame) else 0
    stop = len(ids)
    if words.turn and _begins(ids[-len(words.turn) :], words.turn) and stop - len(words.turn) > start:
        stop -= len(words.turn)
    around = max(len(words.whole), len(words.part) + REMINDER_TOKENS) + len(words.turn)
    size = min(PIECE_TOKENS, room - around)
    if size < min(stop - start, _SMALLEST_PIECE):
        raise RequestError(
            f"scorer 'reread' reads the prompt of {len(ids)} tokens again behind it, for which this engine has "
            f"{max(room, 0)} positions, and at least {around + _SMALLEST_PIECE} are needed: shorten the prompt, build "
            "with a larger --max_seq_len, or use scorer 'window'"
        )
    pieces = []
    for first in range(start, stop, size):
        last = min(first + size, stop)
        asks: Sequence[int] = words.whole
        if first > start or held:
            reminder = text[max(held + first - REMINDER_TOKENS, 0) : held + first]
            asks = (*words.part, *reminder.tolist())
        read = np.concatenate([np.array([*asks, *words.turn], np.int64), ids[first:last]])
        pieces.append(Piece(first, last, read))
    return tuple(pieces)


def _begins(ids: np.ndarray, with_ids: Sequence[int]) -> bool:
    return ids[: len(with_ids)].tolist() == list(with_ids)
