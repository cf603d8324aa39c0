"""A whole model through the TensorRT-LLM path on the CPU, against the ONNX Runtime engine of the same checkpoint.

The real builder wraps the network, the real executor and session drive it, the real plugins run in the plugin host with
emulated kernels; attention over the paged pool and the rest of the network are NumPy. TensorRT-LLM itself is a contract
as read (support/tensorrt_llm_double): nothing is proved about the real one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import engines
from support.cuda_double import CudartDouble
from support.forced_tokens import forced_logits
from support.tensorrt_llm_double import installed
from support.tensorrt_llm_double.checkpoints import convert
from support.tensorrt_llm_double.graph import Graph
from support.tensorrt_llm_double.step_engine import RecordedStepEngine

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.executors.tensorrt_llm.executor import TensorRTLLMExecutor
from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.settings import ChunkKVSettings
from native import llm_networks as llm

pytestmark = [pytest.mark.contract_as_read, pytest.mark.deep]

NEEDLE = llm.ROOT / "examples" / "needle"
STEPS = 65  # the first token comes from prefill, 64 from decode steps
LENGTHS = (87, 9, 41, 22)  # the second prompt is kept whole
SHARPNESS = 1e-3  # float32 logits have a spread of 2.4; sums run in another order


def session_of(graph: Graph, kv_bytes: int, settings: ChunkKVSettings | None, like: ChunkKVSession) -> ChunkKVSession:
    """Return a session over a network, with the end tokens and limits of another session."""
    node = graph.of("gpt_attention")[0].attributes
    geometry = PagedGeometry(
        num_layers=len(graph.of("gpt_attention")),
        num_kv_heads=node["num_kv_heads"],
        head_size=node["hidden_size_per_head"],
        tokens_per_block=node["tokens_per_block"],
        kv_bytes=kv_bytes,
        vocab_size=like.limits.vocab_size,
        max_batch_size=like.limits.max_batch_size,
        max_seq_len=like.limits.max_seq_len,
    )
    watched = [leader.outputs[1] for leader in llm.leaders(graph)]
    engine = RecordedStepEngine(llm.Machine().execution(graph), watched)
    return ChunkKVSession(
        TensorRTLLMExecutor(engine, geometry, settings),
        settings,
        like.limits,
        like.tokenizer,
        tuple(like.eos_token_ids),
    )


def choices(session: ChunkKVSession, lengths: tuple[int, ...]) -> list[list[np.ndarray]]:
    """Return what the leaders kept of each prompt that is longer than what is kept anyway."""
    contexts = session.executor.engine.contexts  # type: ignore[attr-defined]
    kept = [session.settings.kept_tokens(length) for length in lengths]
    pairs = zip(contexts, kept, lengths, strict=True)
    return [[indices[:count] for indices in context] for context, count, length in pairs if count < length]


def onnxruntime_session(chunkkv: bool = True, **flags: Any) -> ChunkKVSession:
    return engines.session("llama3", chunkkv, checkpoint_dir=llm.checkpoint(), **flags)


@cache
def answers(**flags: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return prompts and the ONNX Runtime engine's own answers; one of them ends early."""
    session, work = onnxruntime_session(**flags), llm.Workload.random(LENGTHS, 1)
    (end,) = session.eos_token_ids
    found = session.generate([list(row) for row in work.prompts], SamplingParams(STEPS, ignore_eos=True))
    tokens = [tuple(token if token != end else end + 1 for token in result.token_ids) for result in found]
    tokens[2] = (*tokens[2][:20], end)
    return work.prompts, tuple(tokens)


def flags_of(leader: str, reuse: int, boundaries: str) -> dict[str, Any]:
    return {"chunkkv_leader": leader, "chunkkv_layer_reuse": reuse, "chunkkv_boundaries": boundaries}


def network(flags: dict[str, Any], **more: Any) -> Graph:
    tokenizer = {"tokenizer_dir": llm.checkpoint()} if flags.get("chunkkv_boundaries") == "delimiter" else {}
    return llm.networks(**flags, **tokenizer, **more)[0]


