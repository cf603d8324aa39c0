"""Microseconds, GB/s and percent of copy bandwidth of every op; then 32 layers in one CUDA graph."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.compression import Compression, contiguous, pool
from benchmarks.gpu.device import Device, measure
from benchmarks.gpu.packed import PackedBatch
from chunkkv.native import NativeLibrary, contiguous_kv

REUSE = (1, 2, 4)


def rate(op: str, microseconds: float, moved: int, copy_gbps: float, **sizes: int) -> dict[str, Any]:
    """Return one line of the result."""
    gbps = moved / microseconds / 1e3
    figures = {"microseconds": round(microseconds, 2), "gb_per_s": round(gbps, 1)}
    return {"op": op, **sizes, "bytes": moved, **figures, "percent_of_copy": round(100 * gbps / copy_gbps, 1)}


def single_ops(
    device: Device, library: NativeLibrary, batch: int, length: int, copy_gbps: float
) -> list[dict[str, Any]]:
    """Measure score, select and compact (out of place) for one batch and length."""
    shapes, results = device.shapes, []
    key_bytes = batch * length * shapes.row_bytes
    caches = [contiguous(device, batch, length, seed=2 + 2 * i) for i in range(device.copies(key_bytes))]
    for window in shapes.windows:
        for keep in shapes.keeps:
            sizes = {"batch": batch, "length": length, "window": window, "keep_per_10k": keep}
            work = Compression(device, library, shapes.settings(window, keep), batch, length)
            if batch == 1 and length == min(shapes.lengths):
                sizes["differ_near_cut"] = work.check(caches[0][0][0], caches[0][2])
            if keep == shapes.keeps[0]:
                calls = [partial(work.score, cache) for _, _, cache in caches]
                results.append(rate("score", device.microseconds(calls), key_bytes, copy_gbps, **sizes))
            work.select()
            chunks = library.max_chunks(work.settings, length)
            moved = batch * (16 * chunks + 4 * work.kept)  # the scores four times, the indices once
            results.append(rate("select", device.microseconds([work.select]), moved, copy_gbps, **sizes))
            if window == shapes.windows[0]:
                shape = (batch, shapes.kv_heads, work.kept, shapes.head_dim)
                out = contiguous_kv(*(device.empty(*shape, dtype=shapes.dtype) for _ in range(2)))
                calls = [partial(work.compact, [cache], [out]) for _, _, cache in caches]
                moved = 4 * batch * work.kept * shapes.row_bytes
                results.append(rate("compact", device.microseconds(calls), moved, copy_gbps, **sizes))
    return results


def rope(device: Device, library: NativeLibrary, length: int, copy_gbps: float) -> dict[str, Any]:
    """Measure rope of packed QKV in place."""
    shapes = device.shapes
    width = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim
    inputs = [device.random(length, width, seed=i) for i in range(device.copies(length * width * 2))]
    positions = device.int32(range(length))
    table = device.empty(length, shapes.head_dim // 2, 2, dtype="float32")
    table[:] = 0.5
    calls = [
        partial(
            library.rope,
            qkv,
            qkv,
            positions,
            table,
            heads=shapes.heads,
            kv_heads=shapes.kv_heads,
            head_dim=shapes.head_dim,
            stream=device.stream,
        )
        for qkv in inputs
    ]
    moved = 4 * length * (shapes.heads + shapes.kv_heads) * shapes.head_dim
    return rate("rope", device.microseconds(calls), moved, copy_gbps, batch=1, length=length)


def prepare(device: Device, library: NativeLibrary, length: int, copy_gbps: float) -> dict[str, Any]:
    """Check and measure prepare; at the smallest length also check the ops that take its packed rows."""
    shapes = device.shapes
    batch = PackedBatch(device, library, shapes.settings(shapes.windows[0], shapes.keeps[0]), length)
    batch.check_prepare()
    if length == min(shapes.lengths):
        batch.check_choice()
    sizes = {"batch": len(batch.prompts), "length": length, "tokens": batch.tokens}
    return rate("prepare", device.microseconds([batch.prepare]), batch.moved, copy_gbps, **sizes)


def all_layers(device: Device, library: NativeLibrary, length: int, copy_gbps: float) -> list[dict[str, Any]]:
    """Measure the compression of every layer of a prompt in place in a paged pool, as one graph."""
    shapes, results = device.shapes, []
    caches = pool(device, 1, length, shapes.layers)
    for keep in shapes.keeps:
        work = Compression(device, library, shapes.settings(shapes.windows[0], keep), 1, length)
        for reuse in REUSE:

            def compress(work: Compression = work, reuse: int = reuse) -> None:
                for first in range(0, shapes.layers, reuse):
                    group = caches[first : first + reuse]
                    work.score(group[-1])
                    work.select()
                    work.compact(group)

            leaders = -(-shapes.layers // reuse)
            moved = leaders * length * shapes.row_bytes + shapes.layers * 4 * work.kept * shapes.row_bytes
            sizes = {"length": length, "keep_per_10k": keep, "reuse": reuse, "layers": shapes.layers}
            line = rate("all layers", device.microseconds([compress]), moved, copy_gbps, **sizes)
            results.append({**line, "times_byte_floor": round(100 / max(line["percent_of_copy"], 1e-9), 2)})
    return results


def run(device: Device) -> dict[str, Any]:
    """Return the copy bandwidth and one line per measurement."""
    library, copy_gbps = NativeLibrary(), device.copy_gbps()
    lines: list[dict[str, Any]] = []
    for length in device.shapes.lengths:
        for batch in device.shapes.batches:
            lines += single_ops(device, library, batch, length, copy_gbps)
        lines.append(rope(device, library, length, copy_gbps))
        lines.append(prepare(device, library, length, copy_gbps))
        lines += all_layers(device, library, length, copy_gbps)
    return {"copy_gbps": round(copy_gbps, 1), "lines": lines}


if __name__ == "__main__":
    measure(run)
