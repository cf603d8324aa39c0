"""Layer-reuse groups: every group size, the list syntax, and every way to get the list wrong."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import naming

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
        (0, "layer_reuse 0 4 layers 1"),
        (5, "layer_reuse 5 4 layers"),
        (-1, "layer_reuse -1"),
        (True, "layer_reuse True"),
        ("", "'' group"),
        ("two", "'two' group"),
        ("0-1,", "'' group"),
        ("0-1;2-3", "'0-1;2-3' group"),
        ("0--3", "'0--3' group"),
        ("1-0,2,3", "'1-0' 0-1"),
        ("0-1,3", "layer 2 missing"),
        ("1-3", "layer 0 missing"),
        ("0", "layer_reuse 0"),
        ("0-1", "layers 2 3 missing"),
        ("0-1,1-3", "layer 1 twice"),
        ("2-3,0-1", "layers 0 1 missing"),
        ("0-4", "layer 4 0 3"),
        ("0-9999999999999999999", "'0-9999999999999999999' group"),
        ("9999999999", "9999999999"),
    ],
)
def test_refusals_say_what_is_wrong(reuse: int | str, message: str) -> None:
    with pytest.raises(ConfigError, match=naming(message)):
        layer_groups(4, reuse)
