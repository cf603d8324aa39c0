"""The ONNX graphs of the TensorRT engines, the shapes they are built for, and the contract they are run by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx

from chunkkv.cache_layout import Slots
from chunkkv.engine.tensorrt_contract import Contract
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.onnx_graph.emitter import InputWeightsEmitter
from chunkkv_builder.onnx_graph.prefill import PrefillGraph, takes_window
from chunkkv_builder.onnx_graph.transformer import StepGraph, capacity_name
from chunkkv_builder.onnx_graph.weights import WeightLocation, WeightSource
from chunkkv_builder.plan import GraphPlan

# A cache has a static capacity, and decode time grows with it, used or not: an answer runs on the smallest that fits.
RUNGS = 4
SMALLEST_CAPACITY = 128
BEST_LENGTH = 4096  # kernels are timed at this prompt length, or at the longest: they serve longer prompts as well
_NO_BOUND = {"max_kept": 0}  # how many tokens are kept depends on values, which TensorRT does not know while it builds
LARGEST_TENSOR = 2**31 - 1  # numbers of one row: TensorRT counts them in 32 bits
LARGEST_BLOCK = 256  # tokens that are appended to a row at once; a question is rarely longer
CAPACITY_STEP = 64  # keeps every row of a cache on the address grid that TensorRT wants


@dataclass(frozen=True)
class ShapeProfile:
    """One optimisation profile of TensorRT.

    Parameters
    ----------
    shapes : dict
        Per input tensor its smallest, best and largest shape; -1 stands for the size that the graph itself has there.
    values : dict
        Per host input that holds a shape its smallest, best and largest values.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    values: dict[str, tuple[Slots, Slots, Slots]]


class Graphs:
    """The graphs of one build; weight matrices are inputs of them, vectors are constants inside.

    `capacities` are the cache sizes to build decode engines for; `prefill_rows` prompts are prefilled at once.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: GraphPlan, build: BuildConfig, locations: dict[str, WeightLocation]
    ) -> None:
        self._plan, self._build, self._matrices = plan, build, locations
        self._load = partial(checkpoint.converted, dtype=build.dtype)
        vectors = (name for name in checkpoint.names() if name not in locations)
        inside = {name: WeightLocation(name, "", 0, tuple(checkpoint.shape(name)), build.dtype) for name in vectors}
        self._weights = {**locations, **inside}
        self.capacities = cache_sizes(plan, build)
        self.prefill_rows = max(1, min(build.max_batch_size, build.max_num_tokens // build.max_input_len))

    def prefill(self, sorting: bool) -> onnx.ModelProto:
        """Return the one-shot prefill graph, ChunkKV nodes inside.

        Parameters
        ----------
        sorting : bool
            False for a graph whose ChunkKV nodes TensorRT takes as functions, True where it has the plugins.
        """
        emitter = InputWeightsEmitter(self._load)
        return PrefillGraph(self._plan, self._weights, self._build.dtype, emitter, sorting).build()

    @property
    def block_tokens(self) -> int:
        """Tokens that are appended to a row at once."""
        return min(LARGEST_BLOCK, *(min(capacity) for capacity in self.capacities))

    def decode(self, capacity: Slots) -> onnx.ModelProto:
        """Return the graph of one decode step over caches of `capacity` slots, one number for each length class."""
        return self._step(capacity, {"block": 1})

    def block(self, capacity: Slots) -> onnx.ModelProto:
        """Return the graph that appends a block of tokens to one row of a cache of `capacity` slots."""
        return self._step(capacity, {"batch": 1})

    def _step(self, capacity: Slots, sizes: dict[str, int]) -> onnx.ModelProto:
        emitter = InputWeightsEmitter(self._load)
        graph = StepGraph(self._plan, self._weights, self._build.dtype, emitter, window_queries=False).build()
        slots = {capacity_name(number, len(capacity)): count for number, count in enumerate(capacity)}
        return with_fixed_dims(graph, {**sizes, "logit_count": 1, **slots})

    def prefill_profile(self) -> ShapeProfile:
        """Return the prefill profile: 1 to prefill_rows prompts of 1 to max_input_len tokens, any cache capacity."""
        rows, longest = self.prefill_rows, self._build.max_input_len
        row_inputs = ["lengths"] + (["keep_per_10k", "budget_tokens"] if self._plan.settings else [])
        row_inputs += ["window"] if takes_window(self._plan) else []
        shapes = {name: ((1,), (rows,), (rows,)) for name in row_inputs}
        kept = self._plan.settings.class_lengths(longest) if self._plan.settings else (longest,)
        usual = next(capacity for capacity in self.capacities if fits(kept, capacity))
        least, most = (tuple(map(limit, zip(*self.capacities, strict=True))) for limit in (min, max))
        values = {"capacity": (least, usual, most)}
        ids = ((1, 1), (rows, min(longest, BEST_LENGTH)), (rows, longest))
        return ShapeProfile({"input_ids": ids, **shapes}, values)

    def decode_profile(self) -> ShapeProfile:
        """Return the decode profile: 1 to max_batch_size rows of one token."""
        most, plan = self._build.max_batch_size, self._plan
        columns = {name: ((1, 1), (most, 1), (most, 1)) for name in ("input_ids", "position_ids", "logit_indices")}
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
        classes = plan.layout.length_classes
        shapes = {**columns, "cache_lengths": ((classes, 1), (classes, most), (classes, most))}
        for part in plan.parts:
            tail = (len(part.kv_heads), -1, plan.model.head_dim)  # the capacity is the graph's own
            for kind in ("key", "value"):
                shapes[f"past_{kind}.{part.number}"] = ((1, *tail), (most, *tail), (most, *tail))
        return ShapeProfile(shapes, {})

    def block_profile(self) -> ShapeProfile:
        """Return the profile of a block: one row of 1 to block_tokens tokens."""
        most, plan = self.block_tokens, self._plan
        ids = ((1, 1), (1, most), (1, most))
        fixed: dict[str, tuple[int, ...]] = {"logit_indices": (1, 1), "cache_lengths": (plan.layout.length_classes, 1)}
        for part in plan.parts:
            for kind in ("key", "value"):
                fixed[f"past_{kind}.{part.number}"] = (1, len(part.kv_heads), -1, plan.model.head_dim)
        shapes = {name: (shape, shape, shape) for name, shape in fixed.items()}
        return ShapeProfile({"input_ids": ids, "position_ids": ids, **shapes}, {})

    def contract(self) -> Contract:
        """Return what the runtime must know of these engines."""
        model, settings = self._plan.model, self._plan.settings
        return Contract(
            dtype=self._build.dtype,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            max_input_len=self._build.max_input_len,
            prefill_rows=self.prefill_rows,
            group_layers=_layers_alive(settings),
            layout=self._plan.layout,
            leaders=tuple(part.number for part in self._plan.parts if settings is not None and part.leads),
            scored=tuple(part.number for part in self._plan.parts if part.scores),
            heads_choose=settings is not None and settings.heads == "each",
            capacities=self.capacities,
            weights={place.name: (place.offset, place.nbytes) for place in self._matrices.values()},
            block_tokens=self.block_tokens,
            window=settings.window if settings is not None and takes_window(self._plan) else 0,
        )


def _layers_alive(settings: ChunkKVSettings | None) -> int:
    """Return how many layers' full keys and values are alive at once: those of a group up to its leader."""
    if settings is None:
        return 1
    return max(group.index(settings.leader_of(group)) + 1 for group in settings.layer_groups)


