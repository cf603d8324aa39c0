"""Drives recorded networks step by step: context and generation rows mixed at will, any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkkv.settings import ChunkKVSettings
from support.tensorrt_llm_double.attention import Hidden
from support.tensorrt_llm_double.run import Execution, run_ranks

MAX_BLOCKS = 20  # of one row


@dataclass
class Row:
    """One request: its prompt, what was appended, and its blocks."""

    prompt: np.ndarray
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    slots: int = 0  # of the cache that are filled
    hidden: Hidden = field(default_factory=dict)  # what attention must not see of the prompt, by layer


class Rank:
    """One rank's execution and its pool of blocks, which its layers share."""

    def __init__(self, execution: Execution, blocks: int, kv_bytes: int) -> None:
        self.execution = execution
        attentions = execution.graph.of("gpt_attention")
        node, self.layers = attentions[0].attributes, len(attentions)
        self.block_bytes = node["num_kv_heads"] * node["tokens_per_block"] * node["hidden_size_per_head"] * kv_bytes
        self.address = execution.pools.allocate(blocks * self.layers * 2 * self.block_bytes)

    def forget(self, block: int) -> None:
        """Overwrite a block that was given back, so that nothing may depend on it."""
        raw, size = self.execution.pools.load(self.address), 2 * self.layers * self.block_bytes
        raw[block * size : (block + 1) * size] = 0xFF
        self.execution.pools.store(self.address, raw)

    def feeds(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Return what this rank must know of the cache."""
        offsets = np.zeros((1, len(rows), 2, MAX_BLOCKS), np.int32)
        for number, row in enumerate(rows):
            first = np.array(row.blocks, np.int32) * self.layers * 2
            offsets[0, number, :, : len(first)] = first, first + 1
        layers = np.arange(self.layers, dtype=np.int32)
        return {
            "kv_cache_block_offsets": offsets,
            "host_kv_cache_block_offsets": offsets.copy(),
            "host_kv_cache_pool_pointers": np.array([[self.address, 0]], np.int64),
            "host_kv_cache_pool_mapping": np.stack([0 * layers, layers], axis=1),
            "host_max_attention_window_sizes": np.full(self.layers, 1 << 20, np.int32),
        }


class Driver:
    """Owns the blocks; the first token behind N(L) goes to slot N(L), blocks behind that are given back and spoilt.

    `stages` lists the pipeline stages, each of them the ranks of its tensor-parallel group.
    """

    def __init__(
        self, stages: Sequence[Sequence[Execution]], settings: ChunkKVSettings | None, kv_bytes: int, blocks: int = 64
    ) -> None:
        self._stages = [[Rank(execution, blocks, kv_bytes) for execution in stage] for stage in stages]
        self._settings = settings
        self._free = list(range(blocks - 1, -1, -1))
        self._tokens = stages[0][0].graph.of("gpt_attention")[0].attributes["tokens_per_block"]

    def step(self, contexts: Sequence[Row], generations: Sequence[Row] = ()) -> np.ndarray:
        """Run one step and return logits [rows,vocab]; contexts come first."""
        rows = [*contexts, *generations]
        for row in contexts:
            self._extend(row, len(row.prompt))
        for row in generations:
            self._extend(row, row.slots + 1)
        feeds = self._feeds(contexts, generations)
        for stage in self._stages:
            given = [{**feeds, **rank.feeds(rows)} for rank in stage]
            for rank in stage:
                rank.execution.hidden = [row.hidden for row in rows]
            found = run_ranks([rank.execution for rank in stage], given)[0]
            feeds["hidden_states_input"] = found.get("hidden_states_output")
        for row in contexts:
            row.slots = self._settings.kept_tokens(len(row.prompt)) if self._settings else len(row.prompt)
            self._give_back(row)
        return found["logits"].astype(np.float32)

    def _extend(self, row: Row, slots: int) -> None:
        while len(row.blocks) * self._tokens < slots:
            row.blocks.append(self._free.pop())
        row.slots = slots

    def _give_back(self, row: Row) -> None:
        keep = -(-row.slots // self._tokens)
        for block in row.blocks[keep:]:
            self._free.append(block)
            for stage in self._stages:
                for rank in stage:
                    rank.forget(block)
        del row.blocks[keep:]

    def _feeds(self, contexts: Sequence[Row], generations: Sequence[Row]) -> dict[str, np.ndarray]:
        rows = [*contexts, *generations]
        lengths = [len(row.prompt) for row in rows]
        logical = [*lengths[: len(contexts)], *(len(row.prompt) + len(row.tokens) for row in generations)]
        counts = [*lengths[: len(contexts)], *(1 for _ in generations)]
        ids = [*(row.prompt for row in contexts), *(row.tokens[-1:] for row in generations)]
        positions = [np.arange(end - count, end) for end, count in zip(logical, counts, strict=True)]
        past = [*lengths[: len(contexts)], *(row.slots - 1 for row in generations)]
        numbers = {
            "input_ids": np.concatenate(ids),
            "position_ids": np.concatenate(positions),
            "last_token_ids": np.cumsum(counts),
            "sequence_length": logical,
            "context_lengths": lengths,
            "host_context_lengths": lengths,
            "host_past_key_value_lengths": past,
            "host_request_types": [0] * len(contexts) + [1] * len(generations),
            "host_sink_token_length": [0],
            "cache_indirection": np.zeros((len(rows), 1, 1)),
        }
        feeds = {name: np.asarray(value, np.int32) for name, value in numbers.items()}
        feeds["host_runtime_perf_knobs"] = np.full(16, -1, np.int64)
        feeds["host_context_progress"] = np.zeros(1, np.int64)
        return feeds
