"""The plan: which layer decides for which, and what one cached token costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import engines
from support.messages import naming

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.plan import make_plan

MODEL = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama3")).config  # 3 layers, 384 tokens
SETTINGS = ChunkKVSettings(layer_groups=layer_groups(3, 1))
TABLE = np.arange(384) % 7 == 0


@given(num_layers=st.integers(1, 60), data=st.data())
def test_every_layer_follows_the_first_or_last_of_its_group(num_layers: int, data: st.DataObject) -> None:
    size, leader = data.draw(st.integers(1, num_layers)), data.draw(st.sampled_from(["first", "last"]))
    settings = ChunkKVSettings(leader=leader, layer_groups=layer_groups(num_layers, size))
    plan = make_plan(replace(MODEL, num_layers=num_layers), settings)
    assert [layer.index for layer in plan.layers] == list(range(num_layers))
    for layer in plan.layers:
        first = layer.index // size * size
        assert layer.group == layer.index // size
        assert layer.leader == (first if leader == "first" else min(first + size, num_layers) - 1)
        assert layer.is_leader == (layer.leader == layer.index)
    assert plan.leaders == tuple(sorted({layer.leader for layer in plan.layers}))
    assert len(plan.leaders) == -(-num_layers // size)


def test_without_chunkkv_no_layer_chooses() -> None:
    plan = make_plan(MODEL, None)
    assert plan.settings is None and plan.leaders == () and plan.delimiter_tokens is None
    assert [layer.index for layer in plan.layers] == [0, 1, 2] and not any(layer.is_leader for layer in plan.layers)


@pytest.mark.parametrize(("layers", "kv_heads", "head_dim"), [(3, 2, 16), (32, 8, 128), (80, 1, 64)])
def test_a_token_costs_a_key_and_a_value_in_float32_per_layer_and_head(
    layers: int, kv_heads: int, head_dim: int
) -> None:
    model = replace(MODEL, num_layers=layers, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=head_dim)
    keys_and_values = np.zeros((layers, 2, kv_heads, 1, head_dim), dtype=np.float32)
    assert make_plan(model, None).kv_bytes_per_token("float32") == keys_and_values.nbytes


@pytest.mark.parametrize(
    "groups", [(), ((0, 1),), ((0, 1, 2, 3),), ((1, 0), (2,)), ((0,), (2,), (1,)), ((0, 1), (1, 2)), ((0, 1, 2), ())]
)
def test_groups_that_are_not_the_models_layers_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match=naming("layers 0 2 groups")):
        make_plan(MODEL, replace(SETTINGS, layer_groups=groups))


def test_a_delimiter_table_is_there_exactly_when_boundaries_need_it() -> None:
    by_delimiter = replace(SETTINGS, boundaries="delimiter")
    table = make_plan(MODEL, by_delimiter, TABLE.astype(np.uint8)).delimiter_tokens
    assert table is not None and table.dtype == bool and np.array_equal(table, TABLE)
    assert make_plan(MODEL, SETTINGS, TABLE).delimiter_tokens is None
    for wrong in (None, TABLE[:-1], TABLE.reshape(2, -1)):
        with pytest.raises(ConfigError, match=naming("tokenizer.json")):
            make_plan(MODEL, by_delimiter, wrong)
