"""Microseconds, GB/s and percent of copy bandwidth of every op, beside what the model predicts; then 32 layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu import model
from benchmarks.gpu.compression import Compression, Variant, caches_of, contiguous, pool
from benchmarks.gpu.device import Device, Line, measure
from benchmarks.gpu.packed import PackedBatch
from chunkkv.native import NativeLibrary, contiguous_kv

REUSE = (1, 2, 4)
RAGGED = (32768, 16384, 8192, 8192, 4096, 4096, 4096, 2048, 2048, 2048, 1024, 1024, 1024, 1024, 512, 512)


def variants(device: Device) -> list[tuple[Variant, int]]:
    """Return what is measured beside the plain case, with the rows of the batch."""
    scale = 1 if not device.dry_run else 128
    ragged = tuple(max(40, length // scale) for length in RAGGED)
    return [
        (Variant("paged", paged=True), 1),
        (Variant("fp8", key="fp8"), 1),
        (Variant("int8", key="int8"), 1),
        (Variant("delimiter", settings=(("boundaries", "delimiter"), ("chunk_size", 20)), delimiter_rate=0.1), 1),
        (Variant("ragged", lengths=ragged), len(ragged)),
        (Variant("D 64", heads=(32, 8, 64)), 1),
        (Variant("28/4 heads", heads=(28, 4, 128)), 1),
        (Variant("40/8 heads", heads=(40, 8, 128)), 1),
        (Variant("one to one", heads=(32, 32, 128)), 1),
        (Variant("each head", settings=(("heads", "each"),)), 1),
        (Variant("largest head", settings=(("head_reduce", "max"),)), 1),
        (Variant("value norms", settings=(("value_norm", "on"),)), 1),
    ]


def rate(op: str, microseconds: float, moved: int, copy_gbps: float, **sizes: Any) -> Line:
    """Return one line of the result."""
    gbps = moved / microseconds / 1e3
    figures = {"microseconds": round(microseconds, 2), "gb_per_s": round(gbps, 1)}
    return {"op": op, **sizes, "bytes": moved, **figures, "percent_of_copy": round(100 * gbps / copy_gbps, 1)}


def score_line(microseconds: float, layer: model.Layer, copy_gbps: float, **sizes: Any) -> Line:
    """Return the line of score: all bytes that it moves, and the share of the copy bandwidth if K were read once."""
    line = rate("score", microseconds, int(layer.score_bytes), copy_gbps, **sizes)
    return {**line, "percent_of_copy_k_once": round(layer.key_bytes / microseconds / copy_gbps / 10, 1)}


def predicted(line: Line, microseconds: float) -> Line:
    """Return the line with what the model said before, and how far off it is."""
    error = round(100 * (line["microseconds"] / microseconds - 1))
    return {**line, "predicted_microseconds": round(microseconds, 1), "percent_above_prediction": error}


def single_ops(device: Device, library: NativeLibrary, batch: int, length: int, copy_gbps: float) -> Iterator[Line]:
    """Measure score, select and compact (out of place) for one batch and length."""
    shapes = device.shapes
    key_bytes = batch * length * shapes.row_bytes
    caches = [contiguous(device, batch, length, seed=2 + 2 * i) for i in range(device.copies(key_bytes))]
    for window in shapes.windows:
        for keep in shapes.keeps:
            sizes = {"batch": batch, "length": length, "window": window, "keep_per_10k": keep}
            work = Compression(device, library, shapes.settings(window, keep), batch, length)
            heads = (shapes.heads, shapes.kv_heads, shapes.head_dim)
            layer = model.Layer(batch, length, *heads, window=window, keep_per_10k=keep)
            if batch == 1 and length == min(shapes.lengths):
                sizes["differ_near_cut"] = work.check(caches[0][0][0], caches[0][2])
            if keep == shapes.keeps[0]:
                calls = [partial(work.score, cache) for _, _, cache in caches]
                line = score_line(device.microseconds(calls), layer, copy_gbps, **sizes)
                yield predicted({**line, "kernels": device.kernels(calls[0])}, model.score(layer)["score"])
            work.select()
            moved = batch * (16 * work.max_chunks + 4 * work.kept)  # the scores four times, the indices once
            line = rate("select", device.microseconds([work.select]), moved, copy_gbps, **sizes)
            yield predicted(line, model.select(layer))
            if window == shapes.windows[0]:
                shape = (batch, shapes.kv_heads, work.kept, shapes.head_dim)
                out = contiguous_kv(*(device.empty(*shape, dtype=shapes.dtype) for _ in range(2)))
                calls = [partial(work.compact, [cache], [out]) for _, _, cache in caches]
                moved = 4 * batch * work.kept * shapes.row_bytes
                yield rate("compact", device.microseconds(calls), moved, copy_gbps, **sizes)


def variant_lines(device: Device, library: NativeLibrary, copy_gbps: float) -> Iterator[Line]:
    """Measure score, and boundaries where there are delimiters, of every variant at the second length."""
    shapes, length = device.shapes, device.shapes.lengths[1]
    window, keep = shapes.windows[0], shapes.keeps[0]
    for variant, batch in variants(device):
        settings = shapes.settings(window, keep, **dict(variant.settings))
        longest = max(variant.lengths, default=length)
        work = Compression(device, library, settings, batch, longest, variant)
        caches = caches_of(device, variant, batch, longest)
        heads, kv_heads, head_dim = variant.heads or (shapes.heads, shapes.kv_heads, shapes.head_dim)
        tokens = sum(variant.lengths) or batch * longest
        sizes = {"variant": variant.name, "batch": batch, "length": longest, "window": window, "tokens": tokens}
        layer = model.Layer(1, tokens, heads, kv_heads, head_dim, window, key=variant.key)
        taken = device.microseconds([partial(work.score, cache) for cache in caches])
        line = score_line(taken, layer, copy_gbps, **sizes)
        yield predicted(
            {**line, "kernels": device.kernels(partial(work.score, caches[0]))}, model.score(layer)["score"]
        )
        if work.chunks is not None:
            yield rate("boundaries", device.microseconds([work.boundaries]), 8 * tokens, copy_gbps, **sizes)
        del work, caches


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


def all_layers(device: Device, library: NativeLibrary, length: int, copy_gbps: float) -> Iterator[Line]:
    """Measure the compression of every layer of a prompt in place in a paged pool, as one graph."""
    shapes = device.shapes
    caches = pool(device, 1, length, shapes.layers)
    for keep in shapes.keeps:
        work = Compression(device, library, shapes.settings(shapes.windows[0], keep), 1, length)
        heads = (shapes.heads, shapes.kv_heads, shapes.head_dim)
        layer = model.Layer(1, length, *heads, window=shapes.windows[0], keep_per_10k=keep)
        for reuse in REUSE:

            def compress(work: Compression = work, reuse: int = reuse) -> None:
                for first in range(0, shapes.layers, reuse):
                    group = caches[first : first + reuse]
                    work.score(group[0])
                    work.select()
                    work.compact(group)

            leaders = -(-shapes.layers // reuse)
            moved = leaders * int(layer.score_bytes) + shapes.layers * 4 * work.kept * shapes.row_bytes
            sizes = {"length": length, "keep_per_10k": keep, "reuse": reuse, "layers": shapes.layers}
            line = rate("all layers", device.microseconds([compress]), moved, copy_gbps, **sizes)
            line["times_byte_floor"] = round(100 / max(line["percent_of_copy"], 1e-9), 2)
            yield predicted(line, model.all_layers(layer, shapes.layers, reuse))


def run(device: Device) -> Iterator[Line]:
    """Yield the copy bandwidth and one line per measurement, what matters most first."""
    library, copy_gbps = NativeLibrary(), device.copy_gbps()
    yield {"op": "copy", "gb_per_s": round(copy_gbps, 1)}
    for length in device.shapes.lengths[:2]:
        yield from single_ops(device, library, device.shapes.batches[0], length, copy_gbps)
        yield from all_layers(device, library, length, copy_gbps)
    yield from variant_lines(device, library, copy_gbps)
    for length in device.shapes.lengths:
        yield rope(device, library, length, copy_gbps)
        yield prepare(device, library, length, copy_gbps)
        for batch in device.shapes.batches:
            if length > device.shapes.lengths[1] or batch != device.shapes.batches[0]:
                yield from single_ops(device, library, batch, length, copy_gbps)
    if len(device.shapes.lengths) > 2:
        yield from all_layers(device, library, device.shapes.lengths[2], copy_gbps)


if __name__ == "__main__":
    measure(run)
