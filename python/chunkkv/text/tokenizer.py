"""Text to tokens and back with the tokenizers library, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from chunkkv.engine.json_files import read_text
from chunkkv.errors import CheckpointError, RequestError
from chunkkv.text.added_tokens import ADDED_TOKENS_FILE, add_stated_tokens
from chunkkv.text.question import question_start
from chunkkv.text.tokenizer_settings import (
    GENERATION_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    generation_ends,
    read_if_there,
    special_tokens_of,
    template_text,
)

if TYPE_CHECKING:
    from chunkkv.text.chat_template import ChatTemplate

TOKENIZER_FILE = "tokenizer.json"
DELIMITERS = ".!?;:,\n"
_REPLACEMENT = "\ufffd"
_MAX_HELD_BACK = 16  # tokens; an unfinished character takes 4 at most, so more of them are invalid bytes
_MAX_UNFINISHED = 3  # bytes of a character that lacks its last one; each may show as U+FFFD
_BATCH = 4096  # tokens that are decoded at once for the table of delimiters


class Tokenizer:
    """The tokenizer of a checkpoint or engine directory; load it with from_dir.

    Attributes
    ----------
    special_tokens : dict[str, str]
        Text of each named special token, such as "bos_token".
    bos_token_id : int or None
        The begin token.
    eos_token_ids : tuple[int, ...]
        The tokens that end an answer: those of generation_config.json, else the end token.
    special_ids : frozenset[int]
        All special tokens.
    size : int
        Ids at or above it have no text.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        What encodes and decodes.
    settings : Mapping[str, Any]
        The contents of tokenizer_config.json.
    special_tokens : Mapping[str, str]
        Text of each named special token.
    eos_token_ids : Sequence[int]
        The end tokens; empty for the one of `special_tokens`.
    template : tuple[str, str], optional
        The chat template and the name of its file.

    Raises
    ------
    CheckpointError
        For a special token that the vocabulary lacks.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
        template: tuple[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_ids = tuple(eos_token_ids) or _none_or_one(self._special_id("eos_token"))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._frame = self._bos_eos_frame(settings)
        self._template_text = template
        self._template: ChatTemplate | None = None
        # Decoders treat the first token of a text specially, so a token's own text is read behind this one.
        self._anchor = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text = backend.decode(self._anchor)

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Load the tokenizer files in `directory`; raises CheckpointError where they are missing or damaged."""
        path = Path(directory)
        file = path / TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{path} has no {TOKENIZER_FILE}; load its tokenizer in transformers and save_pretrained() it there"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(file, CheckpointError))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is no valid tokenizer: {error}; download it again") from None
        backend.no_truncation()
        backend.no_padding()
        settings = read_if_there(path / SETTINGS_FILE)
        special_map = read_if_there(path / SPECIAL_TOKENS_FILE)
        add_stated_tokens(backend, read_if_there(path / ADDED_TOKENS_FILE), settings, special_map)
        special_tokens = special_tokens_of(special_map)
        special_tokens.update(special_tokens_of(settings))
        ends = generation_ends(path / GENERATION_FILE)
        return cls(backend, settings, special_tokens, ends, template_text(path, settings))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; `add_special_tokens` puts the begin and end tokens of the model around them.

        Raises RequestError for text that is not valid Unicode.
        """
        _check_text(text)
        if not add_special_tokens or self._frame is None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        before, after = self._frame
        return [*before, *self._backend.encode(text, add_special_tokens=False).ids, *after]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids without text are skipped. Raises RequestError for what is no token id.

        Where tokens that stand for single bytes are no valid UTF-8 together, each character that is valid is kept and
        the others become U+FFFD, as in a stream of the same tokens.
        """
        checked = _checked_ids(ids)
        if skip_special_tokens and self._has_invalid_bytes(checked):
            decoder = StreamDecoder(self)
            return "".join(decoder.push(token) for token in checked) + decoder.finish()
        return self._backend.decode(checked, skip_special_tokens=skip_special_tokens)

    def decode_behind(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Return what `ids` add to the text of the tokens in `context`; special tokens have no text."""
        before = self._backend.decode(list(context))
        text = self._backend.decode([*context, *ids])
        if text.startswith(before):
            return text[len(before) :]
        # Bytes that are invalid make the library replace valid ones before them, too; those were told already.
        return self._backend.decode([*self._anchor, *ids])[len(self._anchor_text) :]

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt as `encode` does, but a text that has its begin token keeps one of it.

        Chat templates write the begin token themselves, so their text would get a second one.
        """
        ids = self.encode(text, add_special_tokens)
        begins_itself = text.startswith(self.special_tokens.get("bos_token") or "\0")
        is_double = begins_itself and ids[:2] == [self.bos_token_id] * 2
        return ids[1:] if add_special_tokens and is_double else ids

    @cached_property
    def special_texts(self) -> dict[str, int]:
        """The text of every special token, with its id."""
        return {text: number for text, number in self.added_texts.items() if number in self.special_ids}

    def token_text(self, token_id: int) -> str:
        """Return what a token adds inside a text, with its leading space; the name of a special token."""
        return self._token_texts(_checked_ids([token_id]))[0]

    @cached_property
    def added_texts(self) -> dict[str, int]:
        """The text of every token that was added to the vocabulary, special or not, with its id."""
        return {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def own_end_ids(self) -> tuple[int, ...]:
        """The end token that tokenizer_config.json names, whatever generation_config.json says."""
        return _none_or_one(self._special_id("eos_token"))

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template, None where there is none."""
        return self._template_text[0] if self._template_text else None

    def check_chat_template(self) -> None:
        """Compile the chat template, if there is one; raises CheckpointError where that fails."""
        if self._template is None and self._template_text is not None:
            from chunkkv.text.chat_template import ChatTemplate  # with jinja2, which only chats need

            self._template = ChatTemplate(*self._template_text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return a conversation as the prompt text that the model was trained on.

        The text has its special tokens already: encode it with add_special_tokens=False, or call encode_chat.

        Parameters
        ----------
        messages : Sequence[Mapping[str, Any]]
            Mappings with "role" and "content", in order.
        add_generation_prompt : bool, default True
            Whether the text ends with the header of the answer.
        tools : Sequence[Mapping[str, Any]], optional
            JSON schemas of functions that the model may call, for templates that describe them.
        **variables : Any
            What else the template reads.

        Raises
        ------
        RequestError
            For malformed messages, or where there is no template.
        CheckpointError
            For a template that does not compile or fails.
        """
        self.check_chat_template()
        if self._template is None:
            raise RequestError(
                f"this tokenizer has no chat template ({TEMPLATE_FILE} or {SETTINGS_FILE}); give plain text instead"
            )
        names = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        text = self._template.render(messages, {**self.special_tokens, **names, **variables})
        _check_text(text)
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation; raises like apply_chat_template."""
        ids = self.encode(self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False)
        if not ids:
            raise RequestError("the chat template makes no text of these messages; give plain text instead")
        return ids

    def question_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int | None:
        """Return how many tokens stand from the user's last question to the end of the template.

        None where the last message of the user is no text, or the template does not write it as it is.
        """
        text = self.apply_chat_template(messages)
        start = question_start(messages, text)
        if start is None:
            return None
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return sum(end > start for _, end in offsets)

    def delimiter_token_table(self, vocab_size: int | None = None, delimiters: str = DELIMITERS) -> NDArray[np.bool_]:
        """Return which tokens end a clause or a line: bool [vocab_size].

        A token does where its text, without spaces at its end, ends with one of `delimiters`. Special tokens and ids
        without text do not. `vocab_size` is the model's and may differ from `size`, which is the default.
        """
        table = np.zeros(self.size if vocab_size is None else vocab_size, dtype=bool)
        ends = tuple(delimiters)
        for first in range(0, min(self.size, len(table)), _BATCH):
            ids = [i for i in range(first, min(first + _BATCH, self.size, len(table))) if i not in self.special_ids]
            for token, text in zip(ids, self._token_texts(ids), strict=True):
                table[token] = text.rstrip(" ").endswith(ends)
        return table

    def _token_texts(self, ids: list[int]) -> list[str]:
        texts = self._backend.decode_batch([[*self._anchor, token] for token in ids], skip_special_tokens=False)
        return [text[len(self._anchor_text) :] for text in texts]

    @cached_property
    def _bytes_of_ids(self) -> dict[int, int]:
        """The byte of each token that stands for one, empty where the decoder does not put such bytes together."""
        decoder = self._backend.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return {}
        ids = ((self._backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        return {number: byte for number, byte in ids if number is not None}

    def _has_invalid_bytes(self, ids: Sequence[int]) -> bool:
        if not self._bytes_of_ids or self._bytes_of_ids.keys().isdisjoint(ids):
            return False
        shown = (number for number in ids if number not in self.special_ids and number < self.size)
        data = bytes(self._bytes_of_ids.get(number, 0x20) for number in shown)  # any other token ends a run of bytes
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            return True
        return False

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        if text is None:
            return None
        number = self._backend.token_to_id(text)
        if number is None:
            raise CheckpointError(f"{role} is {text!r}, which {TOKENIZER_FILE} does not have; correct {SETTINGS_FILE}")
        return number

    def _bos_eos_frame(self, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the ids that go before and after a text where the settings say so, None to leave it to the backend.

        Where only one of the two is set, the other side stays as the backend has it.
        """
        flags = [settings.get(name) for name in ("add_bos_token", "add_eos_token")]
        if not any(isinstance(flag, bool) for flag in flags):
            return None
        plain, framed = (self._backend.encode("a", add_special_tokens=own).ids for own in (False, True))
        count = len(plain)
        start = next((i for i in range(len(framed) - count + 1) if framed[i : i + count] == plain), 0)
        sides = [tuple(framed[:start]), tuple(framed[start + count :])]
        for side, role in enumerate(("bos_token", "eos_token")):
            if isinstance(flags[side], bool):
                sides[side] = _none_or_one(self._special_id(role)) if flags[side] else ()
                if flags[side] and not sides[side]:
                    raise CheckpointError(f"{SETTINGS_FILE} says add_{role} but has no {role}; give one or say false")
        return sides[0], sides[1]


def chat_prompt(tokenizer: Tokenizer | None, prompt: str | list[int]) -> list[dict[str, str]]:
    """Return a text as one user message, which the chat template takes; what --chat does.

    Raises RequestError for a prompt of token ids, without a tokenizer, and as encode_chat does.
    """
    if not isinstance(prompt, str) or tokenizer is None:
        raise RequestError("chat needs a prompt of text and an engine with a tokenizer")
    messages = [{"role": "user", "content": prompt}]
    tokenizer.encode_chat(messages)
    return messages


class StreamDecoder:
    """Turns tokens into text as they come; the pieces together are what Tokenizer.decode returns for all tokens.

    An unfinished character is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens of the last piece: a decoder needs them to space the next one
        self._new: list[int] = []  # tokens whose text was not returned as a whole yet
        self._returned = 0  # characters of their text that were

    def push(self, token_id: int) -> str:
        """Take one token and return the text it completes, "" where there is none yet."""
        if token_id in self._tokenizer.special_ids or token_id >= self._tokenizer.size:
            return ""
        self._new.append(token_id)
        text = self._tokenizer.decode_behind(self._context, self._new)
        if not text or (text.endswith(_REPLACEMENT) and len(self._new) < _MAX_HELD_BACK):
            return ""
        if text.endswith(_REPLACEMENT):  # the last bytes may still become a character
            unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
            end = len(text) - min(unfinished, _MAX_UNFINISHED)
            piece, self._returned = text[self._returned : end], max(self._returned, end)
            return piece
        piece = text[self._returned :]
        self._context, self._new, self._returned = self._new, [], 0
        return piece

    def finish(self) -> str:
        """Return the text that is still held back, unfinished characters as U+FFFD."""
        text = self._tokenizer.decode_behind(self._context, self._new)[self._returned :] if self._new else ""
        self._context, self._new, self._returned = self._context + self._new, [], 0
        return text


def _none_or_one(number: int | None) -> tuple[int, ...]:
    return () if number is None else (number,)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise RequestError(f"text is {type(text).__name__}; give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is no "
            "valid Unicode: decode its source as UTF-8"
        ) from None


def _checked_ids(ids: Iterable[int]) -> list[int]:
    values: list[object] = list(ids)
    checked = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**31:
            raise RequestError(f"token id {value!r} is not valid; give whole numbers from 0 to {2**31 - 1}")
        checked.append(int(value))
    return checked
