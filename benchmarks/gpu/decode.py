"""Time per token of a decoder with random weights under a CUDA graph, for a full and for compressed caches.

The cache decides how long a token takes, so its contents do not matter. Where the caches of all layers do not fit in
memory, layers take turns on as many as do; each is far larger than the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.device import Device, Line, measure

KEEPS = (10_000, 3_000, 1_000)
MEMORY_SHARE = 0.8


class Decoder:
    """Weights of all layers, and one step for `batch` rows."""

    def __init__(self, device: Device) -> None:
        self.device, self.shapes, self.torch = device, device.shapes, device.torch
        s = self.shapes
        width = (s.heads + 2 * s.kv_heads) * s.head_dim
        sizes = (
            (s.hidden, width),
            (s.heads * s.head_dim, s.hidden),
            (s.hidden, 2 * s.intermediate),
            (s.intermediate, s.hidden),
        )
        self.weights = [[device.random(*size).mul_(0.01) for size in sizes] for _ in range(s.layers)]
        self.head = device.random(s.hidden, s.vocabulary).mul_(0.01)
        parameters = sum(a * b for a, b in sizes) * s.layers + s.hidden * s.vocabulary
        self.weight_bytes = 2 * parameters

    def caches(self, batch: int, length: int) -> list[tuple[Any, Any]]:
        """Return K and V for as many layers as fit."""
        s = self.shapes
        each = 2 * batch * length * s.row_bytes
        fit = s.layers
        if not self.device.dry_run:
            fit = max(1, min(s.layers, int(self.torch.cuda.mem_get_info()[0] * MEMORY_SHARE) // each))
        shape = (batch, s.kv_heads, length, s.head_dim)
        return [(self.device.random(*shape), self.device.random(*shape)) for _ in range(fit)]

    def step(self, hidden: Any, caches: list[tuple[Any, Any]]) -> Any:
        """Return the logits of one token per row; hidden [B, hidden]."""
        s, functional = self.shapes, self.torch.nn.functional
        batch = hidden.shape[0]
        for layer, (qkv, out, up, down) in enumerate(self.weights):
            key, value = caches[layer % len(caches)]
            rotated = functional.rms_norm(hidden, (s.hidden,)) @ qkv
            query = rotated[:, : s.heads * s.head_dim].view(batch, s.kv_heads, s.group, s.head_dim)
            weights = self.torch.softmax(query @ key.transpose(2, 3) / s.head_dim**0.5, dim=-1)
            hidden = hidden + (weights @ value).reshape(batch, -1) @ out
            gate, wide = (functional.rms_norm(hidden, (s.hidden,)) @ up).chunk(2, dim=-1)
            hidden = hidden + (functional.silu(gate) * wide) @ down
        return hidden @ self.head


def run(device: Device) -> Iterator[Line]:
    """Yield one line per batch, length and keep ratio."""
    if device.torch is None:
        yield {"skipped": "torch is not installed; the decoder is written in it"}
        return
    copy_gbps = device.copy_gbps()
    with device.torch.no_grad():
        decoder = Decoder(device)
        for batch, length in device.shapes.decode:
            full = None
            for keep in KEEPS:
                kept = length * keep // 10_000
                caches = decoder.caches(batch, kept)
                hidden = device.random(batch, device.shapes.hidden)
                taken = device.microseconds([partial(decoder.step, hidden, caches)])
                full = full or taken
                moved = decoder.weight_bytes + 2 * batch * kept * device.shapes.row_bytes * device.shapes.layers
                yield {
                    "batch": batch,
                    "length": length,
                    "keep_per_10k": keep,
                    "layers_with_own_cache": len(caches),
                    "milliseconds_per_token": round(taken / 1e3, 3),
                    "floor_milliseconds": round(moved / copy_gbps / 1e6, 3),
                    "faster_than_full": round(full / taken, 2),
                }
                del caches
                if not device.dry_run:
                    device.torch.cuda.empty_cache()


if __name__ == "__main__":
    measure(run)
