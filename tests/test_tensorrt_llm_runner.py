"""Blocks that come back in TensorRT-LLM's own Python runtime, on a contract as read of its managers and decode loop.

The runtime is our own double (support/tensorrt_llm_runtime_double.py); these tests prove nothing about the real one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming
from support.tensorrt_llm_double import installed
from support.tensorrt_llm_runtime_double import (
    GenerationSequence,
    PoolsKVCacheManager,
    install_runtime,
    model_config,
)
from test_tensorrt_llm_executor import engine_dir

from chunkkv.errors import BackendUnavailableError, EngineError, EngineRunError
from chunkkv.executors.tensorrt_llm import runner as tensorrt_llm_runner
from chunkkv.executors.tensorrt_llm.runner import truncate_pools
from chunkkv.gpu import tensorrt_plugins
from chunkkv.settings import ChunkKVSettings

pytestmark = pytest.mark.contract_as_read

SETTINGS = ChunkKVSettings(keep_per_10k=2000)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A machine with TensorRT-LLM and its runtime; yields the GPUs that were chosen."""
    found: list[int] = []
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", (tmp_path,))
    (tmp_path / "libchunkkv_tensorrt.so.10").touch()
    with installed():
        install_runtime(monkeypatch, found)
        yield found


def decoded(lengths: list[int], new: int, pools: tuple = ((2, 4),)) -> Any:
    session = tensorrt_llm_runner.ChunkKVGenerationSession(model_config(16, pools), b"", None)
    session.chunkkv = SETTINGS
    session.setup(len(lengths), max(lengths), new)
    session.used = session.decode(lengths)
    return session


def test_blocks_come_back_and_the_rest_of_the_loop_stays_logical(devices: list[int]) -> None:
    lengths, new = [1000, 37, 400], 40
    kept = [SETTINGS.kept_tokens(length) for length in lengths]
    assert kept == [200, 37, 80]
    session = decoded(lengths, new)
    context, *steps = session.steps
    assert context.host_past == context.sequence_lengths == lengths
    assert [len(blocks) for blocks in context.blocks[0]] == [63, 63, 63], "every row has blocks for the longest prompt"
    assert session.blocks_returned == 3 * 63 - sum(-(-n // 16) for n in kept)
    for number, step in enumerate(steps):
        assert step.context_lengths == lengths
        assert step.position_ids == [length + number for length in lengths]
        assert step.sequence_lengths == [length + number + 1 for length in lengths], "logical: the sampler's index"
        assert step.host_past == [200 + number] * 3, "compact: what attention plans its grid with"
        assert step.lens == [n + number + 1 for n in kept]
        for blocks, n in zip(step.blocks[0], kept, strict=True):
            assert len(blocks) * 16 > n + number >= (len(blocks) - 1) * 16, "the written slot is backed, nothing more"
        owned = [block for blocks in step.blocks[0] for block in blocks]
        assert len(set(owned)) == len(owned)
    manager = session.pools_kv_cache_manager._kv_cache_managers[0].blocks_manager
    assert sorted(block.idx for block in manager.free_blocks) == list(range(3 * 65))
    assert session.used < 3 * 63 / 4


def test_one_token_needs_no_second_step(devices: list[int]) -> None:
    session = decoded([300], 1)
    assert len(session.steps) == 1 and session.blocks_returned == 0


def test_several_pools_are_truncated_alike(devices: list[int]) -> None:
    session = decoded([500, 90], 20, pools=((2, 4), (8, 1)))
    for step in session.steps:
        assert step.blocks[0] == step.blocks[1]
    assert session.blocks_returned == 2 * (2 * 32 - 7 - 4)


def test_a_session_without_settings_says_so(devices: list[int]) -> None:
    session = tensorrt_llm_runner.ChunkKVGenerationSession(model_config(), b"", None)
    session.setup(1, 100, 4)
    with pytest.raises(EngineRunError, match="attribute chunkkv"):
        session.decode([100])


def test_truncation_of_random_batches_loses_no_block() -> None:
    draw, freed = random.Random(3), 0
    for _ in range(300):
        tokens, rows = draw.choice([16, 32, 64, 128]), draw.randint(1, 5)
        lengths, new = [draw.randint(1, 1999) for _ in range(rows)], draw.randint(1, 199)
        kept = [draw.randint(1, length) for length in lengths]
        total = rows * -(-(max(lengths) + new) // tokens)
        pools = PoolsKVCacheManager([(1, draw.randint(1, 8))], total, tokens, total)
        manager = pools._kv_cache_managers[0]
        for row in range(rows):
            pools.add_sequence(GenerationSequence(row, row), max(lengths))
        freed += truncate_pools(pools, kept)
        for step in range(new):
            pools.step([False] * rows)
            owned = [block for blocks in pools.get_block_offsets(1)[0] for block in blocks]
            assert len(set(owned)) == len(owned) == total - len(manager.blocks_manager.free_blocks)
            for sequence in manager.sequences:
                row = sequence.get_batch_idx()
                assert len(manager.blocks_manager.allocated_blocks[sequence][0]) * tokens > kept[row] + step
        pools.step([True] * rows)
        assert len(manager.blocks_manager.free_blocks) == total
    assert freed > 10_000


def test_a_runner_loads_its_rank_with_the_settings_of_the_directory(devices: list[int]) -> None:
    path = engine_dir(chunkkv_layer_reuse=2)
    runner = tensorrt_llm_runner.ChunkKVModelRunner.from_dir(path, rank=0, cuda_graph_mode=True)
    assert isinstance(runner.session, tensorrt_llm_runner.ChunkKVGenerationSession)
    assert runner.session.chunkkv.kept_tokens(100) == 40
    assert runner.session.engine_buffer == (path / "rank0.engine").read_bytes() and runner.session.cuda_graph_mode
    assert runner.session.streamed == []
    assert runner.limits == (4, 192, 256, 1) and runner.kv_cache_type == "paged" and devices == [0]
    import tensorrt

    assert tensorrt.get_plugin_registry().get_creator("ChunkKVCompress", "1", "chunkkv") is not None


def test_streamed_weights_get_their_share_of_the_gpu(devices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.builder import Engine

    load = Engine.from_dir

    def streamed(*words: Any) -> Any:
        engine = load(*words)
        engine.engine = b"streamed"
        return engine

    monkeypatch.setattr(Engine, "from_dir", streamed)
    path = engine_dir(chunkkv_layer_reuse=2)
    runner = tensorrt_llm_runner.ChunkKVModelRunner.from_dir(path, gpu_weights_percent=0.25)
    assert runner.session.streamed == [0.25]


def test_what_is_missing_is_named(devices: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=naming("chunkkv_config.json read")):
        tensorrt_llm_runner.ChunkKVModelRunner.from_dir(tmp_path)
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", ())
    with pytest.raises(BackendUnavailableError, match=naming("libchunkkv_tensorrt.so.10")):
        tensorrt_llm_runner.ChunkKVModelRunner.from_dir(engine_dir(chunkkv_layer_reuse=2))


def test_without_tensorrt_llm_the_module_still_imports() -> None:
    with pytest.raises(BackendUnavailableError, match=naming("'tensorrt' 'tensorrt_llm'")) as refused:
        _ = tensorrt_llm_runner.ChunkKVModelRunner
    assert str(refused.value).endswith("('tensorrt' is not installed)"), "of no version: TensorRT-LLM brings its own"
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = tensorrt_llm_runner.Other
