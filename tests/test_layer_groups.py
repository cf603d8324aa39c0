"""Layer-reuse groups: every group size, the list syntax, and every way to get the list wrong."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError


@given(num_layers=st.integers(1, 90), data=st.data())
def test_a_number_cuts_the_layers_into_groups_of_that_size(num_layers: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_layers))
    groups = layer_groups(num_layers, size)
    assert [layer for group in groups for layer in group] == list(range(num_layers))
    assert {len(group) for group in groups[:-1]} <= {size}
    assert 1 <= len(groups[-1]) <= size
    assert groups == layer_groups(num_layers, str(size))


@given(cuts=st.sets(st.integers(1, 39)))
def test_a_list_says_the_groups_themselves(cuts: set[int]) -> None:
    ends = [0, *sorted(cuts), 40]
    expected = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
    text = ",".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in expected)
    assert layer_groups(40, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-1, 2", ((0, 1), (2,))), ("0-2", ((0, 1, 2),)), ("0-0,1,2", ((0,), (1,), (2,))), (" 3 ", ((0, 1, 2),))],
)
def test_syntax(text: str, expected: tuple[tuple[int, ...], ...]) -> None:
    assert layer_groups(3, text) == expected


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (0, "layer_reuse is 0; this model has 4 layers: give a group size from 1 to 4"),
        (5, "layer_reuse is 5; this model has 4 layers"),
        (-1, "layer_reuse is -1"),
        (True, "layer_reuse is True"),
        ("", "'' is no group"),
        ("two", "'two' is no group"),
        ("0-1,", "'' is no group"),
        ("0-1;2-3", "'0-1;2-3' is no group"),
        ("0--3", "'0--3' is no group"),
        ("1-0,2,3", "'1-0' runs backwards: give 0-1"),
        ("0-1,3", "layer 2 is missing"),
        ("1-3", "layer 0 is missing"),
        ("0", "layer_reuse is 0"),
        ("0-1", "layers 2 to 3 are missing"),
        ("0-1,1-3", "layer 1 is listed twice or out of order"),
        ("2-3,0-1", "layers 0 to 1 are missing"),
        ("0-4", "names layer 4; this model has layers 0 to 3"),
        ("0-9999999999999999999", "is no group"),
        ("9999999999", "is no group|names layer 9999999999"),
    ],
)
def test_refusals_say_what_is_wrong(reuse: int | str, message: str) -> None:
    with pytest.raises(ConfigError, match=message if "|" in message else re.escape(message)):
        layer_groups(4, reuse)
