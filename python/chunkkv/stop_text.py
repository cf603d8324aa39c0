"""Stop strings: an answer ends before the first of them, also where it comes in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_FIRST_MARK, _MAX_MARKS = 0xD800, 0x800  # the surrogates


class StopText:
    """Cuts a stream of text before the first stop string; holds back what may yet become one.

    Parameters
    ----------
    stop : sequence of str
        The strings.
    special_texts : mapping of str to int, optional
        Text and id of the special tokens. They have no text in the stream, so they are told by push_special.
    """

    def __init__(self, stop: Sequence[str], special_texts: Mapping[str, int] | None = None) -> None:
        # A special token stands in stop strings and in the stream as one lone surrogate, which no text can hold.
        self._marks: dict[int, str] = {}
        marked = list(stop)
        used = sorted((text for text in special_texts or () if any(text in string for string in stop)), key=len)
        for text in reversed(used):  # the longest first, because one may be part of another
            if special_texts is not None and len(self._marks) < _MAX_MARKS:
                mark = self._marks.setdefault(special_texts[text], chr(_FIRST_MARK + len(self._marks)))
                marked = [string.replace(text, mark) for string in marked]
        self._stop = [*stop, *(string for string in marked if string not in stop)]
        self._held_back = ""
        self.found = False

    def push_special(self, token: int) -> str:
        """Take a special token and return the text that may be shown now."""
        return self.push(self._marks.get(token, ""))

    def push(self, text: str) -> str:
        """Take new text and return what may be shown now."""
        if self.found:
            return ""
        pending = self._held_back + text
        starts = [start for start in (pending.find(stop) for stop in self._stop) if start >= 0]
        if starts:
            self.found = True
            self._held_back = ""
            return _without_marks(pending[: min(starts)])
        shown = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._held_back = pending[shown:]
        return _without_marks(pending[:shown])

    def flush(self) -> str:
        """Return what is still held back; called at the end of the answer."""
        text, self._held_back = self._held_back, ""
        return _without_marks(text)


def _without_marks(text: str) -> str:
    return "".join(letter for letter in text if not _FIRST_MARK <= ord(letter) < _FIRST_MARK + _MAX_MARKS)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
