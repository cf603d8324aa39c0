"""Against torch on the same tensors: kvpress and its arithmetic, a plain gather, a prefill."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu import model
from benchmarks.gpu.compression import Compression, contiguous
from benchmarks.gpu.device import Device, Line, measure
from benchmarks.gpu.shapes import POOLING
from chunkkv.native import KVView, NativeLibrary, contiguous_kv


def scores_as_kvpress(torch: Any, query: Any, key: Any) -> Any:
    """Return SnapKV's token scores [B, Hkv, L] from query [B, Hq, w, D] and key [B, Hkv, L, D], op by op."""
    batch, heads, window, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    repeated = key[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, length, head_dim)
    logits = torch.matmul(query, repeated.transpose(2, 3)) / head_dim**0.5
    mask = torch.full_like(logits, float("-inf")).triu(diagonal=length - window + 1)
    weights = torch.softmax(logits + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    mean = weights[..., :-window].mean(dim=2)
    smooth = torch.nn.functional.avg_pool1d(mean, POOLING, stride=1, padding=POOLING // 2)
    scores = smooth.view(batch, kv_heads, group, -1).mean(dim=2)
    return torch.nn.functional.pad(scores, (0, window), value=scores.max().item() + 1)


def scores_plainly(torch: Any, query: Any, key: Any) -> Any:
    """Return the same scores as a careful torch user writes them: no repeated heads, no mask over all columns."""
    batch, heads, window, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * window, head_dim)
    logits = torch.matmul(grouped, key.transpose(2, 3)).float().mul_(head_dim**-0.5)
    tail = logits.view(batch, kv_heads, -1, window, length)[..., -window:]
    tail.masked_fill_(torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1), float("-inf"))
    mean = torch.softmax(logits, dim=-1)[..., :-window].mean(dim=2)
    smooth = torch.nn.functional.avg_pool1d(mean, POOLING, stride=1, padding=POOLING // 2)
    return torch.nn.functional.pad(smooth, (0, window), value=float(window * heads))


def best_chunks(torch: Any, scores: Any, chunk: int, keep: float) -> Any:
    """Return the numbers of the chunks that kvpress keeps of one row; the last chunk may be short."""
    summed = scores.sum(dim=1)[0]
    whole = summed.numel() // chunk * chunk
    means = summed[:whole].view(-1, chunk).mean(dim=1)
    if whole < summed.numel():
        means = torch.cat([means, summed[whole:].mean()[None]])
    return torch.topk(means, max(1, int(means.numel() * keep))).indices


def kept_as_kvpress(torch: Any, scores: Any, chunk: int, keep: float) -> Any:
    """Return kept positions of one row the way the published press builds them: chunk after chunk in Python."""
    length = scores.shape[2]
    best = best_chunks(torch, scores, chunk, keep)
    spans = [torch.arange(n * chunk, min((n + 1) * chunk, length), device=scores.device) for n in best]
    return torch.cat(spans).sort().values


def kept_vectorised(torch: Any, scores: Any, chunk: int, keep: float) -> Any:
    """Return the same without a Python loop."""
    best = best_chunks(torch, scores, chunk, keep)
    tokens = (best[:, None] * chunk + torch.arange(chunk, device=scores.device)).flatten().sort().values
    return tokens[tokens < scores.shape[2]]


def kvpress_itself(torch: Any, query: Any, key: Any, value: Any, chunk: int, keep: float) -> Any:
    """Return a call of the installed kvpress on the same tensors, its projections replaced by the identity, or None."""
    if importlib.util.find_spec("kvpress") is None:
        return None
    from kvpress import ChunkKVPress, SnapKVPress

    batch, heads, window, head_dim = query.shape
    length = key.shape[2]
    module = torch.nn.Module()
    module.q_proj, module.head_dim = torch.nn.Identity(), head_dim
    module.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=key.shape[1])
    hidden = torch.zeros(batch, length, heads * head_dim, dtype=query.dtype, device=query.device)
    hidden[:, length - window :] = query.transpose(1, 2).reshape(batch, window, heads * head_dim)
    unrotated = {
        "position_embeddings": tuple(
            torch.full((1, length, head_dim), number, dtype=query.dtype, device=query.device) for number in (1.0, 0.0)
        )
    }
    press = ChunkKVPress(press=SnapKVPress(1 - keep, window, POOLING), chunk_length=chunk)
    return lambda: press.compress(module, hidden, key, value, None, unrotated)


