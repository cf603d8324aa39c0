"""The two graphs of an engine directory: one appends tokens to a cache, one compresses the cache of a prompt.

Below them: how a graph is loaded, and how NumPy arrays are bound to it by address. Graphs are shared and thread-safe;
every call binds its own caches, so calls on several threads do not meet.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from chunkkv.cache_layout import CacheLayout, deciding_parts, layout_of, leading_parts
from chunkkv.cache_scales import SCALES_KEY, CacheScales
from chunkkv.engine.directory import LONG_BLOCK, PRODUCTS_KEY, WHOLE_NUMBERS
from chunkkv.errors import EngineError, EngineMismatchError
from chunkkv.executors.file_pages import file_pages
from chunkkv.executors.host_cache import HostKVCache
from chunkkv.executors.huge_pages import on_huge_pages
from chunkkv.executors.interface import Choice
from chunkkv.executors.mappings import give_back_freed
from chunkkv.executors.onnxruntime.compaction import compact
from chunkkv.executors.onnxruntime.products import products_overflow
from chunkkv.settings import ChunkKVSettings

CPU = ["CPUExecutionProvider"]
# Of a run: at its end, the memory that its session worked in goes back to the system.
GIVING_BACK = ort.RunOptions()
GIVING_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
NEVER = ort.OrtValue.ortvalue_from_numpy(np.array(np.iinfo(np.int32).max, np.int32))  # no block is that long
EIGHT_BITS_SINCE = (1, 27)  # version of ONNX Runtime; earlier ones fail at the first token behind a prompt
CACHE_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
}


class OnnxRuntimeStep:
    """The step graph: runs a block of tokens against a cache and appends their keys and values to it.

    Shapes of the model are read from the graph. Raises EngineError for a file that is no step graph.

    Parameters
    ----------
    path : Path
        The graph's file.
    settings : ChunkKVSettings or None
        What the engine was built with. They say how many of a block's last queries the graph returns, and which heads
        its caches hold.
    threads : int
        Intra-op threads; 0 leaves the number to ONNX Runtime.
    """

    def __init__(self, path: Path, settings: ChunkKVSettings | None, threads: int) -> None:
        self.path, self.threads = path, threads
        with file_pages(path.parent) as self._weights, on_huge_pages():
            self.session = load_graph(path, threads)
        self._window = settings.window if settings else 0
        shapes = {value.name: value.shape for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        if not {"past_key.0", "logits"} <= set(shapes):
            raise EngineError(f"{path} is no step graph; build the engine again")
        self.head_dim, self.vocab_size = int(shapes["past_key.0"][3]), int(shapes["logits"][2])
        if "query.0" in shapes and "query_count" not in shapes:
            raise EngineError(f"{path} is of an earlier version, without the input query_count; build the engine again")
        heads = [int(shape[1]) for name, shape in shapes.items() if name.startswith("past_key.")]
        self.num_layers = sum(map(len, settings.layer_groups)) if settings else len(heads)
        self.num_kv_heads = sum(heads) // self.num_layers
        self.layout: CacheLayout = layout_of(settings, self.num_layers, self.num_kv_heads)
        if [len(part.kv_heads) for part in self.layout.parts] != heads:
            raise EngineMismatchError(
                f"{path} has caches of {heads} heads, which are not those that config.json says; build the engine again"
            )
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        self.cache_dtype = CACHE_DTYPES[kinds["past_key.0"]]
        self.scales = self._cache_scales(heads) if self.cache_dtype == np.int8 else None
        self.query_heads = {
            int(name.split(".")[1]): int(shape[1]) for name, shape in shapes.items() if name.startswith("query.")
        }

    @property
    def multiplies_whole_numbers(self) -> bool:
        """Whether weights and their inputs are rounded, as in w8a8."""
        return self.session.get_modelmeta().custom_metadata_map.get(PRODUCTS_KEY) == WHOLE_NUMBERS

    def _cache_scales(self, heads: list[int]) -> CacheScales:
        """Return what the graph's file says of its cache of 8 bits; raises EngineError where it says nothing."""
        text = self.session.get_modelmeta().custom_metadata_map.get(SCALES_KEY, "")
        try:
            return CacheScales.from_text(text, heads, self.head_dim)
        except ValueError as error:
            raise EngineError(f"{self.path} has no scales for its cache ({error}); build the engine again") from None

    def new_cache(self, rows: int, capacity: int | Sequence[int]) -> HostKVCache:
        """Return an empty cache; memory is touched only where tokens are written."""
        slots = self.layout.slots(capacity)
        shapes = [(rows, len(part.kv_heads), slots[part.length_class], self.head_dim) for part in self.layout.parts]
        sizes = [math.prod(shape) for shape in shapes]
        # One block of memory: NumPy asks for huge pages only for large ones.
        pieces = np.split(np.zeros(2 * sum(sizes), self.cache_dtype), np.cumsum(2 * sizes)[:-1])
        arrays = [piece.reshape(shape) for piece, shape in zip(pieces, 2 * shapes, strict=True)]
        return HostKVCache(tuple(arrays[: len(shapes)]), tuple(arrays[len(shapes) :]), self.layout, self.scales)

    def block_inputs(self, ids: np.ndarray, slot: int | Sequence[int], position: int) -> dict[str, np.ndarray]:
        """Return a graph's inputs for the tokens ids [S] of one row at slots from `slot` and positions from `position`.

        `slot` is one number for each length class, or one for all of them.
        """
        return {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64).reshape(1, -1),
            "position_ids": np.arange(position, position + len(ids), dtype=np.int64).reshape(1, -1),
            "cache_lengths": np.array(self.layout.slots(slot), np.int32).reshape(-1, 1),
        }

    def append_prompt_block(
        self, cache: HostKVCache, ids: np.ndarray, filled: int, is_last: bool = False
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Append the tokens ids [S] int64 of one row at slots and positions filled … filled+S-1; see append_block."""
        made = self.append_block(cache, ids, filled, filled, is_last=is_last)
        self._weights.release()  # the embeddings of this block
        if is_last:
            give_back_freed()
        return made

    def append_block(
        self,
        cache: HostKVCache,
        ids: np.ndarray,
        slot: int | Sequence[int],
        position: int,
        query_count: int | None = None,
        is_last: bool = False,
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Append the tokens ids [S] int64 of one row at slots from `slot` and positions from `position`.

        Returns the logits [vocab] after the last token and, for each part of the cache that scores, the block's last
        rotated queries [1,Hq,min(w,S),D]; `query_count` is w, by default that of the engine's window. After the last
        block of a prompt the memory that the graph worked in is given back: decode needs little of it.
        """
        options = GIVING_BACK if is_last else None
        logits, queries = self._append(cache, ids, slot, position, np.array([len(ids) - 1]), query_count, options)
        return logits[0], queries

    def append_scored_block(
        self, cache: HostKVCache, ids: np.ndarray, slot: int | Sequence[int], position: int
    ) -> np.ndarray:
        """Append the tokens ids [S] int64 of one row at slots from `slot` and positions from `position`.

        `slot` is one number for each length class, or one for all of them. Returns the logits [S,vocab] after each
        token.
        """
        return self._append(cache, ids, slot, position, np.arange(len(ids)))[0]

    def _append(
        self,
        cache: HostKVCache,
        ids: np.ndarray,
        slot: int | Sequence[int],
        position: int,
        logit_indices: np.ndarray,
        query_count: int | None = None,
        options: ort.RunOptions | None = None,
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Append a block of one row; return the logits [P,vocab] after its tokens at logit_indices [P], and queries."""
        size, observed = len(ids), query_count or self._window
        binding = bind_cache(self.session, cache)
        logits = np.empty((1, len(logit_indices), self.vocab_size), np.float32)
        inputs = self.block_inputs(ids, slot, position)
        inputs["logit_indices"] = np.ascontiguousarray(logit_indices, dtype=np.int64).reshape(1, -1)
        queries: dict[int, np.ndarray] = {
            leader: np.empty((1, heads, min(observed, size), self.head_dim), np.float32)
            for leader, heads in self.query_heads.items()
        }
        if queries:
            inputs["query_count"] = np.array([observed], np.int64)
        outputs = {"logits": logits, **{f"query.{leader}": array for leader, array in queries.items()}}
        bind_arrays(binding, inputs, outputs)
        self.session.run_with_iobinding(binding, options)
        return logits[0], queries


class OnnxRuntimeCompress:
    """The compress graph: chooses the tokens of one row that stay. They are copied to another cache outside of it.

    Raises EngineError for a file that does not load, EngineMismatchError for a graph built with other settings.

    Parameters
    ----------
    path : Path
        The graph's file.
    settings : ChunkKVSettings
        The settings that the graph must agree with: those in the engine's config.json, or what they become where scores
        are given.
    threads : int
        Intra-op threads; 0 leaves the number to ONNX Runtime.
    """

    def __init__(self, path: Path, settings: ChunkKVSettings, threads: int) -> None:
        self.session = load_graph(path, threads)
        built_with = json.loads(self.session.get_modelmeta().custom_metadata_map.get("chunkkv.settings", "{}"))
        for name, value in settings.to_dict().items():
            if built_with.get(name) != value:
                raise EngineMismatchError(
                    f"{path.parent}: config.json says {name} is {value!r}, {path.name} was built with "
                    f"{built_with.get(name)!r}; build the engine again"
                )
        self._input_names = {value.name for value in self.session.get_inputs()}
        outputs = [value.name.split(".") for value in self.session.get_outputs()]
        self._chosen = [int(part[0]) for name, *part in outputs if name == "kept_indices"]
        self._scored = [int(part[0]) for name, *part in outputs if name == "token_scores"]
        self._settings = settings

    @property
    def takes_scores(self) -> bool:
        """Whether scores come from outside."""
        return self._settings.score == "given"

    def run(
        self,
        full: HostKVCache,
        queries: Mapping[int, np.ndarray],
        ids: np.ndarray,
        keep_per_10k: int,
        budget_tokens: int,
        out: HostKVCache,
        window: int = 0,
        is_spent: bool = False,
    ) -> Choice:
        """Choose what one row keeps and copy it to the first slots of `out`; see BlockwisePrefiller.compress.

        `full` may have slots behind the prompt; `is_spent` as compact takes it. Where scores are given, `queries` are
        per part the scores of all slots of `full`, [1,C] float32 or [1,H,C].
        """
        binding, observed = self.session.io_binding(), "scores" if self.takes_scores else "query"
        padded = np.zeros((1, full.keys[0].shape[2]), np.int64)
        padded[0, : len(ids)] = ids
        inputs: dict[str, np.ndarray] = {
            "lengths": np.array([len(ids)], np.int32),
            "keep_per_10k": np.array([keep_per_10k], np.int32),
            "budget_tokens": np.array([budget_tokens], np.int32),
            "window": np.array([window or self._settings.window], np.int32),
            "capacity": np.zeros(len(out.capacity), np.int64),  # the graph copies no slot
            "input_ids": padded,
            **{f"{observed}.{part}": array for part, array in queries.items()},
        }
        for part in range(len(full.keys)):
            inputs[f"key.{part}"], inputs[f"value.{part}"] = full.keys[part], full.values[part]
        # ids are an input only where delimiters cut chunks; a graph takes no array that it does not declare
        bind_arrays(binding, {name: array for name, array in inputs.items() if name in self._input_names}, {})
        names = [*(f"kept_indices.{part}" for part in self._chosen), *(f"token_scores.{part}" for part in self._scored)]
        names.append("kept_lengths")
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        lengths, classes = results["kept_lengths"].numpy()[:, 0].tolist(), [p.length_class for p in full.layout.parts]
        # Where layers keep unequal numbers, each is padded to the longest.
        chosen = {p: results[f"kept_indices.{p}"].numpy()[0][..., : lengths[classes[p]]] for p in self._chosen}
        kept = {part: self._choice_of(part, chosen, full.layout) for part in leading_parts(self._settings, full.layout)}
        compact(full, kept, deciding_parts(self._settings, full.layout), out, is_spent)
        scores = {part: results[f"token_scores.{part}"].numpy()[0][..., : len(ids)] for part in self._scored}
        return Choice(kept, scores, tuple(lengths))

    def _choice_of(self, part: int, kept: Mapping[int, np.ndarray], layout: CacheLayout) -> np.ndarray:
        """Return what a leading part keeps; those without scores keep what the first of them does."""
        if part in kept:
            return kept[part]
        head_class = layout.parts[part].head_class
        return next(kept[other] for other in kept if layout.parts[other].head_class == head_class)


def check_eight_bit_cache(engine_dir: Path) -> None:
    """Raise EngineMismatchError where the installed ONNX Runtime cannot attend to a cache of 8 bits on a CPU."""
    installed = tuple(int(number) for number in re.findall(r"\d+", ort.__version__)[:2])
    if installed < EIGHT_BITS_SINCE:
        raise EngineMismatchError(
            f"{engine_dir} holds its KV cache in int8, which onnxruntime {ort.__version__} cannot read: install "
            f"{'.'.join(map(str, EIGHT_BITS_SINCE))} or later, or build with --kv_cache_dtype float32"
        )


def session_options(threads: int, repacks: bool = True) -> ort.SessionOptions:
    """Return the options of a graph; `threads` are intra-op threads, 0 leaves the number to ONNX Runtime.

    Without `repacks` weights are read as the file has them: products of many rows are a little slower, and no copy of
    the weights is made.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if products_overflow():  # it stores weights unsigned, for which there is no fast kernel
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_initializer(LONG_BLOCK, NEVER)  # attention multiplies two inputs, which stay as they are
    if not repacks:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_mem_pattern = False  # a plan per prompt length would be made, kept, and hardly met again
    return options


def load_graph(path: Path, threads: int, repacks: bool = True) -> ort.InferenceSession:
    """Return the graph in `path`, ready to run on the CPU; raises EngineError for one that does not load.

    `threads` and `repacks` are those of session_options.
    """
    try:
        return ort.InferenceSession(str(path), session_options(threads, repacks), providers=CPU)
    except Exception as error:  # ONNX Runtime's own classes share no base but this one
        raise EngineError(
            f"{path} does not load in ONNX Runtime {ort.__version__} ({str(error).splitlines()[0]}); "
            "build the engine again"
        ) from None


def bind_arrays(binding: ort.IOBinding, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Bind arrays by address; the caller keeps them alive until the run is over."""
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_cache(session: ort.InferenceSession, cache: HostKVCache) -> ort.IOBinding:
    """Return a binding with past and present on the same memory, so that the graph writes the cache in place.

    A graph may have some of the cache's parts only.
    """
    binding, names = session.io_binding(), {value.name for value in session.get_inputs()}
    for kind, arrays in (("key", cache.keys), ("value", cache.values)):
        for part, array in enumerate(arrays):
            if f"past_{kind}.{part}" in names:
                bind_arrays(binding, {f"past_{kind}.{part}": array}, {f"present_{kind}.{part}": array})
    return binding
