"""Predicted microseconds of every op on an H200, from bytes, issue slots and launches, to be compared with a GPU's.

    python -m benchmarks.gpu.model          the table for Llama-3-8B, beside the time that the bytes alone take

Slots come from the committed table of the machine code (tests/native/machine_code.json), rates from data sheets and
from the review of an H200; no number here was measured on a GPU. A pass of score takes as long as the slowest of what
it needs, all of which overlap: memory, issue slots, tensor cores, and the units that compute 2^x.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "tests" / "native" / "machine_code.json"

MULTIPROCESSORS, SCHEDULERS, CLOCK_GHZ = 132, 4, 1.755
MEMORY_GB_PER_S, CACHE_GB_PER_S = 4300.0, 5500.0
CACHE_BYTES = 40e6  # what is left of K in the second-level cache when the second pass begins
TENSOR_CLOCKS = 6.2  # of one m16n8k16 of a scheduler, by mma.sync
EXPONENTIAL_CLOCKS = 8.0  # of one ex2 of a warp
BLOCK_BYTES, IN_FLIGHT_BYTES = 32e3, 3e6  # what a block of compact waits for at a time, and what fills the memory
ISSUE_SHARE = 0.75  # of the slots that three warps of a scheduler fill
LAUNCH, NEXT_LAUNCH, FILL = 2.5, 1.0, 1.5  # microseconds: a launch, one ahead of the end of the one before, a pipeline
EAGER_HOST, EAGER_DEVICE, HOST_WAIT = 6.0, 2.0, 20.0  # of an op of torch on the host and the device, and of one .item()


@dataclass(frozen=True)
class Layer:
    """One layer's caches and its call of score: the sizes that decide.

    Parameters
    ----------
    batch, length : int
        Rows and their tokens.
    heads, kv_heads, head_dim : int
        Hq, Hkv and D.
    window : int
        w of all rows.
    chunk : float
        Mean tokens of a chunk.
    keep_per_10k : int
        The keep ratio.
    key : {"bfloat16", "fp8", "int8"}
        How keys are stored.
    """

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 16
    chunk: float = 10.0
    keep_per_10k: int = 1000
    key: str = "bfloat16"

    @property
    def key_bytes(self) -> float:
        """Bytes of K of all rows and heads."""
        return float(self.batch * self.length * self.kv_heads * self.head_dim * (2 if self.key == "bfloat16" else 1))

    @property
    def score_bytes(self) -> float:
        """Bytes that score moves: K twice, and the scores of tokens of every 32 query rows, written and read."""
        groups = self.kv_heads * math.ceil(self.heads // self.kv_heads * self.window / 32)
        return 2 * self.key_bytes + 8.0 * self.batch * self.length * groups

    @property
    def compact_bytes(self) -> float:
        """Bytes of the kept rows of K and of V, read and written."""
        return 4 * self.key_bytes * self.keep_per_10k / 1e4

    @property
    def floor(self) -> float:
        """Microseconds in which K can be read once."""
        return self.key_bytes / MEMORY_GB_PER_S / 1e3


def slots() -> dict[str, dict[str, int]]:
    """Return the rows of the machine code's table for sm_90a."""
    kernels = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    return {name: places["sm_90a"] for name, places in kernels.items()}


def score_pass(layer: Layer, which: str) -> float:
    """Return the microseconds of one pass over K, without its launch."""
    name = {"bfloat16": "nv_bfloat16", "fp8": "Fp8", "int8": "Int8"}[layer.key]
    rows = layer.heads // layer.kv_heads * layer.window
    groups = 1 if rows <= 64 else 2  # of 32 keys that a warp takes of a tile
    row_warps = 2 * groups
    case = ", 128 query rows" if groups == 2 else ""
    issued = slots()[f"score {which} nv_bfloat16 x {name} D 128{case}"]["slots"] / groups
    turns = layer.batch * layer.kv_heads * math.ceil(rows / (32 * row_warps)) * row_warps * layer.length / 32
    share = layer.head_dim / 128  # products and copies shrink with the head size, exponentials do not
    of_clock = turns / (MULTIPROCESSORS * SCHEDULERS * CLOCK_GHZ * 1e3)  # microseconds per clock of a turn
    issue = of_clock * (issued - 128 * (1 - share)) / ISSUE_SHARE
    tensor = of_clock * 64 * share * TENSOR_CLOCKS
    exponentials = of_clock * 32 * EXPONENTIAL_CLOCKS
    cached = min(CACHE_BYTES, layer.key_bytes) if which == "columns" else 0.0
    memory = (layer.key_bytes - cached) / MEMORY_GB_PER_S / 1e3 + cached / CACHE_GB_PER_S / 1e3
    return max(memory, issue, tensor, exponentials) / 0.9 + FILL


