"""Bounds what a chat template may do: it is foreign code that a server or a terminal waits for.

A template is stopped where it makes a text or list that is too long, or takes too many steps. A step is a turn of a
loop, a call or a filter; one that reads a list or a long text counts for more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context

MAX_LENGTH = 1 << 24  # characters of a text, entries of a list
MAX_STEPS = 1_000_000
_TEXT_PER_STEP = 1000  # characters that are read in about the time of a step
_MAX_BITS = 1 << 12  # of a whole number
_LONG_NUMBER = re.compile(r"\d{7,}")  # as the width of a field, it makes a text longer than any template needs
_CHECKED, _COUNTED = "chunkkv checked", "chunkkv counted"  # names of filters that no template can write
_steps_left: ContextVar[int] = ContextVar("steps_left", default=MAX_STEPS)


class TemplateTooLargeError(SecurityError):
    """A template made too long a text, or took too many steps."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which the steps and the sizes of a template have limits."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        self.filters[_CHECKED], self.filters[_COUNTED] = _checked_filter, _counted_filter

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and put a check around everything that grows a text or repeats something."""
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = _filtered(cast(nodes.Expr, loop.iter), _COUNTED)
        for block in template.find_all(nodes.AssignBlock):
            block.filter = _filtered(block.filter, _CHECKED)
        _check_concatenations(template)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute left <operator> right, unless the result would be too large."""
        take_steps(1)
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, Sized) and isinstance(count, int):
                    check_length(len(text) * count)
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            check_length(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateTooLargeError(f"a number has more than {_MAX_BITS} bits")
        return checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object from the template; a method of a text takes no number that makes it too long."""
        values = (*args, *kwargs.values())
        take_steps(1 + sum(map(_cost, values)))
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_format(owner if "format" in method.__name__ else "", values)
        return checked(super().call(__context, __obj, *args, **kwargs))


def begin_steps() -> None:
    """Give a rendering all its steps."""
    _steps_left.set(MAX_STEPS)


def take_steps(count: int) -> None:
    """Count steps; raises TemplateTooLargeError where none are left."""
    left = _steps_left.get() - count
    _steps_left.set(left)
    if left < 0:
        raise TemplateTooLargeError(f"it takes more than {MAX_STEPS} steps")


def checked(value: Any) -> Any:
    """Return `value`; raises TemplateTooLargeError where it is too long."""
    if isinstance(value, (str, list, tuple, dict)):
        check_length(len(value))
    return value


def check_length(length: int) -> None:
    """Raise TemplateTooLargeError for a length that no text and no list may have."""
    if length > MAX_LENGTH:
        raise TemplateTooLargeError(f"it makes a text or list of length {length}; allowed is {MAX_LENGTH}")


def _check_format(text: str, values: Iterable[Any]) -> None:
    widths = [int(number) for number in _LONG_NUMBER.findall(text)]
    for width in (*widths, *(value for value in values if isinstance(value, int))):
        check_length(width)


def _cost(value: Any) -> int:
    if isinstance(value, str):
        return len(value) // _TEXT_PER_STEP
    return len(value) if isinstance(value, Sized) else 0


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or function that counts its steps and whose result is checked."""

    @functools.wraps(function)  # keeps what jinja2 marks it with, too
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        take_steps(1 + sum(_cost(value) for value in values if not isinstance(value, Context)))
        numbers = [value for value in values[1:] if isinstance(value, int)]
        _check_format(next((value for value in values if isinstance(value, str)), ""), numbers)
        result = function(*args, **kwargs)
        return _counted(result) if isinstance(result, Iterator) else checked(result)

    return call


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for count, value in enumerate(values):
        take_steps(1)
        check_length(count)
        yield value


@pass_context
def _checked_filter(context: Context, value: Any) -> Any:
    return checked(value)


@pass_context
def _counted_filter(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    return _counted(values)


def _filtered(node: nodes.Expr | None, name: str) -> nodes.Filter:
    line = 0 if node is None else node.lineno
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _check_concatenations(parent: nodes.Node) -> None:
    """Put the check around every a ~ b below `parent`."""
    for field, value in parent.iter_fields():
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, nodes.Node):
                _check_concatenations(child)
        replaced = [_filtered(child, _CHECKED) if isinstance(child, nodes.Concat) else child for child in children]
        setattr(parent, field, replaced if isinstance(value, list) else replaced[0])
