"""One-shot prefill with the ChunkKV nodes inside: each row equals its own blockwise run, step graph and compress."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import onnx
import pytest
from support import engines, graphs
from support.checkpoints import VARIANTS
from support.messages import naming

from chunkkv import reference
from chunkkv.errors import ConfigError
from chunkkv.requests import Request, make_requests
from chunkkv.session import ChunkKVSession
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.transformer import StepGraph
from chunkkv_builder.plan import make_plan

TOLERANCE = 1e-4
LENGTHS = (61, 3, 33, 8, 50)  # one shorter than the window, one below min_tokens
RATIOS = (None, None, 0.6, None, None)
BUDGETS = (None, None, None, None, 17)
SPARE, PADDING = 2, 4
SETTINGS = ("window", "chunk_size", "sinks", "boundaries", "pooling", "score", "min_tokens", "head_reduce")
COMBINATIONS = list(itertools.product(("fixed", "delimiter"), ("first", "last"), (1, 2, 3)))


def cases() -> list:
    """Every combination of settings on one variant, and each other variant with one of them."""
    others = [variant for variant in sorted(VARIANTS) if variant != "llama3"]
    chosen = [("llama3", *combination) for combination in COMBINATIONS]
    chosen += [(variant, *COMBINATIONS[3 * number % 11]) for number, variant in enumerate(others)]
    return [pytest.param(*case, id="-".join(map(str, case))) for case in chosen]


def session_of(variant: str, boundaries: str, leader: str, reuse: int) -> ChunkKVSession:
    layers = VARIANTS[variant]["num_hidden_layers"]
    flags = {"chunkkv_boundaries": boundaries, "chunkkv_leader": leader, "chunkkv_layer_reuse": min(reuse, layers)}
    return engines.session(variant, **flags)


def requests_of(session: ChunkKVSession) -> list[Request]:
    prompts = [np.random.default_rng([7, length]).integers(3, 300, length) for length in LENGTHS]
    if (table := graphs.delimiter_table(session)) is not None:
        prompts[0][9::7] = table.argmax()
    return [
        make_requests([ids], None, session.limits, session.settings, ratio, budget, 1)[0]
        for ids, ratio, budget in zip(prompts, RATIOS, BUDGETS, strict=True)
    ]


def run_prefill(
    variant: str, session: ChunkKVSession, requests: list[Request], filler: int = 0, sorting: bool = True
) -> dict:
    """Run all requests as one right-padded batch."""
    graph = graphs.load(graphs.prefill_path(variant, session, sorting=sorting))
    ids = np.full((len(requests), max(LENGTHS) + PADDING), filler, np.int64)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = request.ids
    inputs = {
        "input_ids": ids,
        "lengths": np.array([len(request.ids) for request in requests], np.int32),
        "keep_per_10k": np.array([request.keep_per_10k for request in requests], np.int32),
        "budget_tokens": np.array([request.budget_tokens for request in requests], np.int32),
        "window": np.array([request.window or session.settings.window for request in requests], np.int32),
        "capacity": np.array([max(request.kept_tokens for request in requests) + SPARE], np.int64),
    }
    names = [value.name for value in graph.get_outputs()]
    return dict(zip(names, graph.run(None, inputs), strict=True))


def assert_row_equals(session: ChunkKVSession, request: Request, row: int, found: dict) -> None:
    """Compare one row with its own blockwise run; tokens in chunks at the cut may differ, their rows are skipped."""
    settings, length, kept = session.settings, len(request.ids), request.kept_tokens
    cache = session.executor.new_cache(1, kept)
    (own,) = session.executor.prefiller().run([request], cache, threading.Event())
    choice = own.choice
    assert np.abs(found["logits"][row, 0] - own.logits).max() <= TOLERANCE
    assert found["kept_lengths"][0, row] == kept
    table = graphs.delimiter_table(session)
    flags = None if table is None else table[request.ids]
    for group in settings.layer_groups:
        leader = settings.leader_of(group)
        indices = found[f"kept_indices.{leader}"][row]
        assert (indices[kept:] == reference.PAD_INDEX).all()
        same = np.ones(kept, dtype=bool)
        if choice is None:
            assert (indices[:kept] == np.arange(length)).all()
        else:
            scores, expected = choice.token_scores[leader], choice.kept_indices[leader]
            given = found[f"token_scores.{leader}"][row]
            np.testing.assert_allclose(given[:length], scores, rtol=1e-3, atol=1e-7)
            assert (given[length:] == 0).all()
            near = reference.near_cut(scores, length, kept, settings, flags, tolerance=TOLERANCE)
            assert near[np.setxor1d(indices[:kept], expected)].all()
            same = indices[:kept] == expected
            assert same.sum() >= settings.window + settings.sinks
        for layer in group:
            for kind, rows in (("key", cache.keys[layer]), ("value", cache.values[layer])):
                difference = found[f"kept_{kind}.{layer}"][row, :, :kept] - rows[0]
                assert np.abs(difference[:, same]).max() <= TOLERANCE


@pytest.mark.parametrize(("variant", "boundaries", "leader", "reuse"), cases())
def test_each_row_equals_its_own_blockwise_run(variant: str, boundaries: str, leader: str, reuse: int) -> None:
    session = session_of(variant, boundaries, leader, reuse)
    requests = requests_of(session)
    assert sum(request.kept_tokens < len(request.ids) for request in requests) == 3
    found = run_prefill(variant, session, requests)
    for row, request in enumerate(requests):
        assert_row_equals(session, request, row, found)


@pytest.mark.parametrize(("boundaries", "leader", "reuse"), COMBINATIONS)
def test_without_sorting_the_graph_keeps_the_same_tokens(boundaries: str, leader: str, reuse: int) -> None:
    session = session_of("llama3", boundaries, leader, reuse)
    requests = requests_of(session)
    by_sorting, found = (run_prefill("llama3", session, requests, sorting=sorting) for sorting in (True, False))
    for row, request in enumerate(requests):
        assert_row_equals(session, request, row, found)
    assert found.keys() == by_sorting.keys()
    for name, expected in by_sorting.items():
        if name.startswith("kept_indices"):
            # As a plugin does, these bodies give S columns: the longest row's N is not known from shapes.
            kept, behind = np.split(found[name], [expected.shape[1]], axis=1)
            assert (kept == expected).all() and (behind == reference.PAD_INDEX).all()
        else:
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_padding_ids_change_no_bit(boundaries: str) -> None:
    session = session_of("llama3", boundaries, "last", 2)
    requests = requests_of(session)
    one, two = (run_prefill("llama3", session, requests, filler) for filler in (0, 299))
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.parametrize(("leader", "reuse"), [("first", 1), ("first", 3), ("last", 3)])
@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
def test_nodes_carry_all_settings_and_the_plugins_name(boundaries: str, leader: str, reuse: int) -> None:
    session = session_of("llama3", boundaries, leader, reuse)
    path = graphs.prefill_path("llama3", session)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {"", functions.DOMAIN}
    nodes = [node for node in model.graph.node if node.domain == functions.DOMAIN]
    counts = {kind: sum(node.op_type == kind for node in nodes) for kind in (functions.SELECT, functions.COMPACT)}
    assert counts == {functions.SELECT: 3 // reuse, functions.COMPACT: 2 * 3}
    settings = session.settings.to_dict()
    for node in nodes:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given.pop("plugin_version") == b"1" and given.pop("plugin_namespace") == b"chunkkv"
        found = {name: value.decode() if isinstance(value, bytes) else value for name, value in given.items()}
        select = {**{name: settings[name] for name in SETTINGS}, "request_window": 1}
        assert found == (select if node.op_type == functions.SELECT else {})


def test_weights_are_shared_with_the_step_graph() -> None:
    session = session_of("llama3", "fixed", "last", 2)
    step = StepGraph(graphs.plan_of("llama3", session), graphs.weights_of("llama3")[1]).build()
    prefill = onnx.load(graphs.prefill_path("llama3", session), load_external_data=False)

    def places(model: onnx.ModelProto) -> dict:
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        return {t.name: sorted((entry.key, entry.value) for entry in t.external_data) for t in external}

    assert places(step) == places(prefill) and places(step)


def test_a_plan_without_chunkkv_keeps_every_token() -> None:
    session = engines.session("llama3", chunkkv=False)
    graph = graphs.load(graphs.prefill_path("llama3", session))
    ids = requests_of(engines.session("llama3"))[0].ids
    request = make_requests([ids], None, session.limits, None, None, None, 1)[0]
    cache = session.executor.new_cache(1, len(ids))
    (own,) = session.executor.prefiller().run([request], cache, threading.Event())
    inputs = {
        "input_ids": ids[None],
        "lengths": np.array([len(ids)], np.int32),
        "capacity": np.array([len(ids) + SPARE], np.int64),
    }
    found = dict(zip((value.name for value in graph.get_outputs()), graph.run(None, inputs), strict=True))
    assert np.abs(found["logits"][0, 0] - own.logits).max() <= TOLERANCE
    assert found["kept_lengths"] == [[len(ids)]]
    for layer in range(session.executor.step.num_layers):
        for kind, rows in (("key", cache.keys[layer]), ("value", cache.values[layer])):
            kept = found[f"kept_{kind}.{layer}"]
            assert kept.shape[2] == len(ids) + SPARE and not kept[:, :, len(ids) :].any()
            assert np.abs(kept[:, :, : len(ids)] - rows).max() <= TOLERANCE


def test_a_plan_without_chunkkv_has_nothing_to_compress() -> None:
    plan = make_plan(graphs.plan_of("llama3", session_of("llama3", "fixed", "last", 2)).model, None)
    with pytest.raises(ConfigError, match=naming("ChunkKV settings")):
        compress_graph(plan)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_run_too(precision: str) -> None:
    weights = {"weight_only_precision": precision, "weight_only_activations": "int8"}  # as the prefill graph has them
    session = engines.session("llama3", use_weight_only=True, **weights, chunkkv_layer_reuse=2)
    graph = graphs.load(graphs.prefill_path("llama3", session, precision))
    request = requests_of(session)[0]
    inputs = {
        "input_ids": request.ids[None],
        "lengths": np.array([len(request.ids)], np.int32),
        "keep_per_10k": np.array([request.keep_per_10k], np.int32),
        "budget_tokens": np.zeros(1, np.int32),
        "window": np.array([session.settings.window], np.int32),
        "capacity": np.array([request.kept_tokens], np.int64),
    }
    cache = session.executor.new_cache(1, request.kept_tokens)
    (expected,) = session.executor.prefiller().run([request], cache, threading.Event())
    difference = np.abs(graph.run(["logits"], inputs)[0][0, 0] - expected.logits).max()
    assert difference <= TOLERANCE
