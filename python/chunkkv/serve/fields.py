"""Reads the JSON body of a request field by field; an error names the field."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from chunkkv.serve.errors import ApiError


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raises ApiError for anything else."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ApiError(400, f"the body is no JSON: {error}; send one JSON object", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is JSON of type {type(value).__name__}; send one JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class BodyFields:
    """The fields of a JSON object; a field that is null counts as left out.

    Parameters
    ----------
    values : mapping
        The object.
    prefix : str, default ""
        What its fields' names begin with in errors: "stream_options." for example.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._prefix, self._known = prefix, set[str]()

    def error(self, name: str, rule: str) -> ApiError:
        """Return the error of a field that breaks a rule."""
        shown = repr(self._values.get(name))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ApiError(400, f"{self._prefix}{name} is {shown}; {rule}", f"{self._prefix}{name}")

    def has(self, name: str) -> bool:
        """Return whether a field is there."""
        self._known.add(name)
        return name in self._values

    def any(self, name: str, default: Any = None) -> Any:
        """Return a field of any type."""
        return self._values[name] if self.has(name) else default

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a string."""
        return self._typed(name, default, str, "give a string")

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        return self._typed(name, default, bool, "give true or false")

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object; an empty one where it is left out."""
        return self._typed(name, {}, dict, "give an object")

    def items(self, name: str) -> list[Any]:
        """Return a list; an empty one where it is left out."""
        return self._typed(name, [], list, "give a list")

    def whole(self, name: str, default: int | None = None, low: int = 0, high: int = 2**63 - 1) -> int | None:
        """Return a whole number in a range; 3.0 is one."""
        value = self.any(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise self.error(
            name, f"give a whole number of at least {low}" + ("" if high >= 2**31 else f", at most {high}")
        )

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return a number."""
        value = self.any(name, default)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)):
            return value
        raise self.error(name, "give a number")

    def neutral(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Accept fields that change nothing at some values, and refuse other values of them."""
        for name, values in allowed.items():
            if self.has(name) and not any(self._values[name] == value for value in values):
                shown = " or ".join(map(json.dumps, values))
                raise self.error(name, f"this server takes {shown} only: leave it out")

    def ignore(self, names: Iterable[str]) -> None:
        """Accept fields that change nothing at any value."""
        self._known.update(names)

    def refuse_others(self) -> None:
        """Raise ApiError for a field that nobody has read: it might change what the client means."""
        for name in self._values:
            if name not in self._known:
                close = difflib.get_close_matches(name, self._known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(self._known))}"
                raise ApiError(400, f"there is no field {self._prefix}{name}; {hint}", f"{self._prefix}{name}")

    def _typed(self, name: str, default: Any, kind: type, rule: str) -> Any:
        value = self.any(name, default)
        if value is not None and not isinstance(value, kind):
            raise self.error(name, rule)
        return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False
