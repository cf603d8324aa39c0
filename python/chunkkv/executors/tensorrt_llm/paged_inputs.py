"""The inputs of one step of a TensorRT-LLM engine, by name, as its networks of 0.16 to 1.2 declare them.

Tokens of all rows are packed into one dimension. A row is either in its context phase, with its whole prompt, or in
generation, with one token; the engine derives the compacted length itself from the logical one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkkv.errors import EngineMismatchError
from chunkkv.executors.tensorrt_llm.step_engine import StepTensor

LOGITS = "logits"
_MAPPING, _CACHE_INDIRECTION, _LAST_TOKENS = "host_kv_cache_pool_mapping", "cache_indirection", "last_token_ids"
_CONTEXT, _GENERATION = 0, 1
_PERF_KNOBS = [1, 0, *[-1] * 14]  # several blocks per sequence in decode; float16 accumulation as the engine has it
_ADVICE = (
    "ChunkKVSession feeds plain decoders on one GPU: build without LoRA, prompt tables, speculative decoding, managed "
    "weights (--fast_build) and debug outputs, or run it with chunkkv.executors.tensorrt_llm.runner"
)


@dataclass(frozen=True)
class PagedGeometry:
    """What the executor must know of an engine: its attention layers, the shape of its cache, its limits.

    The pool is [blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_size]; index 0 of the third dimension are
    keys, index 1 values.

    Parameters
    ----------
    num_layers : int
        Attention layers.
    num_kv_heads : int
        KV heads of each.
    head_size : int
        Numbers of a head.
    tokens_per_block : int
        Slots of a block.
    kv_bytes : int
        Bytes of one cached number.
    vocab_size : int
        Logits of the model; the engine may pad them.
    max_batch_size : int
        Most rows of a step.
    max_seq_len : int
        Most tokens of a prompt and its answer.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    tokens_per_block: int
    kv_bytes: int
    vocab_size: int
    max_batch_size: int
    max_seq_len: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.kv_bytes

    @property
    def max_blocks_per_sequence(self) -> int:
        """Entries of a row of the block table."""
        return -(-self.max_seq_len // self.tokens_per_block)


@dataclass(frozen=True)
class StepRow:
    """One row of a step.

    Parameters
    ----------
    ids : numpy.ndarray
        The tokens it brings: a whole prompt, or one token.
    prompt_length : int
        Tokens of its prompt.
    position : int
        Logical position of the first id; 0 for a prompt.
    past : int
        Filled slots of its cache; 0 for a prompt.
    """

    ids: np.ndarray
    prompt_length: int
    position: int
    past: int


class StepInputs:
    """Makes the inputs that one engine asks for; raises EngineMismatchError for an engine that asks for others.

    Parameters
    ----------
    inputs, outputs : mapping of str to StepTensor
        What the engine declares.
    geometry : PagedGeometry
        Its layers, the shape of its cache and its limits.
    pool_address : int
        Where the pool begins.
    """

    def __init__(
        self,
        inputs: Mapping[str, StepTensor],
        outputs: Mapping[str, StepTensor],
        geometry: PagedGeometry,
        pool_address: int,
    ) -> None:
        self._inputs, self._geometry = inputs, geometry
        layers = np.arange(geometry.num_layers, dtype=np.int32)
        # 0.16 maps each layer to its pool, later releases to its pool and its place in that pool.
        by_pool = len(inputs[_MAPPING].shape) == 2 if _MAPPING in inputs else False
        self._fixed = {
            "host_kv_cache_pool_pointers": np.array([[pool_address, 0]], np.int64),
            _MAPPING: np.stack([0 * layers, layers], axis=1) if by_pool else 0 * layers,
            "host_max_attention_window_sizes": np.full(geometry.num_layers, geometry.max_seq_len, np.int32),
            "host_sink_token_length": np.zeros(1, np.int32),
            "host_runtime_perf_knobs": np.array(_PERF_KNOBS, np.int64),
            "host_context_progress": np.zeros(1, np.int64),
        }
        row = StepRow(np.zeros(1, np.int32), 1, 0, 0)
        known = {*self._named([row], np.zeros((1, 1, 2, 1), np.int32)), *self._fixed, _CACHE_INDIRECTION}
        if foreign := sorted(set(inputs) - known):
            raise EngineMismatchError(f"the engine has an input {foreign[0]!r}, which is not known here: {_ADVICE}")
        if set(outputs) != {LOGITS}:
            names = ", ".join(sorted(outputs)) or "none"
            raise EngineMismatchError(f"the engine's outputs are {names}; expected is {LOGITS} alone: {_ADVICE}")
        needed = ("input_ids", "host_request_types", "kv_cache_block_offsets", "host_kv_cache_block_offsets", _MAPPING)
        for name in needed:
            if name not in inputs:
                raise EngineMismatchError(
                    f"the engine has no input {name!r}: it was not built with packed input, the attention plugin and "
                    "a paged KV cache"
                )
        if inputs["kv_cache_block_offsets"].shape[0] not in (1, -1):
            raise EngineMismatchError(
                f"the engine has {inputs['kv_cache_block_offsets'].shape[0]} KV cache pools; one is supported: all "
                "layers must have the same number of KV heads"
            )

    def arrays(self, rows: Sequence[StepRow], offsets: np.ndarray) -> dict[str, np.ndarray]:
        """Return what the engine must be given beside zeros(); offsets [1,B,2,M] int32 are the rows' blocks."""
        known = {**self._named(rows, offsets), **self._fixed}
        return {
            name: np.ascontiguousarray(array, tensor.dtype)
            for name, tensor in self._inputs.items()
            if (array := known.get(name)) is not None
        }

    def zeros(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs that are all zero: beams of width 1 look nowhere else."""
        shape = (rows, 1, self._geometry.max_seq_len)
        return {name: shape for name in (_CACHE_INDIRECTION,) if name in self._inputs}

    def last_rows(self, logits: np.ndarray, rows: Sequence[StepRow]) -> np.ndarray:
        """Return the logits [B,vocab] float32 behind each row's last token."""
        if _LAST_TOKENS not in self._inputs:  # the engine gathers the logits of every token
            logits = logits[np.cumsum([len(row.ids) for row in rows]) - 1]
        return logits[:, : self._geometry.vocab_size].astype(np.float32)

    def _named(self, rows: Sequence[StepRow], offsets: np.ndarray) -> dict[str, np.ndarray]:
        counts = [len(row.ids) for row in rows]
        prompts = [row.prompt_length for row in rows]
        in_context = [row.position == 0 for row in rows]
        # ChunkKV's plugins tell a whole prompt from a part of one by past == context length.
        past = [row.prompt_length if context else row.past for row, context in zip(rows, in_context, strict=True)]
        return {
            "input_ids": np.concatenate([row.ids for row in rows]),
            "position_ids": np.concatenate([np.arange(row.position, row.position + len(row.ids)) for row in rows]),
            _LAST_TOKENS: np.cumsum(counts),
            "sequence_length": np.array([row.position + len(row.ids) for row in rows]),
            "context_lengths": np.array(prompts),
            "host_context_lengths": np.array(prompts),
            "host_request_types": np.where(in_context, _CONTEXT, _GENERATION),
            "host_past_key_value_lengths": np.array(past),
            "kv_cache_block_offsets": offsets,
            "host_kv_cache_block_offsets": offsets,
        }
