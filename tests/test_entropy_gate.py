"""The entropy gate: what it asks of a choice, the ONNX bodies against the reference, and who refuses it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import engines, onnx_op
from support.builds import CommandLine
from support.messages import naming
from support.op_cases import CASES, OpCase, named
from support.tensorrt_llm_builds import llm_checkpoint

from chunkkv import reference
from chunkkv.errors import ConfigError, NativeArgumentError
from chunkkv.native.arguments import settings_struct
from chunkkv.settings import GATE_TOKENS, ChunkKVSettings

GATED = [case for case in CASES if case.settings.score == "softmax"]
SETTINGS = ChunkKVSettings(window=2, sinks=0, chunk_size=8, min_tokens=10, gate="entropy", keep_per_10k=5000)
SPIKY = np.array([8, 7, 6, 5, 0.1, 0.1, 0.1, 0.1], np.float32)
FLAT = np.full(8, 2.0, np.float32)
LOW = np.full(8, 1.0, np.float32)


def gated(case: OpCase) -> OpCase:
    """The case with the gate, chunks longer than what a gated one gives, and attention that is uneven in them."""
    size = 2 * GATE_TOKENS + 1
    least = case.settings.window + case.settings.sinks + size
    return replace(case, contrast=6.0).with_settings(gate="entropy", chunk_size=size, min_tokens=least, budget_tokens=0)


def scores(*chunks: np.ndarray) -> np.ndarray:
    return np.concatenate([*chunks, np.zeros(2, np.float32)]) / 1000


def kept(values: np.ndarray, count: int, settings: ChunkKVSettings = SETTINGS) -> list[int]:
    return reference.select_tokens(values, len(values), count, settings).tolist()


def test_a_chunk_with_a_few_high_scores_gives_only_these_at_first() -> None:
    values = scores(LOW, SPIKY, FLAT)
    assert kept(values, 14) == [*range(8, 12), *range(16, 24), 24, 25]
    assert kept(values, 14, replace(SETTINGS, gate="none")) == [*range(8, 16), *range(16, 20), 24, 25]


def test_the_best_tokens_of_a_gated_chunk_stay_wherever_they_are() -> None:
    values = scores(LOW, SPIKY[::-1], FLAT)
    assert kept(values, 2 + GATE_TOKENS) == [12, 13, 14, 15, 24, 25]


def test_what_the_gate_held_back_fills_the_budget() -> None:
    values = scores(LOW, SPIKY, FLAT)
    assert kept(values, 24) == [*range(0, 14), *range(16, 26)]


def test_equal_scores_are_never_gated() -> None:
    values = scores(FLAT, FLAT, FLAT, FLAT[:5])
    assert kept(values, 15) == kept(values, 15, replace(SETTINGS, gate="none")) == [*range(13), 29, 30]


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.name)
def test_the_graph_chooses_what_the_reference_chooses_from_the_same_scores(case: OpCase) -> None:
    case = gated(case)
    inputs = case.inputs()
    indices, lengths, found = onnx_op.select(
        inputs.query, inputs.key, inputs.lengths, case.settings, **inputs.optional()
    )
    expected = reference.select_batch(inputs.query, inputs.key, inputs.lengths, case.settings, **inputs.optional())
    assert (lengths == expected.kept_lengths).all()
    for row, length in enumerate(case.lengths):
        flags = None if inputs.is_delimiter is None else inputs.is_delimiter[row, :length]
        chosen = reference.select_tokens(found[row, :length], length, int(lengths[row]), case.settings, flags)
        assert indices[row, : lengths[row]].tolist() == chosen.tolist()


def test_the_gate_changes_the_choice_of_the_graph() -> None:
    case = gated(replace(named("plain"), lengths=(300, 200)))
    inputs = case.inputs()
    with_gate, _, _ = onnx_op.select(inputs.query, inputs.key, inputs.lengths, case.settings)
    without, _, _ = onnx_op.select(inputs.query, inputs.key, inputs.lengths, replace(case.settings, gate="none"))
    assert not np.array_equal(with_gate, without)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_scores_do_not_open_or_close_the_gate_of_others(bad: float) -> None:
    values = scores(LOW, SPIKY, FLAT, LOW)
    expected = kept(values, 14)
    values[-4] = bad
    assert (set(kept(values, 14)) & set(range(24))) <= set(expected) | set(range(16, 24))


def test_the_gate_needs_shares_of_attention() -> None:
    with pytest.raises(ConfigError, match=naming("gate 'entropy' 'softmax'")):
        replace(SETTINGS, score="logits")
    with pytest.raises(ConfigError, match=naming("gate 'maybe' none entropy")):
        replace(SETTINGS, gate="maybe")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_llm"])
def test_backends_that_run_kernels_refuse_the_gate_by_name(
    backend: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Both see the checkpoint first, so the flag is all that a build lacks."""
    checkpoint = llm_checkpoint() if backend == "tensorrt_llm" else engines.checkpoint_dir("llama3")
    flags = {"checkpoint_dir": checkpoint, "output_dir": tmp_path / "engine", "backend": backend, "chunkkv": True}
    flags |= {"dry_run": True, "max_seq_len": 256, "log_level": "error"}
    build = CommandLine(capsys)
    assert build(*engines.command_line({**flags, "chunkkv_gate": "none"})).code == 0
    message = build(*engines.command_line({**flags, "chunkkv_gate": "entropy"})).error(2)
    assert re.search(naming("--chunkkv_gate 'entropy' none onnxruntime"), message)


def test_settings_say_what_kernels_lack() -> None:
    replace(SETTINGS, gate="none").check_kernels()
    with pytest.raises(ConfigError, match=naming("gate 'entropy' none")):
        SETTINGS.check_kernels()


def test_the_native_library_refuses_the_gate() -> None:
    with pytest.raises(NativeArgumentError, match=naming("gate 'entropy'")):
        settings_struct(SETTINGS)
