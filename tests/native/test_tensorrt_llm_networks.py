"""Networks with ChunkKV step by step: plugins in the plugin host, attention over the paged pool, all else NumPy.

The measure is the same network without ChunkKV: a full cache, of which attention does not see what was dropped. On the
host both agree to the last bit, whatever the cache's type, because nothing but bytes moves. TensorRT-LLM itself is a
contract as read (support/tensorrt_llm_double): nothing is proved about the real one.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import SMALL_CHUNKKV
from support.tensorrt_llm_double import installed
from support.tensorrt_llm_double.attention import Pools
from support.tensorrt_llm_double.checkpoints import convert, with_learned_positions
from support.tensorrt_llm_double.driver import Driver, Row
from support.tensorrt_llm_double.graph import Graph, Node
from support.tensorrt_llm_double.oracle import oracle_plugins
from support.tensorrt_llm_double.run import Execution

from chunkkv.native import NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native import llm_networks as llm
from native.memory import Memory
from native.plugin_host import HostError

pytestmark = pytest.mark.contract_as_read

WORK = llm.Workload.random((87, 9, 41, 22), steps=64)
SHORT = llm.Workload.random((60, 45), steps=12)
# One rounding of a rotated key may fall the other way on a GPU; host results are equal.
DEVICE_TOLERANCE = {"float32": 2e-3, "float16": 0.15, "bfloat16": 1.0, "int8": 1.0, "fp8": 2.0}


def settings_of(leader: str = "last", reuse: int = 2, boundaries: str = "fixed") -> ChunkKVSettings:
    groups = tuple(tuple(range(first, first + reuse)) for first in range(0, llm.LAYERS, reuse))
    small = {name.removeprefix("chunkkv_"): value for name, value in SMALL_CHUNKKV.items()}
    small["keep_per_10k"] = round(10_000 * small.pop("keep_ratio"))
    return ChunkKVSettings(**(small | {"leader": leader, "layer_groups": groups, "boundaries": boundaries}))


def flags_of(settings: ChunkKVSettings) -> dict[str, Any]:
    flags = {"chunkkv_leader": settings.leader, "chunkkv_layer_reuse": len(settings.layer_groups[0])}
    if settings.head_reduce != "max":
        flags["chunkkv_head_reduce"] = settings.head_reduce
    if settings.boundaries == "delimiter":
        flags |= {"chunkkv_boundaries": "delimiter", "tokenizer_dir": llm.checkpoint()}
    return flags


@pytest.fixture
def machine(library: NativeLibrary, memory: Memory) -> llm.Machine:
    return llm.Machine(memory if memory.on_device else None)


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray], machine: llm.Machine, kind: str) -> None:
    for a, b in zip(found, wanted, strict=True):
        if machine.exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=DEVICE_TOLERANCE[kind], rtol=0)


def test_the_plugins_write_nothing_beside_their_outputs(memory: Memory) -> None:
    settings = settings_of("last", 2, "delimiter")
    (graph,), (plain,) = (llm.networks(**more) for more in (flags_of(settings), {"plain": True}))
    machine = llm.Machine(memory)  # copied to buffers with guards, as to a GPU
    found = llm.driven([[machine.execution(graph)]], settings, 2, SHORT)
    wanted = llm.full_cache_logits(plain, 2, SHORT, found.hidden(SHORT, settings))
    assert_same(found.logits, wanted, machine, "float16")


def wide(graph: Graph) -> Graph:
    return graph.widened()


KINDS = [
    *(("float16", None, leader, reuse) for leader in ("first", "last") for reuse in (1, 2, 4)),
    *(("bfloat16", None, leader, 2) for leader in ("first", "last")),
    *(("float16", "int8", leader, 2) for leader in ("first", "last")),
    *(("bfloat16", "fp8", leader, 4) for leader in ("last", "first")),
    ("bfloat16", "int8", "last", 1),
    ("float16", "fp8", "first", 2),
]


# Two after each change, the others with the deep tests.
QUICK = [("float16", None, "first", 2), ("bfloat16", None, "last", 2)]


@pytest.mark.parametrize(
    ("dtype", "kv", "leader", "reuse"),
    [pytest.param(*kind, marks=[] if kind in QUICK else pytest.mark.deep) for kind in KINDS],
)
def test_decoding_sees_the_kept_tokens_and_nothing_else(
    machine: llm.Machine, dtype: str, kv: str | None, leader: str, reuse: int
) -> None:
    settings = settings_of(leader, reuse, "delimiter" if kv == "int8" else "fixed")
    (graph,) = llm.networks(dtype=dtype, kv=kv, **flags_of(settings))
    (plain,) = llm.networks(dtype=dtype, kv=kv, plain=True)
    nbytes = llm.KV_BYTES[kv or dtype]
    found = llm.driven([[machine.execution(graph)]], settings, nbytes, WORK)
    assert_same(
        found.logits, llm.full_cache_logits(plain, nbytes, WORK, found.hidden(WORK, settings)), machine, kv or dtype
    )
    if machine.memory is None:
        pools = Pools()
        by_reference = llm.driven([[Execution(graph, oracle_plugins(pools), pools)]], settings, nbytes, WORK)
        assert_same_choice(found, by_reference)


def assert_same_choice(found: llm.Outcome, wanted: llm.Outcome) -> None:
    for a, b in zip(found.kept, wanted.kept, strict=True):
        assert a.keys() == b.keys()
        for leader in a:
            np.testing.assert_array_equal(a[leader], b[leader])


def test_rows_in_their_context_phase_and_generating_rows_share_a_step(machine: llm.Machine) -> None:
    settings = settings_of("first", 2)
    graph = wide(llm.networks(**flags_of(settings))[0])
    alone = llm.driven([[machine.execution(graph)]], settings, 4, WORK)
    driver = Driver([[machine.execution(graph)]], settings, 4)
    rows = [Row(np.array(prompt, np.int32)) for prompt in WORK.prompts]
    logits: list[list[np.ndarray]] = [[] for _ in rows]
    for starting in ([0], [2, 1], [], [3], [], []):
        going = [number for number in range(len(rows)) if logits[number]]
        for number in going:
            rows[number].tokens.append(WORK.tokens[number][len(logits[number]) - 1])
        made = driver.step([rows[number] for number in starting], [rows[number] for number in going])
        for number, found in zip([*starting, *going], made, strict=True):
            logits[number].append(found)
    for found, wanted in zip(logits, alone.logits, strict=True):
        np.testing.assert_allclose(np.array(found), wanted[: len(found)], atol=2e-3, rtol=0)


def test_two_pipeline_stages_are_one_network(machine: llm.Machine) -> None:
    settings = settings_of("last", 2)
    (whole,) = map(wide, llm.networks(**flags_of(settings)))
    parts = map(wide, llm.networks(pp_size=2, **flags_of(settings)))
    one = llm.driven([[machine.execution(whole)]], settings, 4, SHORT)
    two = llm.driven([[machine.execution(part)] for part in parts], settings, 4, SHORT)
    assert_same_choice(two, one)
    assert_same(two.logits, one.logits, machine, "float32")


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_two_ranks_that_agree_choose_what_one_rank_chooses(machine: llm.Machine, boundaries: str) -> None:
    settings = dataclasses.replace(settings_of("first", 2, boundaries), head_reduce="mean")
    (whole,) = map(wide, llm.networks(**flags_of(settings)))
    one = llm.driven([[machine.execution(whole)]], settings, 4, SHORT)
    for agree in (True, False):
        own = {"chunkkv_tp_agree": True} if agree else {}
        parts = map(wide, llm.networks(tp_size=2, **own, **flags_of(settings)))
        ranks = [machine.execution(part) for part in parts]
        driver = Driver([ranks], settings, 4)
        differs = False
        for prompt, kept in zip(SHORT.prompts, one.kept, strict=True):
            driver.step([Row(np.array(prompt, np.int32))])
            choices = [llm.kept_by_leader([rank], settings, len(prompt)) for rank in ranks]
            for leader in kept:
                assert not agree or (choices[0][leader] == kept[leader]).all()
                assert not agree or (choices[1][leader] == kept[leader]).all()
                differs |= not (choices[0][leader] == choices[1][leader]).all()
        assert differs == (not agree), "ranks that score alone must be able to disagree, or this test shows nothing"
    parts = map(wide, llm.networks(tp_size=2, chunkkv_tp_agree=True, **flags_of(settings)))
    two = llm.driven([[machine.execution(part) for part in parts]], settings, 4, SHORT)
    for found, wanted in zip(two.logits, one.logits, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=0)


def test_learned_positions_stay_logical(machine: llm.Machine, tmp_path: Path) -> None:
    settings = settings_of("last", 2)
    with installed():
        folder = with_learned_positions(convert(llm.checkpoint(), tmp_path / "rotary"), tmp_path / "learned")
        (graph,), (plain,) = llm.build(folder, False, **flags_of(settings)), llm.build(folder, True)
    assert not graph.of("ChunkKVRope")
    found = llm.driven([[machine.execution(graph)]], settings, 2, SHORT)
    wanted = llm.full_cache_logits(plain, 2, SHORT, found.hidden(SHORT, settings))
    assert_same(found.logits, wanted, machine, "float16")


def test_keeping_everything_changes_nothing(machine: llm.Machine) -> None:
    settings = dataclasses.replace(settings_of(), keep_per_10k=10_000)
    (graph,) = llm.networks(chunkkv_keep_ratio=1, **flags_of(settings))
    (plain,) = llm.networks(plain=True)
    found = llm.driven([[machine.execution(graph)]], settings, 2, SHORT)
    assert_same(found.logits, llm.full_cache_logits(plain, 2, SHORT), machine, "float16")


@pytest.mark.parametrize(("leader", "reuse"), [("first", 1), ("first", 2), ("last", 4)])
def test_a_generation_step_pays_for_rope_and_one_copy_alone(
    machine: llm.Machine, library: NativeLibrary, leader: str, reuse: int
) -> None:
    if machine.memory is not None:
        pytest.skip("the emulator counts what is enqueued")
    settings = settings_of(leader, reuse)
    execution = machine.execution(llm.networks(**flags_of(settings))[0])
    enqueued = ctypes.CDLL(str(library.path)).chunkkv_emulator_enqueued
    enqueued.restype = ctypes.c_longlong
    counts: dict[str, int] = {}

    def counting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(given: list[np.ndarray]) -> Any:
            before = enqueued()
            outputs = run(given)
            counts[name] = enqueued() - before
            return outputs

        return counted

    for name, run in execution._plugins.items():
        execution._plugins[name] = counting(name, run)
    driver, row = Driver([[execution]], settings, 2), Row(np.array(SHORT.prompts[0], np.int32))
    driver.step([row])
    compress = [node.name for node in execution.graph.of("ChunkKVCompress")]
    assert all(counts[name] > 0 for name in compress)
    row.tokens.append(SHORT.tokens[0][0])
    driver.step([], [row])
    assert [counts[name] for name in compress] == [*[0] * (len(compress) - 1), 1]
    ropes = [node.name for node in execution.graph.of("ChunkKVRope")]
    assert [counts[name] for name in ropes] == [1] * len(ropes)
    (prepare,) = execution.graph.of("ChunkKVPrepare")
    assert counts[prepare.name] == 2 and sum(counts.values()) == 2 + len(ropes) + 1


def test_a_prompt_in_two_parts_is_refused(machine: llm.Machine) -> None:
    (graph,) = llm.networks(**flags_of(settings_of()))
    execution = machine.execution(graph)
    driver = Driver([[execution]], settings_of(), 2)
    begin = execution.begin

    def second_part(feeds: dict[str, np.ndarray]) -> None:
        begin({**feeds, "host_past_key_value_lengths": feeds["host_past_key_value_lengths"] + 16})

    execution.begin = second_part  # type: ignore[method-assign]
    with pytest.raises(HostError, match="enable_chunked_context"):
        driver.step([Row(np.array(SHORT.prompts[0], np.int32))])


def logical_lengths(graph: Graph) -> None:
    """Attention is told how long the text is, not how full the cache."""
    for node in graph.of("gpt_attention"):
        node.inputs[list(node.attributes["keywords"]).index("sequence_length")] = "sequence_length"


def no_follower(graph: Graph) -> None:
    """One layer's cache is left as it is."""
    node = next(node for node in graph.of("ChunkKVCompress") if node.fields()["role"] == "follower")
    graph.nodes.remove(node)
    instead = llm.leaders(graph)[0].outputs[0]  # what the next Rope waits for
    for other in graph.nodes:
        other.inputs = [instead if name == node.outputs[0] else name for name in other.inputs]


