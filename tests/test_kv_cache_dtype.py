"""A KV cache in float16 beside float32 weights: half the bytes, moved unchanged, and answers that stay close."""

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


def test_compaction_moves_the_bytes_unchanged() -> None:
    session = engines.session("llama3", **FLAGS)
    prefiller = session.executor.blockwise_prefiller()
    full, kept = prefiller.new_cache(1, len(IDS)), prefiller.new_cache(1, 24)
    assert full.keys[0].dtype == np.float16
    _, queries = prefiller.fill(IDS, full, threading.Event())
    choice = prefiller.compress(full, queries, IDS, 0, 24, kept)
    for part, indices in choice.kept_indices.items():
        for source, target in ((full.keys, kept.keys), (full.values, kept.values)):
            assert np.array_equal(target[part].view(np.uint16), source[part][:, :, indices].view(np.uint16))


def test_rows_take_half_the_memory_where_they_grow() -> None:
    exact, half = (engines.session("llama3", **flags).executor for flags in ({}, FLAGS))
    assert half.kv_bytes_per_token * 2 == exact.kv_bytes_per_token
    assert half.cache_bytes((512,)) * 2 == exact.cache_bytes((512,))
    assert half.new_elastic_cache(2, 512).bytes_of((512,)) * 2 == exact.new_elastic_cache(2, 512).bytes_of((512,))


def test_a_saved_context_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    session = engines.session("llama3", **FLAGS)
    context = session.compress(IDS, keep_ratio=0.4)
    context.save(tmp_path / "context.safetensors")
    question = IDS[:9]
    fresh = session.generate(question, GREEDY, context=context)
    loaded = Context.load(tmp_path / "context.safetensors", session)
    assert session.generate(question, GREEDY, context=loaded).token_ids == fresh.token_ids


def test_a_second_reading_scores_the_same_tokens() -> None:
    exact, half = engines.session("llama3"), engines.session("llama3", **FLAGS)
    one, two = (session.compress(IDS, keep_ratio=0.4, scorer="reread") for session in (exact, half))
    assert one.kept_tokens == two.kept_tokens


def test_doctor_names_the_type() -> None:
    for flags, expected in ((FLAGS, ["in float16"]), ({}, [])):
        findings = doctor.diagnose(engines.engine_dir("llama3", **flags))
        assert [finding.found for finding in findings if finding.check == "KV cache"] == expected
