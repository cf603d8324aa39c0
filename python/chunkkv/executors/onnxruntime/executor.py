"""An engine directory on ONNX Runtime: its graphs on the CPU, over caches in host memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from chunkkv.cache_layout import CacheLayout, Slots
from chunkkv.engine.directory import COMPRESS_FILE, STEP_FILE
from chunkkv.errors import EngineMismatchError
from chunkkv.executors.elastic_cache import ElasticHostKVCache, elastic_cache
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.inside import HeadScorer
from chunkkv.executors.interface import Capabilities, Executor
from chunkkv.executors.onnxruntime.continuation import OnnxRuntimeContinuer
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.executors.onnxruntime.graphs import OnnxRuntimeCompress, OnnxRuntimeStep
from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefiller
from chunkkv.executors.onnxruntime.prompt_blocks import prompt_blocks_of
from chunkkv.executors.onnxruntime.rereading import OnnxRuntimeReread
from chunkkv.settings import ChunkKVSettings


class OnnxRuntimeExecutor(Executor[HostKVCache]):
    """The graphs of one engine directory, ready to run.

    Raises EngineError for graphs that do not load, EngineMismatchError for graphs built with other settings.

    Parameters
    ----------
    engine_dir : Path
        The engine directory.
    block : int
        The largest prefill block, in tokens.
    settings : ChunkKVSettings or None, default None
        What the engine was built with; None for an engine without ChunkKV.
    threads : int or None, default None
        Intra-op threads; None leaves the number to ONNX Runtime.
    """

    capabilities = Capabilities(
        reports_choice=True,
        blockwise_prefill=True,
        block_scoring=True,
        layer_lengths=True,
        continues_rows=True,
        window_per_request=True,
        compresses_turns=True,
        elastic_rows=os.name == "posix",
        rereads=True,
        head_lengths=True,
    )

    def __init__(
        self, engine_dir: Path, block: int, settings: ChunkKVSettings | None = None, threads: int | None = None
    ) -> None:
        self._engine_dir, self._settings, self._block = engine_dir, settings, block
        self._window = settings.window if settings else 0
        self.step = OnnxRuntimeStep(engine_dir / STEP_FILE, settings, threads or 0)
        self.compress = OnnxRuntimeCompress(engine_dir / COMPRESS_FILE, settings, threads or 0) if settings else None
        self._prompt_blocks = prompt_blocks_of(engine_dir, self.step)
        self._reread: OnnxRuntimeReread | None = None
        self._layer_lengths_graph: ort.InferenceSession | None = None
        self._lock = threading.Lock()
        if self.step.scales is not None:  # attention by head is derived from that of a layer, without its scales
            self.capabilities = replace(self.capabilities, head_lengths=False)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes that is cached in all heads of all layers."""
        return 2 * sum(self.step.layout.heads) * self.step.head_dim * self.step.cache_dtype.itemsize

    @property
    def cache_layout(self) -> CacheLayout:
        """Which heads of which layer hold equally many tokens."""
        return self.step.layout

    def capacity_for(self, tokens: int | Sequence[int]) -> Slots:
        """Return the slots that a cache for `tokens` tokens has: as many."""
        return self.step.layout.slots(tokens)

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> HostKVCache:
        """Return an empty cache; memory is touched only where tokens are written."""
        return self.step.new_cache(rows, capacity)

    def new_elastic_cache(self, rows: int, capacity: int | Sequence[int]) -> ElasticHostKVCache:
        """Return an empty cache whose rows take memory only for the tokens in them."""
        return elastic_cache(self.step.new_cache(1, 1), rows, self.cache_layout.slots(capacity))

    def prefiller(self) -> OnnxRuntimePrefiller:
        """Return what prefills the prompts of one call, block by block."""
        window = self._window or 1
        return OnnxRuntimePrefiller(self.step, self.compress, self._block, window, self.reread, self._prompt_blocks)

    def reread(self) -> OnnxRuntimeReread:
        """Return what scores prompts by reading them again; raises EngineMismatchError for engines without ChunkKV."""
        if self._settings is None:
            raise EngineMismatchError("this engine was built without ChunkKV and scores nothing: build with --chunkkv")
        with self._lock:  # most sessions never need these graphs
            if self._reread is None:
                self._reread = OnnxRuntimeReread(self._engine_dir, self.step, self._settings, self._block)
        return self._reread

    def blockwise_prefiller(self) -> OnnxRuntimePrefiller:
        """Return prefill and compression as two calls."""
        return self.prefiller()

    def continuer(self) -> OnnxRuntimeContinuer:
        """Return what goes on with filled rows."""
        return OnnxRuntimeContinuer(self.step, self.prefiller(), self._block)

    def decoder(self, cache: HostKVCache) -> OnnxRuntimeDecoder:
        """Return what appends tokens to the rows of `cache`."""
        return OnnxRuntimeDecoder(self.step, cache)

    def score_block(self, cache: HostKVCache, ids: np.ndarray, slot: int | Sequence[int], position: int) -> np.ndarray:
        """Append a block of tokens to a cache of one row and return the logits after each; see Executor."""
        return self.step.append_scored_block(cache, ids, slot, position)

    def head_scorer(self) -> HeadScorer:
        """Return what scores blocks behind kept tokens of any number per head; for evaluation. It is made anew."""
        if not self.capabilities.head_lengths:
            return super().head_scorer()
        from chunkkv.executors.onnxruntime.head_lengths import HeadLengthsScorer  # with onnx, as below

        return HeadLengthsScorer(self.step)

    def layer_lengths_decoder(self, cache: HostKVCache) -> OnnxRuntimeDecoder:
        """Return a decoder for a cache whose layers are filled to different lengths; for evaluation.

        An engine that ranks all layers together takes a length per layer itself. For others a graph is derived.
        """
        if self.step.layout.length_classes == len(self.step.layout.parts):
            return OnnxRuntimeDecoder(self.step, cache)
        from chunkkv.executors.onnxruntime.layer_lengths import LayerLengthsDecoder, load_layer_lengths_graph

        with self._lock:  # only evaluation needs this graph, so it is loaded when first asked for
            if self._layer_lengths_graph is None:
                self._layer_lengths_graph = load_layer_lengths_graph(self.step.path, self.step.threads)
        return LayerLengthsDecoder(self.step, cache, self._layer_lengths_graph)