def unrotated_scores(graph: Graph) -> None:
    """The leader scores queries and keys as they were before rotation."""
    node, rope = llm.leaders(graph)[0], graph.of("ChunkKVRope")[0]
    node.inputs[1] = rope.inputs[0]


def slots_for_positions(graph: Graph) -> None:
    """New tokens are rotated by their place in the cache (lengths - 1 have the shape of positions in generation)."""
    for node in graph.of("ChunkKVRope"):
        node.attributes["positions"] = graph.of("ChunkKVPrepare")[0].outputs[0]


MISTAKES = [logical_lengths, no_follower, unrotated_scores, slots_for_positions]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_wrong_wrapper_is_found_out(machine: llm.Machine, mistake: Callable[[Graph], None]) -> None:
    settings = settings_of("first", 2)
    (right,), (plain,) = llm.networks(**flags_of(settings)), llm.networks(plain=True)
    graph = wide(copy.deepcopy(right))
    mistake(graph)
    execution = _with_positions_from_lengths(machine.execution(graph))
    found = llm.driven([[execution]], settings, 4, SHORT)
    true = llm.driven([[machine.execution(wide(right))]], settings, 4, SHORT)
    wanted = llm.full_cache_logits(wide(plain), 4, SHORT, true.hidden(SHORT, settings))
    worst = max(np.abs(a - b).max() for a, b in zip(found.logits, wanted, strict=True))
    assert not worst < 0.1, "a mistake that no test would see"  # a NaN was seen too: freed blocks hold nothing else
    assert max(np.abs(a - b).max() for a, b in zip(true.logits, wanted, strict=True)) < 2e-3


def _with_positions_from_lengths(execution: Execution) -> Execution:
    """Rotate by the tensor that a Rope node's attribute `positions` names, less one, in generation steps."""

    def runner(node: Node, run: Callable[..., Any]) -> Callable[..., Any]:
        def changed(given: list[np.ndarray]) -> Any:
            if execution.seen["host_request_types"].all():
                given = [given[0], execution.seen[node.attributes["positions"]] - 1, *given[2:]]
            return run(given)

        return changed

    for node in execution.graph.of("ChunkKVRope"):
        if "positions" in node.attributes:
            execution._plugins[node.name] = runner(node, execution._plugins[node.name])
    return execution
