"""Typed access to parsed JSON objects, with errors that name the file, the key and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from chunkkv.errors import ConfigError

_Default = TypeVar("_Default")
REQUIRED: Any = object()
LARGEST_INT = 2**31 - 1
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-12, 1e12  # wide for any model, and far from where float32 arithmetic breaks down


class Fields:
    """The keys of one JSON object; `source` names it in errors. A default also stands in for null.

    Every getter raises ConfigError for a missing key without default, a wrong type or a value out of range.
    """

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source} is {shown(values)}; it must be a JSON object")
        self.values = values
        self.source = source

    def get(self, key: str) -> Any:
        """Return the raw value, None where it is missing or null."""
        return self.values.get(key)

    def error(self, key: str, advice: str) -> ConfigError:
        """Return an error that names `key`, its value and what to do."""
        if key not in self.values:
            return ConfigError(f"{self.source}: {key!r} is missing; {advice}")
        return ConfigError(f"{self.source}: {key!r} is {shown(self.values[key])}; {advice}")

    def _absent(self, key: str, default: Any, advice: str) -> bool:
        if self.get(key) is not None:
            return False
        if default is REQUIRED:
            raise self.error(key, advice)
        return True

    def integer(self, key: str, low: int = 1, high: int = LARGEST_INT, default: _Default = REQUIRED) -> int | _Default:
        """Return a whole number in [low, high]."""
        advice = f"give a whole number from {low} to {high}"
        if self._absent(key, default, advice):
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, advice)
        return value

    def number(self, key: str, above: float = 0.0, default: _Default = REQUIRED) -> float | _Default:
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

    def flag(self, key: str, default: _Default = REQUIRED) -> bool | _Default:
        """Return true or false."""
        if self._absent(key, default, "give true or false"):
            return default
        value = self.values[key]
        if not isinstance(value, bool):
            raise self.error(key, "give true or false")
        return value

    def text(self, key: str, allowed: tuple[str, ...] = (), default: _Default = REQUIRED) -> str | _Default:
        """Return a string, one of `allowed` where that is not empty."""
        advice = f"allowed is {' or '.join(map(repr, allowed))}" if allowed else "give a string"
        if self._absent(key, default, advice):
            return default
        value = self.values[key]
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise self.error(key, advice)
        return value


def shown(value: Any) -> str:
    """Return what an error shows of a value from a file: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
