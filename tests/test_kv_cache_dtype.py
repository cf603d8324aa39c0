"""A KV cache in float16 or int8 beside float32 weights: fewer bytes, moved unchanged, and answers that stay close."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engines

from chunkkv import Context, SamplingParams
from chunkkv.cli import doctor

FLAGS: dict[str, Any] = {"kv_cache_dtype": "float16"}
EIGHT: dict[str, Any] = {"kv_cache_dtype": "int8"}
BOTH = pytest.mark.parametrize(("flags", "smaller"), [(FLAGS, 2), (EIGHT, 4)], ids=["float16", "int8"])
IDS = np.array([(7 * i) % 380 + 3 for i in range(61)], np.int64)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True, logprobs=True)
# Heads rotated outside, heads with norms, layers without rotation, soft caps, and a scale of its own.
VARIANTS = ("llama3", "phi3", "qwen3", "smollm3", "gemma2", "granite")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
def test_answers_stay_close_to_those_of_float32(variant: str, keep_ratio: float) -> None:
    exact, half = engines.session(variant), engines.session(variant, **FLAGS)
    one, two = (session.generate(IDS, GREEDY, keep_ratio=keep_ratio) for session in (exact, half))
    assert one.token_ids == two.token_ids
    assert np.abs(np.array(one.logprobs) - np.array(two.logprobs)).max() < 0.02
    assert two.statistics.cache_bytes * 2 == one.statistics.cache_bytes


@BOTH
@pytest.mark.parametrize("split", [{}, {"chunkkv_budget_split": "ranked"}], ids=["uniform", "ranked"])
def test_compaction_moves_the_bytes_unchanged(flags: dict[str, Any], smaller: int, split: dict[str, Any]) -> None:
    session = engines.session("llama3", **flags, **split)
    prefiller = session.executor.blockwise_prefiller()
    full, kept = prefiller.new_cache(1, len(IDS)), prefiller.new_cache(1, len(IDS))
    assert full.keys[0].dtype == np.dtype(flags["kv_cache_dtype"])
    _, queries = prefiller.fill(IDS, full, threading.Event())
    choice = prefiller.compress(full, queries, IDS, 0, 24, kept)
    for part, indices in choice.kept_indices.items():
        for source, target in ((full.keys, kept.keys), (full.values, kept.values)):
            moved, stayed = target[part][:, :, : len(indices)], source[part][:, :, indices]
            assert moved.tobytes() == stayed.tobytes()


@BOTH
def test_rows_take_less_memory_where_they_grow(flags: dict[str, Any], smaller: int) -> None:
    exact, small = (engines.session("llama3", **given).executor for given in ({}, flags))
    assert small.kv_bytes_per_token * smaller == exact.kv_bytes_per_token
    assert small.cache_bytes((512,)) * smaller == exact.cache_bytes((512,))
    grown = [executor.new_elastic_cache(2, 512).bytes_of((512,)) for executor in (small, exact)]
    assert grown[0] * smaller == grown[1]


@BOTH
def test_a_saved_context_goes_on_where_it_was_saved(tmp_path: Path, flags: dict[str, Any], smaller: int) -> None:
    session = engines.session("llama3", **flags)
    context = session.compress(IDS, keep_ratio=0.4)
    context.save(tmp_path / "context.safetensors")
    question = IDS[:9]
    fresh = session.generate(question, GREEDY, context=context)
    loaded = Context.load(tmp_path / "context.safetensors", session)
    assert session.generate(question, GREEDY, context=loaded).token_ids == fresh.token_ids


@BOTH
def test_a_second_reading_scores_the_same_tokens(flags: dict[str, Any], smaller: int) -> None:
    exact, half = engines.session("llama3"), engines.session("llama3", **flags)
    one, two = (session.compress(IDS, keep_ratio=0.4, scorer="reread") for session in (exact, half))
    assert one.kept_tokens == two.kept_tokens


def test_doctor_names_the_type() -> None:
    for flags, expected in ((FLAGS, ["in float16"]), (EIGHT, ["in int8"]), ({}, [])):
        findings = doctor.diagnose(engines.engine_dir("llama3", **flags))
        assert [finding.found for finding in findings if finding.check == "KV cache"] == expected
