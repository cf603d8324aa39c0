"""Checked access to parsed JSON: the one place that decides what a value from a file must look like.

Every error names the file, the key, the value, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from chunkkv.errors import ChunkKVError, ConfigError

_Default = TypeVar("_Default")
_REQUIRED: Any = object()
LARGEST_INT = 2**31 - 1
LARGEST_OFFSET = 2**62  # of times in nanoseconds and places in files
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-12, 1e12  # wide for any model, and far from where float32 arithmetic breaks down
_LONGEST_SHOWN = 80
_JSON_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Fields:
    """The keys of one JSON object; every getter checks type and range.

    A default of a getter also stands in for null. Without a default the key is required.

    Parameters
    ----------
    values : object
        The parsed JSON value; anything but a JSON object is refused.
    source : str
        What the object is called in errors: a path, and what of the file it is.
    error : type, default ConfigError
        Class of every error that is raised.
    remedy : str, default ""
        What to do about any error, such as "build it again"; added to every message.
    """

    def __init__(self, values: object, source: str, error: type[ChunkKVError] = ConfigError, remedy: str = "") -> None:
        self._error, self._remedy = error, remedy
        self.source = source
        if not isinstance(values, Mapping):
            raise self._with_remedy(f"{source} is {shown(values)}; it must be a JSON object")
        self.values: Mapping[str, Any] = values

    def get(self, key: str) -> Any:
        """Return the raw value, None where it is missing or null."""
        return self.values.get(key)

    def error(self, key: str, advice: str) -> ChunkKVError:
        """Return an error that names `key`, its value and what to do."""
        if key not in self.values:
            return self._with_remedy(f"{self.source}: {key!r} is missing; {advice}")
        return self._with_remedy(f"{self.source}: {key!r} is {shown(self.values[key])}; {advice}")

    def allow(self, names: Iterable[str]) -> None:
        """Raise the error unless every key is one of `names`."""
        known = sorted(names)
        if unknown := sorted(set(self.values) - set(known)):
            raise self._with_remedy(f"{self.source} has the unknown key {unknown[0]!r}; known are {', '.join(known)}")

    @overload
    def integer(self, key: str, low: int = ..., high: int = ...) -> int: ...
    @overload
    def integer(self, key: str, low: int = ..., high: int = ..., *, default: _Default) -> int | _Default: ...
    def integer(self, key: str, low: int = 1, high: int = LARGEST_INT, *, default: Any = _REQUIRED) -> Any:
        """Return a whole number in [low, high]."""
        advice = f"give a whole number from {low} to {high}"
        if self._absent(key, default, advice):
            return default
        if not is_integer(self.values[key], low, high):
            raise self.error(key, advice)
        return self.values[key]

    @overload
    def number(self, key: str, above: float = ...) -> float: ...
    @overload
    def number(self, key: str, above: float = ..., *, default: _Default) -> float | _Default: ...
    def number(self, key: str, above: float = 0.0, *, default: Any = _REQUIRED) -> Any:
        """Return a number greater than `above`, from SMALLEST_NUMBER to LARGEST_NUMBER."""
        low = f"above {above:g}" if above >= SMALLEST_NUMBER else f"of at least {SMALLEST_NUMBER:g}"
        advice = f"give a finite number {low}, at most {LARGEST_NUMBER:g}"
        if self._absent(key, default, advice):
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, advice)
        if not (above < value and SMALLEST_NUMBER <= value <= LARGEST_NUMBER):  # also refuses NaN
            raise self.error(key, advice)
        return float(value)

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, *, default: _Default) -> bool | _Default: ...
    def flag(self, key: str, *, default: Any = _REQUIRED) -> Any:
        """Return true or false."""
        if self._absent(key, default, "give true or false"):
            return default
        if not isinstance(self.values[key], bool):
            raise self.error(key, "give true or false")
        return self.values[key]

    @overload
    def text(self, key: str, allowed: Sequence[str] = ...) -> str: ...
    @overload
    def text(self, key: str, allowed: Sequence[str] = ..., *, default: _Default) -> str | _Default: ...
    def text(self, key: str, allowed: Sequence[str] = (), *, default: Any = _REQUIRED) -> Any:
        """Return a string, one of `allowed` where that is not empty."""
        advice = f"allowed is {' or '.join(map(repr, allowed))}" if allowed else "give a string"
        if self._absent(key, default, advice):
            return default
        value = self.values[key]
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise self.error(key, advice)
        return value

    def integers(self, key: str, low: int = 0, high: int = LARGEST_INT, count: int | None = None) -> tuple[int, ...]:
        """Return a list of whole numbers in [low, high], of `count` numbers where that is given."""
        number = "" if count is None else f"{count} "
        value = self._list(key, f"give a list of {number}whole numbers from {low} to {high}")
        if count not in (None, len(value)) or not all(is_integer(entry, low, high) for entry in value):
            raise self.error(key, f"give a list of {number}whole numbers from {low} to {high}")
        return tuple(value)

    def integer_lists(self, key: str, low: int = 0, high: int = LARGEST_INT) -> tuple[tuple[int, ...], ...]:
        """Return a list of lists of whole numbers in [low, high]."""
        advice = f"give a list of lists of whole numbers from {low} to {high}"
        value = self._list(key, advice)
        if not all(isinstance(row, list) and all(is_integer(entry, low, high) for entry in row) for row in value):
            raise self.error(key, advice)
        return tuple(tuple(row) for row in value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers above 0, each in the range of `number`."""
        advice = f"give a list of numbers from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}"
        value = self._list(key, advice)
        if any(isinstance(entry, bool) or not isinstance(entry, (int, float)) for entry in value):
            raise self.error(key, advice)
        if not all(SMALLEST_NUMBER <= entry <= LARGEST_NUMBER for entry in value):  # also refuses NaN
            raise self.error(key, advice)
        return tuple(float(entry) for entry in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        value = self._list(key, "give a list of strings")
        if not all(isinstance(entry, str) for entry in value):
            raise self.error(key, "give a list of strings")
        return tuple(value)

    def items(self, key: str) -> list[Any]:
        """Return a list whose entries are not checked."""
        return self._list(key, "give a list")

    def rows(self, key: str, types: Sequence[type]) -> list[tuple[Any, ...]]:
        """Return a list of rows, each a list of values of exactly `types`: str, int, float or bool."""
        advice = f"give a list of rows, each {', '.join(_JSON_TYPES[each] for each in types)}"
        value = self._list(key, advice)
        for number, row in enumerate(value):
            if not isinstance(row, list) or [type(entry) for entry in row] != list(types):
                raise self._with_remedy(f"{self.source}: row {number} of {key!r} is {shown(row)}; {advice}")
        return [tuple(row) for row in value]

    def section(self, key: str) -> Fields:
        """Return the object under `key`."""
        if not isinstance(self.get(key), Mapping):
            raise self.error(key, "it must be a JSON object")
        return Fields(self.values[key], f"{self.source}: {key}", self._error, self._remedy)

    def sections(self, key: str) -> list[Fields]:
        """Return the objects of the list under `key`."""
        entries = self._list(key, "it must be a list of JSON objects")
        return [
            Fields(entry, f"{self.source}: entry {number} of {key}", self._error, self._remedy)
            for number, entry in enumerate(entries)
        ]

    def with_values(self, **values: Any) -> Fields:
        """Return the same object with `values` added or in place of its own."""
        return Fields({**self.values, **values}, self.source, self._error, self._remedy)

    def text_section(self, key: str) -> dict[str, str]:
        """Return the object under `key`, whose values are all strings."""
        section = self.section(key)
        return {name: section.text(name) for name in section.values}

    def _list(self, key: str, advice: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(key, advice)
        return value

    def _absent(self, key: str, default: object, advice: str) -> bool:
        if self.get(key) is not None:
            return False
        if default is _REQUIRED:
            raise self.error(key, advice)
        return True

    def _with_remedy(self, message: str) -> ChunkKVError:
        return self._error(f"{message}: {self._remedy}" if self._remedy else message)


def is_integer(value: object, low: int, high: int = LARGEST_INT) -> bool:
    """Whether `value` is a whole number in [low, high]; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def shown(value: object) -> str:
    """Return what an error shows of a value from a file: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
