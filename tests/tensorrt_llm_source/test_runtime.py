"""TensorRT-LLM's own Python runtime under ours: its block managers, its engine reader, the methods we override."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest

from chunkkv.executors.tensorrt_llm import runner as chunkkv_runner
from chunkkv.executors.tensorrt_llm.runner import truncate_pools
from tensorrt_llm_source.conftest import LIMITS, Built

OVERRIDDEN = {  # the parameters that our methods take by name, of GenerationSession's own
    "_prepare_context_inputs": ["batch_size", "context_lengths", "host_context_lengths"],
    "_prepare_generation_inputs": ["batch_size", "context_lengths"],
    "_get_next_step_shape_buffer": ["batch_size", "beam_width", "max_context_length", "step"],
}


def test_its_own_managers_lose_no_block_to_truncation(llm: Any) -> None:
    from tensorrt_llm.runtime.kv_cache_manager import GenerationSequence
    from tensorrt_llm.runtime.memory_pools.pool import Pool
    from tensorrt_llm.runtime.memory_pools.pools_kv_cache_manager import PoolsKVCacheManager

    draw, freed = random.Random(3), 0
    for _ in range(60):
        tokens, rows = draw.choice([16, 32, 64, 128]), draw.randint(1, 5)
        lengths, new = [draw.randint(1, 1999) for _ in range(rows)], draw.randint(1, 60)
        kept = [draw.randint(1, length) for length in lengths]
        longest = max(lengths) + new
        each = -(-longest // tokens)
        pools = PoolsKVCacheManager(
            [Pool(num_kv_heads=2, num_layers=draw.randint(1, 8))], each, rows * each, tokens, 64, longest, 1, 0
        )
        (manager,) = pools._kv_cache_managers
        for row in range(rows):
            pools.add_sequence(GenerationSequence(row, row), max(lengths))
        freed += truncate_pools(pools, kept)
        for step in range(new):
            pools.step([False] * rows)
            owned = [
                block.idx for seq in manager.sequences for block in manager.blocks_manager.allocated_blocks[seq][0]
            ]
            assert len(set(owned)) == len(owned) == rows * each - len(manager.blocks_manager.free_blocks)
            for seq in manager.sequences:
                slots = kept[seq.get_batch_idx()] + step
                held = manager.blocks_manager.get_number_blocks(seq) * tokens
                assert held > slots >= held - tokens, "the slot that is written is backed, and nothing more"
        pools.step([True] * rows)
        assert len(manager.blocks_manager.free_blocks) == rows * each
    assert freed > 1000


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_the_methods_that_we_override_take_what_we_name(llm: Any, method: str) -> None:
    from tensorrt_llm.runtime.generation import GenerationSession

    ours = chunkkv_runner.ChunkKVGenerationSession
    assert issubclass(ours, GenerationSession) and method in vars(ours)
    names = list(inspect.signature(getattr(GenerationSession, method)).parameters)
    assert names[1 : 1 + len(OVERRIDDEN[method])] == OVERRIDDEN[method]
    given = list(inspect.signature(vars(ours)[method]).parameters)
    assert given[1 : 1 + len(OVERRIDDEN[method])] == OVERRIDDEN[method]
    called = inspect.getsource(GenerationSession.handle_per_step)
    assert called.count(f"self.{method}(") >= 1
    if method == "_prepare_generation_inputs":
        assert "step=step" in called, "we read it by its keyword"


def test_its_own_reader_takes_an_engine_directory(build: Callable[..., Built]) -> None:
    from tensorrt_llm.builder import Engine
    from tensorrt_llm.runtime import model_runner

    built = build({})
    assert built.outcome.code == 0, built.outcome
    engine = Engine.from_dir(str(built.folder), 0)
    limits = engine.config.build_config
    assert (limits.max_input_len, limits.max_seq_len) == (LIMITS["max_input_len"], LIMITS["max_seq_len"])
    assert limits.max_batch_size == LIMITS["max_batch_size"] and limits.max_beam_width == 1
    assert engine.config.pretrained_config.mapping.gpus_per_node >= 1
    model = model_runner._engine_config_to_model_config(engine.config, gpu_weights_percent=1)
    side = built.side_file
    assert (model.tokens_per_block, model.num_heads) == (side.tokens_per_block, side.num_heads)
    assert issubclass(chunkkv_runner.ChunkKVModelRunner, model_runner.ModelRunner)
