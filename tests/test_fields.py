"""Values from JSON files are checked in one place; errors name file, key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.messages import naming

from chunkkv.engine.fields import Fields
from chunkkv.errors import ConfigError, EngineError

VALUES = {
    "whole": 3,
    "number": 0.5,
    "flag": True,
    "text": "a",
    "null": None,
    "object": {"x": 1},
    "objects": [{"x": 1}, {"x": 2}],
    "wholes": [1, 2],
    "lists": [[0], [1, 2]],
    "texts": ["a", "b"],
    "rows": [["a", 1, True]],
    "named": {"a": "b"},
}


def fields() -> Fields:
    return Fields(VALUES, "f.json", EngineError, "build it again")


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda f: f.integer("whole"), 3),
        (lambda f: f.integer("null", default=7), 7),
        (lambda f: f.integer("none", default=None), None),
        (lambda f: f.number("number"), 0.5),
        (lambda f: f.number("whole"), 3.0),
        (lambda f: f.flag("flag"), True),
        (lambda f: f.text("text", allowed=("a", "b")), "a"),
        (lambda f: f.section("object").integer("x"), 1),
        (lambda f: [each.integer("x") for each in f.sections("objects")], [1, 2]),
        (lambda f: f.integers("wholes", count=2), (1, 2)),
        (lambda f: f.integer_lists("lists"), ((0,), (1, 2))),
        (lambda f: f.texts("texts"), ("a", "b")),
        (lambda f: f.rows("rows", (str, int, bool)), [("a", 1, True)]),
        (lambda f: f.text_section("named"), {"a": "b"}),
        (lambda f: f.with_values(whole=4).integer("whole"), 4),
        (lambda f: f.allow(VALUES), None),
    ],
)
def test_sound_values_are_returned(read: Callable[[Fields], object], expected: object) -> None:
    assert read(fields()) == expected


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.integer("none"), "'none' is missing; give a whole number from 1"),
        (lambda f: f.integer("null"), "'null' is None"),
        (lambda f: f.integer("flag"), "'flag' is True"),
        (lambda f: f.integer("number"), "'number' is 0.5"),
        (lambda f: f.integer("whole", high=2), "'whole' is 3; give a whole number from 1 to 2"),
        (lambda f: f.number("text"), "'text' is 'a'"),
        (lambda f: f.number("flag"), "'flag' is True"),
        (lambda f: f.number("number", above=1.0), "'number' is 0.5; give a finite number above 1"),
        (lambda f: f.with_values(number=float("nan")).number("number"), "'number' is nan"),
        (lambda f: f.flag("whole"), "'whole' is 3; give true or false"),
        (lambda f: f.text("whole"), "'whole' is 3"),
        (lambda f: f.text("text", allowed=("b", "c")), "'text' is 'a'; allowed is 'b' or 'c'"),
        (lambda f: f.section("wholes"), r"'wholes' is \[1, 2\]"),
        (lambda f: f.section("object").integer("y"), "object: 'y' is missing"),
        (lambda f: f.sections("object"), "'object' is"),
        (lambda f: f.sections("wholes"), "entry 0 of wholes is 1"),
        (lambda f: f.sections("objects")[1].integer("y"), "entry 1 of objects: 'y' is missing"),
        (lambda f: f.integers("wholes", count=3), "'wholes' is .* a list of 3 whole numbers"),
        (lambda f: f.integers("wholes", high=1), "'wholes' is"),
        (lambda f: f.integers("null"), "'null' is None"),
        (lambda f: f.integer_lists("wholes"), "'wholes' is"),
        (lambda f: f.texts("wholes"), "'wholes' is"),
        (lambda f: f.rows("rows", (str, int, int)), "row 0 of 'rows' is"),
        (lambda f: f.rows("wholes", (int,)), "row 0 of 'wholes' is 1"),
        (lambda f: f.text_section("object"), "object: 'x' is 1"),
        (lambda f: f.allow(["whole"]), "unknown key 'flag'; known are whole"),
        (lambda f: f.with_values(text="a" * 500).integer("text"), "'text' is 'a{70,80}[.]{3};"),
    ],
)
def test_others_are_refused_by_name_and_value(read: Callable[[Fields], object], message: str) -> None:
    with pytest.raises(EngineError, match=rf"f\.json.*{message}") as refused:
        read(fields())
    assert str(refused.value).endswith(": build it again")


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=naming("f.json object")):
        Fields(value, "f.json")
