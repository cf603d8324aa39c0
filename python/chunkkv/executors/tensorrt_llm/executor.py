"""A TensorRT-LLM engine with ChunkKV on one GPU, over a pool of KV blocks of its own.

Prompts are prefilled one at a time (staged): the engine compacts a prompt's cache within the step, the blocks behind
N(L) go back to the pool at once, and the next prompt may take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chunkkv.cache_layout import CacheLayout, Slots, uniform_layout
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.tensorrt_llm_side_file import SideFile, engine_file
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.executors.interface import Capabilities, Executor
from chunkkv.executors.tensorrt_llm.cache import PagedKVCache
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager
from chunkkv.executors.tensorrt_llm.paged_inputs import PagedGeometry
from chunkkv.executors.tensorrt_llm.step_engine import StepEngine
from chunkkv.executors.tensorrt_llm.steps import PagedDecoder, PagedPrefiller, PagedSteps
from chunkkv.settings import ChunkKVSettings

POOL_SETTING = "max_tokens_in_paged_kv_cache"
_FREE_MEMORY_SHARE = 0.9  # as TensorRT-LLM's kv_cache_free_gpu_mem_fraction


class TensorRTLLMExecutor(Executor[PagedKVCache]):
    """One engine with its pool; thread-safe. Raises RequestError for a pool that is too small or does not fit.

    Parameters
    ----------
    engine : StepEngine
        The loaded engine.
    geometry : PagedGeometry
        Its layers, the shape of its cache and its limits.
    settings : ChunkKVSettings or None
        What the engine was built with; None for an engine without ChunkKV.
    pool_tokens : int or None, default None
        Tokens that the pool holds. None takes 90 % of the free memory, at most what max_batch_size sequences of
        max_seq_len need.
    """

    def __init__(
        self,
        engine: StepEngine,
        geometry: PagedGeometry,
        settings: ChunkKVSettings | None,
        pool_tokens: int | None = None,
    ) -> None:
        self.engine, self.geometry, self.settings = engine, geometry, settings
        self.blocks = BlockManager(_pool_blocks(engine, geometry, pool_tokens), geometry.tokens_per_block)
        self._pool_bytes = self.blocks.num_blocks * geometry.tokens_per_block * geometry.bytes_per_token
        self._pool = engine.allocate(self._pool_bytes)  # the engine's inputs point into it
        self._steps = PagedSteps(engine, geometry, self.blocks, self._pool.address)

    @property
    def capabilities(self) -> Capabilities:
        """What this executor can do: nothing beyond prefill and decode; all caches share one pool."""
        return Capabilities(
            reports_choice=False,
            blockwise_prefill=False,
            block_scoring=False,
            layer_lengths=False,
            pool_bytes=self._pool_bytes,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes that is cached in all heads of all layers."""
        return self.geometry.bytes_per_token

    @property
    def cache_layout(self) -> CacheLayout:
        """One part for each layer: all heads keep equally many tokens."""
        return uniform_layout(self.geometry.num_layers, self.geometry.num_kv_heads)

    def capacity_for(self, tokens: int | Sequence[int]) -> Slots:
        """Return the slots of the blocks that `tokens` tokens need."""
        (count,) = self.cache_layout.slots(tokens)
        return (self.blocks.blocks_for(count) * self.geometry.tokens_per_block,)

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> PagedKVCache:
        """Reserve blocks for `rows` rows of `capacity` slots; raises CacheFullError where the pool has not as many."""
        slots = self.cache_layout.slots(capacity)
        return PagedKVCache(self.blocks, self.blocks.add(slots[0], rows), slots)

    def prefiller(self) -> PagedPrefiller:
        """Return what prefills the prompts of one call."""
        return PagedPrefiller(self._steps, self.settings)

    def decoder(self, cache: PagedKVCache) -> PagedDecoder:
        """Return what appends tokens to the rows of `cache`."""
        return PagedDecoder(self._steps, cache)


def load_tensorrt_llm(files: EngineFiles, pool_tokens: int | None) -> TensorRTLLMExecutor:
    """Return the executor of a checked engine directory.

    Raises EngineMismatchError for an engine of several ranks, BackendUnavailableError where TensorRT-LLM, a GPU or the
    plugins are missing.
    """
    side = SideFile.read(files.path)
    if side.tp_size * side.pp_size > 1:
        ranks = side.tp_size * side.pp_size
        raise EngineMismatchError(
            f"{files.path} has {ranks} ranks (tp_size {side.tp_size}, pp_size {side.pp_size}); ChunkKVSession drives "
            f"one: run it with mpirun -n {ranks} and chunkkv.executors.tensorrt_llm.runner, or with TensorRT-LLM's "
            "C++ runtime"
        )
    from chunkkv.executors.tensorrt_llm.engine import TensorRTLLMStepEngine

    engine = TensorRTLLMStepEngine(Path(files.path) / engine_file(0), files.versions)
    return TensorRTLLMExecutor(engine, paged_geometry(files, side), files.settings, pool_tokens)


def paged_geometry(files: EngineFiles, side: SideFile) -> PagedGeometry:
    """Return what an executor must know of the engine in a checked directory."""
    return PagedGeometry(
        num_layers=side.ranks[0].num_layers,
        num_kv_heads=side.num_kv_heads,
        head_size=side.head_size,
        tokens_per_block=side.tokens_per_block,
        kv_bytes=side.kv_bytes,
        vocab_size=files.model["vocab_size"],
        max_batch_size=files.build["max_batch_size"],
        max_seq_len=files.build["max_seq_len"],
    )


def _pool_blocks(engine: StepEngine, geometry: PagedGeometry, pool_tokens: int | None) -> int:
    """Return how many blocks the pool gets."""
    block_bytes = geometry.tokens_per_block * geometry.bytes_per_token
    room = engine.free_memory() // block_bytes
    if pool_tokens is None:
        useful = geometry.max_batch_size * geometry.max_blocks_per_sequence
        blocks, source = min(useful, int(room * _FREE_MEMORY_SHARE)), "the free memory"
    else:
        blocks, source = -(-pool_tokens // geometry.tokens_per_block), f"{POOL_SETTING} {pool_tokens}"
    if not 1 <= blocks <= room:
        raise RequestError(
            f"{source} gives a pool of {blocks} KV blocks of {block_bytes} bytes; there is room for {room}: "
            f"give {POOL_SETTING} from 1 to {room * geometry.tokens_per_block}, or free memory"
        )
    return blocks
