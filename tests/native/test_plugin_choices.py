"""Version 2 of the contract on the plugins: what the nodes of a graph may ask for, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.messages import naming

from chunkkv import reference
from native.memory import Memory
from native.plugin_host import HostError
from native.plugin_op import SELECT, PluginOp, open_host
from native.test_choices import CLASSES, OWN, VARIANTS, arrays, check
from native.test_plugins import stored_fields


@pytest.fixture
def op(memory: Memory) -> PluginOp:
    host = open_host()
    host.take_log()
    return PluginOp(host, memory)


class Plain(PluginOp):
    """A plugin's op, with what the checks of the kernels ask of theirs."""

    key_storage = None


@pytest.fixture
def checked(op: PluginOp) -> Plain:
    return Plain(op.host, op.memory)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("requested", [False, True])
def test_every_variant_is_the_references(checked: Plain, requested: bool, variant: dict[str, Any]) -> None:
    given = arrays(replace(OWN, **variant))
    check(checked, given if requested else given | {"window": None})


@pytest.mark.parametrize("heads", ["shared", "each"])
def test_scores_from_outside(checked: Plain, heads: str) -> None:
    settings = replace(OWN.with_score("given"), heads=heads)
    given = arrays(settings) | {"query": None, "window": None}
    shape = (len(given["lengths"]), *((2,) if heads == "each" else ()), given["key"].shape[2])
    check(checked, given | {"scores": np.random.default_rng(2).random(shape).astype(np.float32)})


@pytest.mark.parametrize("head_class", ["reading", "local"])
def test_classes_choose_their_own_lengths(checked: Plain, head_class: str) -> None:
    check(checked, arrays(CLASSES) | {"head_class": head_class, "window": None})


def test_each_head_compacts_its_own(op: PluginOp) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (2, 3, 40, 64), np.uint8).view(np.float16)
    indices = np.full((2, 3, 25), -1, np.int32)
    for row in range(2):
        for head in range(3):
            indices[row, head, : 20 - row] = np.sort(rng.choice(40, 20 - row, replace=False))
    np.testing.assert_array_equal(
        op.compact(x, indices).view(np.uint8), reference.compact_batch(x, indices).view(np.uint8)
    )


WRONG = {
    "a window of scores from outside": (
        {"score": "given", "head_reduce": "mean", "request_window": 1},
        "request_window 1 score given",
    ),
    "norms without weights": ({"score": "logits", "value_norm": "on"}, "window_reduce head_reduce value_norm logits"),
    "a class of no heads": ({"head_class": "reading"}, "all_heads 0 1"),
    "more reading heads than heads": (
        {"head_class": "local", "all_heads": 8, "all_reading_heads": 9},
        "all_reading_heads 9 8",
    ),
    "an unknown word": ({"heads": "some"}, "heads some shared each"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_contradictions_are_named(op: PluginOp, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(HostError, match=naming(f"ChunkKVSelect {words}")):
        op.host.attach(SELECT, stored_fields(**changes))
