"""TensorRT-LLM's Python runtime as read from its sources: KV managers and the order of a decode. A contract as read.

It holds what ChunkKV's subclasses meet, and proves nothing about the real runtime. Nothing is computed: every step
records what the engine would have been given. Plain Python, no torch.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np


class Block:
    def __init__(self, idx: int) -> None:
        self.idx, self.ref_count = idx, 0

    def add_link(self) -> None:
        self.ref_count += 1

    def remove_link(self) -> None:
        assert self.ref_count > 0, f"block {self.idx} was given back twice"
        self.ref_count -= 1

    def has_link(self) -> bool:
        return self.ref_count > 0


@dataclass(frozen=True)
class GenerationSequence:
    seq_idx: int
    batch_idx: int

    def get_batch_idx(self) -> int:
        return self.batch_idx


class BlocksManager:
    def __init__(self, num_layers: int, num_blocks: int, max_blocks_per_seq: int) -> None:
        self.num_layers, self.max_blocks_per_seq = num_layers, max_blocks_per_seq
        self.free_blocks = [Block(index) for index in range(num_blocks)]
        self.allocated_blocks: Any = defaultdict(lambda: [[]])

    def allocate(self, owner: GenerationSequence) -> None:
        if not self.free_blocks:
            raise RuntimeError("Can't allocate new block for KV cache")
        block = self.free_blocks.pop(0)
        block.add_link()
        self.allocated_blocks[owner][0].append(block)

    def free(self, owner: GenerationSequence) -> None:
        for block in self.allocated_blocks.pop(owner)[0]:
            block.remove_link()
            if not block.has_link():
                self.free_blocks.append(block)


class KVCacheManager:
    def __init__(self, num_layers: int, num_blocks: int, tokens_per_block: int, max_blocks_per_seq: int) -> None:
        self.blocks_manager = BlocksManager(num_layers, num_blocks, max_blocks_per_seq)
        self.tokens_per_block, self.bubble_len = tokens_per_block, 0
        self.lens: list[int] = []
        self.sequences: list[GenerationSequence] = []

    def add_sequence(self, sequence: GenerationSequence, context_len: int) -> None:
        self.lens.append(context_len)
        self.sequences.append(sequence)
        for _ in range(-(-context_len // self.tokens_per_block)):
            self.blocks_manager.allocate(sequence)

    def step(self, finished: list[bool]) -> None:
        for sequence in list(self.sequences):
            row = sequence.get_batch_idx()
            if finished[row]:
                self.blocks_manager.free(sequence)
                self.sequences.remove(sequence)
                continue
            if self.lens[row] % self.tokens_per_block == 0:
                self.blocks_manager.allocate(sequence)
            self.lens[row] += 1


class PoolsKVCacheManager:
    def __init__(self, pools: list[tuple[int, int]], num_blocks: int, tokens_per_block: int, widest: int) -> None:
        self._kv_cache_managers = [KVCacheManager(layers, num_blocks, tokens_per_block, widest) for _, layers in pools]

    def add_sequence(self, sequence: GenerationSequence, context_len: int) -> None:
        for manager in self._kv_cache_managers:
            manager.add_sequence(sequence, context_len)

    def step(self, finished: list[bool]) -> None:
        for manager in self._kv_cache_managers:
            manager.step(finished)

    def get_block_offsets(self, beam_width: int) -> list[list[list[int]]]:
        """Return, per pool and row, the numbers of the blocks."""
        return [
            [[block.idx for block in manager.blocks_manager.allocated_blocks[s][0]] for s in manager.sequences]
            for manager in self._kv_cache_managers
        ]


@dataclass
class Step:
    """What the engine would have been given; `lens` are the first manager's, after it moved on."""

    request_type: int
    context_lengths: list[int]
    sequence_lengths: list[int]
    position_ids: list[int]
    host_past: list[int]
    blocks: list[list[list[int]]]
    lens: list[int]


