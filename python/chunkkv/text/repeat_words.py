"""The instructions by which a prompt is read again, in the words of the model's chat template."""

from __future__ import annotations

from chunkkv.rereading import RepeatWords
from chunkkv.text.tokenizer import Tokenizer

_WHOLE = "\n\nRepeat the previous context exactly."
_PART = "\n\nRepeat the part of the previous context exactly, starting with"
_PROBE, _END = "dummy context", "\n#############"  # a text that a template leaves as it is, and where it ends


def repeat_words(tokenizer: Tokenizer) -> RepeatWords:
    """Return the instructions of KVzip, as token ids.

    What ends the message and begins the answer is a line end where the tokenizer has no chat template.
    """

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, False))

    frame, turn = "", "\n"
    if tokenizer.chat_template is not None:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE + _END}])
        before, _, after = rendered.partition(_END)
        frame, turn = before.partition(_PROBE)[0], after or turn
    return RepeatWords(encode(_WHOLE), encode(_PART), encode(turn), encode(frame) if frame else ())
