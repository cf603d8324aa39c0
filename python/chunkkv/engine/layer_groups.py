"""Layer-reuse groups: which consecutive layers share one choice of tokens."""

from __future__ import annotations

import re

from chunkkv.errors import ConfigError

_GROUPS = "groups such as 0-1,2,3-5"
SYNTAX = f"a group size such as 2, or {_GROUPS}"
_GROUP = re.compile(r"(\d+)(?:-(\d+))?")
_NUMBER_DIGITS = 9  # beyond any layer count, so that int() stays cheap


def layer_groups(num_layers: int, reuse: int | str = 1) -> tuple[tuple[int, ...], ...]:
    """Return the groups of `num_layers` layers that `reuse` asks for, in order and complete.

    A number n makes groups of n consecutive layers, the last one smaller where n does not divide. Otherwise `reuse`
    lists every group, separated by commas: `first-last`, or a single layer. Raises ConfigError for gaps, overlaps and
    layers that the model does not have.
    """
    if isinstance(reuse, str) and re.fullmatch(rf"\s*\d{{1,{_NUMBER_DIGITS}}}\s*", reuse):
        reuse = int(reuse)
    if isinstance(reuse, str):
        return _listed(num_layers, reuse)
    if isinstance(reuse, bool) or not isinstance(reuse, int) or not 1 <= reuse <= num_layers:
        raise ConfigError(
            f"layer_reuse is {reuse!r}; this model has {num_layers} layers: give a group size from 1 to {num_layers}, "
            f"or {_GROUPS}"
        )
    layers = range(num_layers)
    return tuple(tuple(layers[first : first + reuse]) for first in range(0, num_layers, reuse))


def _listed(num_layers: int, text: str) -> tuple[tuple[int, ...], ...]:
    groups, expected = [], 0
    for part in text.split(","):
        match = _GROUP.fullmatch(part.strip())
        if match is None or len(part) > 2 * _NUMBER_DIGITS:
            raise ConfigError(f"layer_reuse is {text!r}, where {part.strip()!r} is no group; give {SYNTAX}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"layer_reuse is {text!r}, where {part.strip()!r} runs backwards: give {last}-{first}")
        if last >= num_layers:
            raise ConfigError(
                f"layer_reuse is {text!r}, which names layer {last}; this model has layers 0 to {num_layers - 1}"
            )
        if first != expected:
            problem = (
                f"layer {first} is listed twice or out of order"
                if first < expected
                else f"{_span(expected, first - 1)} missing"
            )
            raise ConfigError(
                f"layer_reuse is {text!r}, where {problem}: list every layer from 0 to {num_layers - 1} once, in order"
            )
        groups.append(tuple(range(first, last + 1)))
        expected = last + 1
    if expected < num_layers:
        raise ConfigError(
            f"layer_reuse is {text!r}, where {_span(expected, num_layers - 1)} missing: "
            f"list every layer from 0 to {num_layers - 1} once, in order"
        )
    return tuple(groups)


def _span(first: int, last: int) -> str:
    return f"layer {first} is" if first == last else f"layers {first} to {last} are"
