"""An engine directory on TensorRT: prefill compacts inside its engine, decode replays a CUDA graph.

Engines and weights are shared. Prefill runs under a lock on one context; each decoder has a context and a stream of its
own, so calls on several threads do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chunkkv.cache_layout import CacheLayout, Slots, shown_slots
from chunkkv.engine.tensorrt_build import TensorRTBuild
from chunkkv.engine.tensorrt_contract import decode_file
from chunkkv.errors import BackendUnavailableError, RequestError
from chunkkv.executors.interface import Capabilities, Executor
from chunkkv.executors.tensorrt.cache import DeviceKVCache
from chunkkv.executors.tensorrt.continuation import BlockContexts, TensorRTContinuer
from chunkkv.executors.tensorrt.decode import TensorRTDecoder
from chunkkv.executors.tensorrt.engines import TensorRTEngines, aligned
from chunkkv.executors.tensorrt.prefill import PrefillContext, TensorRTPrefiller


class TensorRTExecutor(Executor[DeviceKVCache]):
    """The engines of one directory on the current GPU.

    Raises BackendUnavailableError where TensorRT, GPU or plugins are missing, EngineMismatchError for engines of
    another TensorRT or GPU.

    Parameters
    ----------
    engine_dir : Path
        The engine directory.
    built_with : TensorRTBuild
        What its manifest says of the TensorRT that built it.
    """

    def __init__(self, engine_dir: Path, built_with: TensorRTBuild) -> None:
        self._engines = TensorRTEngines(engine_dir, built_with)
        self.contract = self._engines.contract
        self._prefill = PrefillContext(self._engines)
        self._blocks = BlockContexts(self._engines)
        self._decode = {capacity: self._engines.load(decode_file(capacity)) for capacity in self.contract.capacities}

    @property
    def capabilities(self) -> Capabilities:
        """What the engines of the directory can do."""
        return Capabilities(
            reports_choice=True,
            blockwise_prefill=False,
            block_scoring=False,
            layer_lengths=False,
            continues_rows=self.contract.block_tokens > 0,
            window_per_request=self.contract.window > 0,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes that is cached in all heads of all layers."""
        return 2 * self.contract.num_layers * self.contract.row_bytes(1)

    @property
    def cache_layout(self) -> CacheLayout:
        """Which heads of which layer hold equally many tokens."""
        return self.contract.layout

    def capacity_for(self, tokens: int | Sequence[int]) -> Slots:
        """Return the slots of the smallest cache that holds `tokens` tokens; raises RequestError beyond the largest."""
        needed = self.contract.layout.slots(tokens)
        for capacity in self.contract.capacities:
            if all(slots >= count for slots, count in zip(capacity, needed, strict=True)):
                return capacity
        raise RequestError(
            f"{shown_slots(needed)} tokens do not fit the largest cache of this engine, "
            f"{shown_slots(self.contract.capacities[-1])} slots: "
            "ask for fewer new tokens, or build with a larger --max_seq_len"
        )

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> DeviceKVCache:
        """Return a cache of undefined content: prefill writes every slot of a row, so that no old NaN is ever read."""
        contract, parts = self.contract, self.contract.layout.parts
        slots = contract.layout.slots(capacity)
        row_bytes = tuple(len(part.kv_heads) * contract.head_bytes(slots[part.length_class]) for part in parts)
        starts = np.cumsum([0, *(aligned(rows * size) for size in 2 * row_bytes)])
        buffer = self._engines.cuda.device_memory(int(starts[-1]))
        places = tuple(buffer.address + int(start) for start in starts[:-1])
        return DeviceKVCache(places[: len(parts)], places[len(parts) :], rows, slots, row_bytes, buffer)

    def prefiller(self) -> TensorRTPrefiller:
        """Return what prefills the prompts of one call, several at a time where the engine was built for it."""
        return TensorRTPrefiller(self._engines, self._prefill)

    def decoder(self, cache: DeviceKVCache) -> TensorRTDecoder:
        """Return what appends tokens to the rows of `cache`."""
        return TensorRTDecoder(self._engines, self._decode[cache.capacity], cache)

    def continuer(self) -> TensorRTContinuer:
        """Return what goes on with filled rows; raises BackendUnavailableError without block engines."""
        if not self.capabilities.continues_rows:
            raise BackendUnavailableError(
                "this engine directory has no block engines and cannot continue a context: build it again"
            )
        return TensorRTContinuer(self._engines, self._blocks)
