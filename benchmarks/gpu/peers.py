"""Against torch on the same tensors: kvpress's arithmetic, a vectorised form of it, a plain gather, a prefill."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.compression import Compression, contiguous
from benchmarks.gpu.device import Device, measure
from chunkkv.native import NativeLibrary, contiguous_kv

POOLING = 5


def scores_as_kvpress(device: Device, query: Any, key: Any) -> Any:
    """Return SnapKV's token scores [B, Hkv, L - w] from query [B, Hq, w, D] and key [B, Hkv, L, D], op by op."""
    torch = device.torch
    batch, heads, window, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    repeated = key[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, length, head_dim)
    logits = torch.matmul(query, repeated.transpose(2, 3)) / head_dim**0.5
    mask = torch.full_like(logits, float("-inf")).triu(diagonal=length - window + 1)
    weights = torch.softmax(logits + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    mean = weights[..., :-window].mean(dim=2)
    smooth = torch.nn.functional.avg_pool1d(mean, POOLING, stride=1, padding=POOLING // 2)
    return smooth.view(batch, kv_heads, group, -1).mean(dim=2)


def kept_as_kvpress(device: Device, scores: Any, chunk: int, count: int, window: int) -> Any:
    """Return kept positions of one row the way the published press builds them: chunk after chunk in Python."""
    torch = device.torch
    summed = scores.sum(dim=1)[0]
    chunks = summed.numel() // chunk
    means = summed[: chunks * chunk].view(chunks, chunk).mean(dim=1)
    best = torch.topk(means, min(count, chunks)).indices
    parts = [torch.arange(number * chunk, (number + 1) * chunk, device=scores.device) for number in best]
    tail = torch.arange(summed.numel(), summed.numel() + window, device=scores.device)
    return torch.cat([*parts, tail]).sort().values


def kept_vectorised(device: Device, scores: Any, chunk: int, count: int, window: int) -> Any:
    """Return the same without a Python loop."""
    torch = device.torch
    summed = scores.sum(dim=1)[0]
    chunks = summed.numel() // chunk
    best = torch.topk(summed[: chunks * chunk].view(chunks, chunk).mean(dim=1), min(count, chunks)).indices
    spread = torch.arange(chunk, device=scores.device)
    tail = torch.arange(summed.numel(), summed.numel() + window, device=scores.device)
    return torch.cat([(best[:, None] * chunk + spread).flatten(), tail]).sort().values


def against_kvpress(device: Device, library: NativeLibrary, length: int) -> dict[str, Any]:
    """Compare one layer: score, choose, gather."""
    shapes = device.shapes
    window, keep = shapes.windows[0], shapes.keeps[0]
    settings = shapes.settings(window, keep)
    key, value, cache = contiguous(device, 1, length)
    work = Compression(device, library, settings, 1, length)
    count = max(1, (work.kept - window) // settings.chunk_size)
    out_shape = (1, shapes.kv_heads, work.kept, shapes.head_dim)
    out = contiguous_kv(*(device.empty(*out_shape, dtype=shapes.dtype) for _ in range(2)))

    def ours() -> None:
        work.score(cache)
        work.select()
        work.compact([cache], [out])

    def gather(kept: Any) -> tuple[Any, Any]:
        return key.index_select(2, kept), value.index_select(2, kept)

    def published() -> None:
        scores = scores_as_kvpress(device, work.query, key)
        gather(kept_as_kvpress(device, scores, settings.chunk_size, count, window))

    def vectorised() -> None:
        scores = scores_as_kvpress(device, work.query, key)
        gather(kept_vectorised(device, scores, settings.chunk_size, count, window))

    times = {"ours": device.microseconds([ours])}
    kept = device.int32(device.host(work.indices)[0])
    times["compact_alone"] = device.microseconds([lambda: work.compact([cache], [out])])
    times["torch_gather"] = device.microseconds([lambda: gather(kept)])
    vectorised()
    times["kvpress_vectorised"] = device.eager_microseconds(vectorised)
    times["kvpress_arithmetic"] = device.eager_microseconds(published, repeats=1)
    line = {f"{name}_microseconds": round(value, 1) for name, value in times.items()}
    speedup = {"faster_than_kvpress": round(times["kvpress_arithmetic"] / times["ours"], 1)}
    return {"length": length, "window": window, "keep_per_10k": keep, **line, **speedup}


def prefill_microseconds(device: Device, length: int) -> float:
    """Return the time of the matrix products and the attention of one layer's prefill, times the layers."""
    torch, shapes = device.torch, device.shapes
    functional = torch.nn.functional
    hidden = device.random(length, shapes.hidden)
    width = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim
    weights = [
        device.random(*shape) * 0.01
        for shape in (
            (shapes.hidden, width),
            (shapes.heads * shapes.head_dim, shapes.hidden),
            (shapes.hidden, 2 * shapes.intermediate),
            (shapes.intermediate, shapes.hidden),
        )
    ]
    query = device.random(1, shapes.heads, length, shapes.head_dim)
    key = device.random(1, shapes.heads, length, shapes.head_dim)

    def layer() -> None:
        _ = hidden @ weights[0]
        attended = functional.scaled_dot_product_attention(query, key, key, is_causal=True)
        projected = attended.transpose(1, 2).reshape(length, -1) @ weights[1]
        gate, up = (projected @ weights[2]).chunk(2, dim=-1)
        (functional.silu(gate) * up) @ weights[3]

    layer()
    return device.eager_microseconds(layer, repeats=2) * shapes.layers


def run(device: Device) -> dict[str, Any]:
    """Return what torch takes for the same work, and for a prefill."""
    if device.torch is None:
        return {"skipped": "torch is not installed, and there is nothing else to compare with"}
    library = NativeLibrary()
    lines = [against_kvpress(device, library, length) for length in device.shapes.lengths[:2]]
    prefill = {str(length): round(prefill_microseconds(device, length), 1) for length in device.shapes.lengths}
    return {"one_layer": lines, "prefill_microseconds": prefill}


if __name__ == "__main__":
    measure(run)
