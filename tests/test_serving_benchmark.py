"""The load page: it is what its data says, and the benchmark measures in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import needle_engine

from benchmarks.serving import capacity, page
from benchmarks.serving.conversation import conversation
from benchmarks.serving.load import load_of
from benchmarks.serving.servers import OwnServer, own_server

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "serving.json"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_the_page_is_what_its_data_says(committed: dict) -> None:
    text = page.render(committed, RESULT.name, RESULT.with_suffix(".png").name)
    assert text == RESULT.with_suffix(".md").read_text(encoding="utf-8") and "{{" not in text
    assert RESULT.with_suffix(".png").is_file()


def test_six_gigabytes_hold_30_long_prompts_and_at_least_200_compressed_ones(committed: dict) -> None:
    found = {(row["kv_bytes"], row["keep_ratio"]): row["requests"] for row in committed["capacity"]["capacity"]}
    assert found[6_000_000_000, 1.0] == 30 and found[6_000_000_000, 0.1] >= 200


def test_load_and_conversation_are_measured(committed: dict) -> None:
    engine = needle_engine.engine_dir()
    with own_server(engine, "--context_bytes", "0") as server:
        rows = [load_of(server, OwnServer(), clients, 4, 0.2) for clients in (1, 4)]
        assert server.cpu_seconds() > 0
    assert [row["new_tokens"] for row in rows] == [80, 80] and all(row["tokens_per_s"] > 0 for row in rows)
    assert all(0 < row["ttft_p50_s"] <= row["ttft_p99_s"] <= row["wall_s"] + 0.01 for row in rows)
    assert all(0 <= row["longest_gap_s"] < row["wall_s"] for row in rows)
    assert {"server", *rows[0]} == set(committed["load"][0])
    asked = conversation(engine, 1.0, 0.1)
    assert asked["second"]["cached_tokens"] > 0.9 * asked["first"]["prompt_tokens"]
    assert asked["times_sooner"] == pytest.approx(asked["first"]["ttft_s"] / asked["second"]["ttft_s"], abs=0.06)


def test_capacity_is_counted_within_its_bound() -> None:
    measured = capacity.measure(needle_engine.engine_dir(), [20_000_000], 2, prompt=512)
    whole, kept = measured["capacity"]
    assert kept["requests"] > 2 * whole["requests"] > 0
    assert max(row["most_resident_bytes"] for row in (whole, kept)) < 1.5 * 20_000_000