@dataclass
class GenerationSession:
    """A decode of `max_new_tokens` tokens for every row; kwargs as the real one takes them."""

    model_config: Any
    engine_buffer: Any
    mapping: Any
    debug_mode: bool = False
    debug_tensors_to_save: Any = None
    cuda_graph_mode: bool = False
    stream: Any = None
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = 1000 if b"streamed" in self.engine_buffer else 0
        self.streamed: list[float] = []
        engine = SimpleNamespace(streamable_weights_size=size)
        self.runtime = SimpleNamespace(engine=engine, _set_weight_streaming=self.streamed.append)

    @property
    def paged_kv_cache(self) -> bool:
        return self.model_config.kv_cache_type == "paged"

    def setup(self, batch_size: int, max_context_length: int, max_new_tokens: int) -> None:
        self.batch_size, self.max_context_length = batch_size, max_context_length
        self.max_new_tokens, tokens = max_new_tokens, self.model_config.tokens_per_block
        self._blocks_per_row = -(-(max_context_length + max_new_tokens) // tokens)

    def decode(self, context_lengths: list[int]) -> int:
        """Run prefill and all steps; return the blocks of the first pool that were in use before the last step."""
        config = self.model_config
        blocks = self.batch_size * self._blocks_per_row
        self.pools_kv_cache_manager = PoolsKVCacheManager(
            config.pools, blocks, config.tokens_per_block, self._blocks_per_row
        )
        for row in range(self.batch_size):
            self.pools_kv_cache_manager.add_sequence(GenerationSequence(row, row), max(context_lengths))
        host = np.array(context_lengths, np.int32)
        for step in range(self.max_new_tokens):
            self.handle_per_step(step, host.copy(), host)
        manager = self.pools_kv_cache_manager._kv_cache_managers[0].blocks_manager
        used = blocks - len(manager.free_blocks)
        self.pools_kv_cache_manager.step([True] * self.batch_size)
        return used

    def handle_per_step(self, step: int, context_lengths: np.ndarray, host_context_lengths: np.ndarray) -> None:
        batch = self.batch_size
        if step == 0:
            inputs = self._prepare_context_inputs(
                batch_size=batch,
                context_lengths=context_lengths,
                host_context_lengths=host_context_lengths,
                use_gpt_attention_plugin=True,
                remove_input_padding=True,
            )
            self._record(0, context_lengths, host_context_lengths.tolist(), inputs["position_ids"], context_lengths)
        if step == self.max_new_tokens - 1:
            return
        if step == 0:
            self.sequence_length_buffer = context_lengths.copy()
        inputs = self._prepare_generation_inputs(
            batch_size=batch,
            context_lengths=context_lengths,
            use_gpt_attention_plugin=True,
            remove_input_padding=True,
            step=step,
            num_beams=1,
            attention_mask=None,
        )
        if self.paged_kv_cache:
            self.pools_kv_cache_manager.step([False] * batch)
        past = self._get_next_step_shape_buffer(
            batch, 1, self.max_context_length, step, context_lengths, host_context_lengths, inputs["position_ids"]
        )
        self.sequence_length_buffer += 1  # the sampler does it, before the engine runs
        self._record(1, context_lengths, past, inputs["position_ids"], self.sequence_length_buffer)

    def _prepare_context_inputs(
        self, batch_size: int, context_lengths: Any, host_context_lengths: Any, **kwargs: Any
    ) -> dict[str, Any]:
        assert len(host_context_lengths) == batch_size and kwargs["remove_input_padding"]
        return {"position_ids": np.concatenate([np.arange(length) for length in context_lengths])}

    def _prepare_generation_inputs(self, batch_size: int, context_lengths: Any, **kwargs: Any) -> dict[str, Any]:
        return {"position_ids": context_lengths + kwargs["step"]}

    def _get_next_step_shape_buffer(  # as positional as the real one is called
        self, batch_size: int, beam_width: int, max_context_length: int, step: int, *rest: Any
    ) -> list[int]:
        return [max_context_length + step] * batch_size

    def _record(self, kind: int, contexts: Any, past: list[int], positions: Any, lengths: Any) -> None:
        pools = self.pools_kv_cache_manager
        numbers = [np.asarray(values).tolist() for values in (contexts, lengths, positions, past)]
        contexts, lengths, positions, past = numbers
        lens = list(pools._kv_cache_managers[0].lens)
        self.steps.append(Step(kind, contexts, lengths, positions, past, pools.get_block_offsets(1), lens))


class ModelRunner:
    def __init__(self, session: Any, max_batch_size: int, max_input_len: int, max_seq_len: int, max_beam_width: int,
                 kv_cache_type: Any) -> None:  # fmt: skip
        self.session, self.kv_cache_type = session, kv_cache_type
        self.limits = (max_batch_size, max_input_len, max_seq_len, max_beam_width)


def model_config(tokens_per_block: int = 16, pools: tuple[tuple[int, int], ...] = ((2, 4),)) -> SimpleNamespace:
    """Return what the session reads of its model; pools are (KV heads, layers)."""
    return SimpleNamespace(kv_cache_type="paged", tokens_per_block=tokens_per_block, pools=list(pools))


def install_runtime(monkeypatch: Any, devices: list[int]) -> None:
    """Add the runtime to the package tensorrt_llm that is installed; `devices` gets every GPU that is chosen."""
    generation, runner = (types.ModuleType(f"tensorrt_llm.runtime.{name}") for name in ("generation", "model_runner"))
    generation.GenerationSession = GenerationSession
    runner.ModelRunner = ModelRunner
    runner.torch = SimpleNamespace(cuda=SimpleNamespace(set_device=devices.append))
    runner._engine_config_to_model_config = lambda config, gpu_weights_percent: model_config()
    package = types.ModuleType("tensorrt_llm.runtime")
    package.generation, package.model_runner = generation, runner
    for module in (package, generation, runner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