def score(layer: Layer) -> dict[str, float]:
    """Return the microseconds of score and of each of its kernels, launches included."""
    rows = layer.heads // layer.kv_heads * layer.window
    groups = layer.kv_heads * math.ceil(rows / 32)
    parts = min(math.ceil(1024 / layer.kv_heads), math.ceil(layer.length / 64)) * (2 if rows <= 64 else 1)
    kernels = {
        "statistics": LAUNCH + score_pass(layer, "statistics"),
        "row statistics": NEXT_LAUNCH + 1.5 + layer.batch * layer.kv_heads * parts * rows * 8 / CACHE_GB_PER_S / 1e3,
        "columns": NEXT_LAUNCH + score_pass(layer, "columns"),
        "finish": NEXT_LAUNCH + 2.0 + layer.batch * layer.length * groups * 4 * 1.1 / CACHE_GB_PER_S / 1e3,
    }
    return {**kernels, "score": sum(kernels.values())}


def select(layer: Layer) -> float:
    """Return the microseconds of select: one block per row, or up to eight, which read the same scores."""
    chunks, kept = layer.length / layer.chunk, layer.length * layer.keep_per_10k / 1e4
    shares = min(8.0, max(1.0, chunks // 1024))
    waves = math.ceil(layer.batch * shares / MULTIPROCESSORS)
    per_thread = math.ceil(chunks / 1024)
    return LAUNCH + waves * (3.0 + 0.12 * per_thread * 4 + kept / shares / 1500)


def compact(layer: Layer, layers: int = 1) -> float:
    """Return the microseconds of compaction in place."""
    moved = layer.compact_bytes * layers
    blocks = 2 * layer.kv_heads * layer.batch * layers * 4  # slices of 64 bytes
    filled = min(1.0, blocks * BLOCK_BYTES / IN_FLIGHT_BYTES)
    return LAUNCH + 1.0 + moved / (MEMORY_GB_PER_S * 0.85 * filled) / 1e3


def all_layers(layer: Layer, layers: int, reuse: int) -> float:
    """Return the microseconds of the compression of all layers of a prompt, where groups of `reuse` share a choice."""
    leaders = math.ceil(layers / reuse)
    return leaders * (score(layer)["score"] + select(layer)) + leaders * compact(layer, reuse)


def against(layer: Layer) -> dict[str, float]:
    """Return the microseconds of the same layer in torch, op by op: score, choose, gather.

    The bytes are those of the ops in benchmarks/gpu/peers.py; the host issues one op at a time, so whichever of host
    and device is slower counts. In `published`, every kept chunk is an op of its own.
    """
    group = layer.heads // layer.kv_heads
    weights = float(layer.batch * layer.heads * layer.window * layer.length)
    chunks = layer.length / layer.chunk * layer.keep_per_10k / 1e4

    def torch_time(moved: float, ops: float, waits: int) -> float:
        device = (moved + layer.compact_bytes) / MEMORY_GB_PER_S / 1e3 + ops * EAGER_DEVICE
        return max(device, ops * EAGER_HOST) + waits * HOST_WAIT

    repeated = layer.key_bytes * (1 + 2 * group) + 32 * weights  # K for every query head; mask, softmax and a cast
    return {
        "kvpress_arithmetic": torch_time(repeated, 25 + chunks, waits=2),
        "kvpress_vectorised": torch_time(repeated, 28, waits=1),
        "torch_plain": torch_time(layer.key_bytes + 28 * weights, 22, waits=0),
    }


def one_layer(layer: Layer) -> float:
    """Return the microseconds of score, select and compact of one layer."""
    return score(layer)["score"] + select(layer) + compact(layer)


def main() -> None:
    """Print the table."""
    print("predicted microseconds on an H200, Llama-3-8B, keep 0.1; floor: K read once")
    print(f"{'batch x length':<16}{'window':>7} {'key':<9}{'floor':>7}{'stat.':>8}{'col.':>8}{'score':>8}", end="")
    print(f"{'% of floor':>11}{'select':>8}{'compact':>8}")
    for key in ("bfloat16", "fp8"):
        for window in (16, 32, 64):
            for batch, length in ((1, 8192), (1, 32768), (1, 131072), (16, 8192), (16, 32768)):
                layer = Layer(batch, length, window=window, key=key)
                of = score(layer)
                print(f"{batch} x {length:<12}{window:>7} {key:<9}{layer.floor:>7.1f}{of['statistics']:>8.1f}", end="")
                print(f"{of['columns']:>8.1f}{of['score']:>8.1f}{100 * layer.floor / of['score']:>11.0f}", end="")
                print(f"{select(layer):>8.1f}{compact(layer):>8.1f}")
    for length in (8192, 32768, 131072):
        layer = Layer(1, length)
        times = ", ".join(f"reuse {reuse}: {all_layers(layer, 32, reuse) / 1e3:.2f} ms" for reuse in (1, 2, 4))
        print(f"32 layers, 1 x {length}, window 16: {times}")
    for length in (8192, 32768):
        layer = Layer(1, length)
        times = ", ".join(f"{name} {taken:.0f}" for name, taken in against(layer).items())
        print(f"one layer, 1 x {length}, window 16: {one_layer(layer):.0f}; in torch: {times}")


if __name__ == "__main__":
    main()