@pytest.mark.parametrize(
    ("leader", "reuse", "boundaries"),
    [
        ("first", 1, "fixed"),
        ("first", 1, "delimiter"),
        ("first", 2, "fixed"),
        ("first", 2, "delimiter"),
        ("first", 4, "fixed"),
        ("first", 4, "delimiter"),
        ("last", 1, "fixed"),
        ("last", 1, "delimiter"),
        ("last", 2, "fixed"),
        ("last", 2, "delimiter"),
        ("last", 4, "fixed"),
        ("last", 4, "delimiter"),
    ],
)
def test_float32_gives_the_kept_tokens_and_logits_of_onnxruntime(leader: str, reuse: int, boundaries: str) -> None:
    flags = flags_of(leader, reuse, boundaries)
    prompts, tokens = answers(**flags)
    reference = onnxruntime_session(**flags)
    session = session_of(network(flags).widened(), 4, reference.settings, reference)
    found, wanted = (forced_logits(one, prompts, tokens) for one in (session, reference))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=SHARPNESS, rtol=0)
    kept = [reference.inspect(list(prompt)).groups for prompt in prompts]
    expected = [
        [group.kept_indices for group in groups]
        for groups in kept
        if groups[0].kept_indices.size < groups[0].token_scores.size
    ]
    for a, b in zip(choices(session, LENGTHS), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "kv"),
    [("float16", None), ("bfloat16", None), ("float16", "int8"), ("float16", "fp8"), ("bfloat16", "fp8")],
)
def test_coarser_types_err_no_more_than_without_compression(dtype: str, kv: str | None) -> None:
    # The mean over heads: rounding seldom turns it, and other chunks would be another error than that of the types.
    flags, nbytes = flags_of("first", 2, "fixed") | {"chunkkv_head_reduce": "mean"}, llm.KV_BYTES[kv or dtype]
    prompts, tokens = answers(**flags)
    reference, whole = onnxruntime_session(**flags), onnxruntime_session(False)
    session = session_of(network(flags, dtype=dtype, kv=kv), nbytes, reference.settings, reference)
    plain = session_of(network({}, dtype=dtype, kv=kv, plain=True), nbytes, None, whole)

    def error(one: ChunkKVSession, other: ChunkKVSession) -> float:
        """Return the root mean square of the difference in logits."""
        pairs = zip(*(forced_logits(each, prompts, tokens) for each in (one, other)), strict=True)
        return float(np.sqrt(np.mean([np.square(a - b).mean() for a, b in pairs])))

    with_chunkkv, without = error(session, reference), error(plain, whole)
    assert 0 < with_chunkkv < 1.5 * without


def test_the_needle_is_found_in_a_fifth_of_the_cache(tmp_path: Path) -> None:
    """From the shipped checkpoint to an engine directory to text, on a machine of doubles."""
    demo = json.loads((NEEDLE / "prompts" / "demo.json").read_text(encoding="utf-8"))
    flags = {"chunkkv_keep_ratio": 0.2, "chunkkv_layer_reuse": 2, "chunkkv_boundaries": "delimiter"}
    flags |= {"chunkkv_chunk_size": 20, "chunkkv_window": 32, "chunkkv_sinks": 4, "chunkkv_min_tokens": 64}
    sizes = {"max_seq_len": 2304, "max_input_len": 2240, "max_batch_size": 2}
    checkpoint = convert(NEEDLE / "model", tmp_path / "checkpoint", "bfloat16")
    with installed() as machine, llm.plugin_library():
        machine.cuda, machine.plugins = CudartDouble(), llm.Machine().plugin
        cuda = CudaRuntime(machine.cuda)
        folder = llm.build_engine_dir(checkpoint, tokenizer_dir=NEEDLE / "model", **sizes, **flags)
        with mock.patch.object(CudaRuntime, "load", staticmethod(lambda: cuda)):
            session = ChunkKVSession.from_dir(folder)
        results = session.generate([demo["text"], demo["text"]], SamplingParams(24))
    for result in results:
        assert result.text.strip() == demo["expected"]
        assert result.statistics.kept_tokens == result.statistics.prompt_tokens // 5
        assert result.statistics.allocated_cache_bytes < 0.25 * result.statistics.full_cache_bytes