def against_kvpress(device: Device, library: NativeLibrary, length: int) -> Line:
    """Compare one layer: score, choose, gather; all of them rotate through caches that do not fit in the L2 cache."""
    shapes = device.shapes
    window, keep = shapes.windows[0], shapes.keeps[0]
    settings = shapes.settings(window, keep)
    caches = [contiguous(device, 1, length, seed=2 * i) for i in range(device.copies(2 * length * shapes.row_bytes))]
    work = Compression(device, library, settings, 1, length)
    out_shape = (1, shapes.kv_heads, work.kept, shapes.head_dim)
    out = contiguous_kv(*(device.empty(*out_shape, dtype=shapes.dtype) for _ in range(2)))
    torch, share = device.torch, keep / 10_000

    def ours(cache: KVView) -> None:
        work.score(cache)
        work.select()
        work.compact([cache], [out])

    def torch_way(choose: Callable[..., Any], key: Any, value: Any) -> None:
        kept = choose(torch, scores_as_kvpress(torch, work.query, key), settings.chunk_size, share)
        key.index_select(2, kept), value.index_select(2, kept)

    def plain(key: Any, value: Any) -> None:
        kept = kept_vectorised(torch, scores_plainly(torch, work.query, key), settings.chunk_size, share)
        key.index_select(2, kept), value.index_select(2, kept)

    times = {"ours": device.microseconds([partial(ours, cache) for _, _, cache in caches])}
    kept = device.int32(device.host(work.indices)[0])
    times["compact_alone"] = device.microseconds([partial(work.compact, [cache], [out]) for _, _, cache in caches])
    times["torch_gather"] = device.microseconds(
        [partial(lambda k, v: (k.index_select(2, kept), v.index_select(2, kept)), k, v) for k, v, _ in caches]
    )
    for name, way in (("kvpress_vectorised", partial(torch_way, kept_vectorised)), ("torch_plain", plain)):
        way(*caches[0][:2])
        rotated = cycle([partial(way, key, value) for key, value, _ in caches])
        times[name] = device.eager_microseconds(lambda calls=rotated: next(calls)())  # type: ignore[misc]
    published = partial(torch_way, kept_as_kvpress, *caches[0][:2])
    times["kvpress_arithmetic"] = device.eager_microseconds(published, repeats=1)
    installed = kvpress_itself(torch, work.query, *caches[0][:2], settings.chunk_size, share)
    if installed is not None:
        times["kvpress_itself"] = device.eager_microseconds(installed, repeats=1)
    line = {f"{name}_microseconds": round(taken, 1) for name, taken in times.items()}
    layer = model.Layer(1, length, shapes.heads, shapes.kv_heads, shapes.head_dim, window, keep_per_10k=keep)
    for name, taken in model.against(layer).items():
        line[f"faster_than_{name}"] = round(times[name] / times["ours"], 1)
        line[f"predicted_faster_than_{name}"] = round(taken / model.one_layer(layer), 1)
    return {"op": "one layer", "length": length, "window": window, "keep_per_10k": keep, **line}


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


def run(device: Device) -> Iterator[Line]:
    """Yield what torch takes for the same work, and for a prefill."""
    if device.torch is None:
        yield {"skipped": "torch is not installed, and there is nothing else to compare with"}
        return
    library = NativeLibrary()
    for length in device.shapes.lengths[:2]:
        yield against_kvpress(device, library, length)
    for length in device.shapes.lengths:
        yield {"op": "prefill", "length": length, "microseconds": round(prefill_microseconds(device, length), 1)}


if __name__ == "__main__":
    measure(run)
