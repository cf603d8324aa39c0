"""The TensorRT backend against doubles: what is built, how it is run, and that its answers are ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import engines
from support.checkpoints import VARIANTS
from support.tensorrt_double import DOUBLES, Double

from chunkkv import ChunkKVSession, SamplingParams

PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=True)
PROMPTS = [np.random.default_rng([5, length]).integers(3, 300, length) for length in (61, 9, 100)]
TOLERANCE = 1e-4


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Double]:
    double = Double()
    double.install(monkeypatch, tmp_path)
    yield double
    DOUBLES.remove(double)


def build(output: Path, variant: str = "llama3", chunkkv: bool = True, **flags: object) -> Path:
    limits = {"max_batch_size": 4, "max_seq_len": 256, "log_level": "error", "dtype": "float32"}
    settings = {**engines.SMALL_CHUNKKV, "chunkkv": True} if chunkkv else {}
    named = {"checkpoint_dir": engines.checkpoint_dir(variant), "output_dir": output, "backend": "tensorrt"}
    engines.build_engine.main(engines.command_line({**named, **limits, **settings, **flags}))
    return output


@pytest.mark.parametrize("boundaries", ["fixed", "delimiter"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_answers_equal_those_of_onnx_runtime(machine, tmp_path, variant: str, boundaries: str) -> None:
    flags = {"chunkkv_layer_reuse": 2, "chunkkv_boundaries": boundaries}
    expected = engines.session(variant, **flags).generate(PROMPTS, PARAMS, keep_ratio=[None, None, 0.7])
    session = ChunkKVSession.from_dir(build(tmp_path / "engine", variant, **flags))
    found = session.generate(PROMPTS, PARAMS, keep_ratio=[None, None, 0.7])
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert np.abs(np.array(one.logprobs) - np.array(other.logprobs)).max() <= TOLERANCE
        assert one.statistics.kept_tokens == other.statistics.kept_tokens
    assert machine.cuda.launches == PARAMS.max_new_tokens - 2