def cache_sizes(plan: GraphPlan, build: BuildConfig) -> tuple[Slots, ...]:
    """Return the slots of each length class to build decode engines for, by the size of the cache.

    With two classes the local heads get at each size what they need beside the reading heads of a prompt at the default
    budget, and the last size is the largest in both, so that every request has a cache.
    """
    sizes = decode_capacities(build.max_seq_len)
    if plan.settings is None or plan.layout.length_classes == 1:
        return tuple((size,) for size in sizes)
    pairs = {(size, _beside(plan.settings, size, build.max_input_len, sizes)) for size in sizes}
    pairs.add((sizes[-1], sizes[-1]))
    reading, local = plan.layout.heads
    return tuple(sorted(pairs, key=lambda pair: (reading * pair[0] + local * pair[1], pair)))


def _beside(settings: ChunkKVSettings, size: int, longest: int, sizes: tuple[int, ...]) -> int:
    """Return the slots of the local heads for a cache whose reading heads have `size`, with room for new tokens."""
    room = min(SMALLEST_CAPACITY, size // 2)
    shortest = 1  # bisect for the longest prompt of which `size` slots hold the reading heads
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if settings.class_lengths(middle)[0] + room <= size:
            shortest = middle
        else:
            longest = middle - 1
    reading, local = settings.class_lengths(shortest)
    needed = local + max(size - reading, room)
    return min(-(-needed // CAPACITY_STEP) * CAPACITY_STEP, sizes[-1])


def fits(needed: Slots, capacity: Slots) -> bool:
    """Return whether a cache of `capacity` slots holds `needed` ones in every length class."""
    return all(count <= slots for count, slots in zip(needed, capacity, strict=True))


def decode_capacities(max_seq_len: int) -> tuple[int, ...]:
    """Return the cache sizes to build decode engines for, ascending: enough for max_seq_len, then halves of it."""
    sizes = (max(-(-max_seq_len // 2**rung), SMALLEST_CAPACITY if rung else 1) for rung in range(RUNGS))
    grid = {-(-size // CAPACITY_STEP) * CAPACITY_STEP for size in sizes}
    largest = -(-max_seq_len // CAPACITY_STEP) * CAPACITY_STEP
    return tuple(sorted(size for size in grid if size <= largest))


def largest_capacity(slot_numbers: int) -> int:
    """Return the most slots that a decode engine's cache may have where a slot holds `slot_numbers` numbers."""
    return LARGEST_TENSOR // slot_numbers // CAPACITY_STEP * CAPACITY_STEP


def weight_sources(checkpoint: Checkpoint, dtype: str) -> list[WeightSource]:
    """Return every matrix of the checkpoint in `dtype`, in layer order."""
    return [
        WeightSource(name, tuple(checkpoint.shape(name)), dtype, partial(checkpoint.converted, name, dtype))
        for name in checkpoint.names()
        if len(checkpoint.shape(name)) > 1
    ]


def with_fixed_dims(model: onnx.ModelProto, sizes: dict[str, int]) -> onnx.ModelProto:
    """Give the named dimensions of the graph's inputs and outputs a size, in place; return the model."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return model


def for_parser(model: onnx.ModelProto) -> bytes:
    """Return the bytes that TensorRT's parser gets.

    Attention may fall back to several kernels, as in float32. Nodes that choose for a class of heads get the name of
    their plugin, and select plugins every field that they have: the parser warns of one that is left to its default.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
        if functions.is_select(node.op_type) and node.attribute:
            node.op_type = functions.SELECT
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in _NO_BOUND.items())
    return copy.SerializeToString()
