"""What the tests ask of messages can fail: a part of a number or a name is not the number or the name."""

from __future__ import annotations

import re

import pytest
from support.messages import naming

MESSAGE = "--chunkkv_window is 129; allowed is 1 to 128.\nlayer_groups is [0, 1], keep_ratio 0.61"


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("--chunkkv_window 129", True),
        ("129 --chunkkv_window 1 128", True),
        ("layer_groups [0,1] 0.61", True),
        ("chunkkv_window", False),
        ("--chunkkv_window 12", False),
        ("0.6", False),
        ("61", False),
        ("groups", False),
        ("1]", True),
        ("--chunkkv_window 130", False),
    ],
)
def test_names_and_values_are_found_whole_and_in_any_order(asked: str, there: bool) -> None:
    assert bool(re.search(naming(asked), MESSAGE)) == there


def test_a_test_must_ask_for_something() -> None:
    with pytest.raises(AssertionError, match="anything"):
        naming()
