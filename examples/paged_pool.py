"""Compress a paged pool of KV blocks between prefill and decode, in plain torch.

A small decoder with random weights stands for an engine that owns its pool, as TensorRT-LLM's PyTorch backend and
TensorRT Edge-LLM do. Two prompts with a common beginning share blocks. After prefill, compress_pool keeps a fifth of
each; decode then goes on over fewer blocks, with the logical positions that the prompts had.

    CHUNKKV_LIB=path/of/libchunkkv.so python examples/paged_pool.py
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from chunkkv.native import NativeLibrary, compress_pool
from chunkkv.settings import ChunkKVSettings

LAYERS, HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 8, 2, 64, 512
SETTINGS = ChunkKVSettings(keep_per_10k=2000, boundaries="fixed", layer_groups=((0, 1), (2, 3)))


@dataclass
class Row:
    """A sequence: its blocks, the slots that are filled, and its logical length."""

    blocks: list[int] = field(default_factory=list)
    slots: int = 0
    length: int = 0


class Decoder:
    """Attention layers over the pool [blocks, layers, 2, Hkv, tokens_per_block, D]."""

    def __init__(self, device: str, blocks: int, tokens_per_block: int) -> None:
        generator = torch.Generator().manual_seed(1)
        width = HEADS * SIZE

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(device)

        self.embedding = weight(VOCABULARY, width) * 4
        self.qkv = [weight((HEADS + 2 * KV_HEADS) * SIZE, width) for _ in range(LAYERS)]
        self.out = [weight(width, width) for _ in range(LAYERS)]
        self.pool = torch.zeros(blocks, LAYERS, 2, KV_HEADS, tokens_per_block, SIZE, device=device)
        self.tokens_per_block = tokens_per_block
        self.window: dict[int, torch.Tensor] = {}  # rotated queries of the last prompt tokens, by layer

    def append(self, row: Row, tokens: torch.Tensor) -> torch.Tensor:
        """Run tokens behind what `row` holds and return the logits of the last one."""
        count = len(tokens)
        positions = torch.arange(row.length, row.length + count, device=tokens.device)
        hidden = self.embedding[tokens]
        for layer in range(LAYERS):
            parts = (functional.rms_norm(hidden, hidden.shape[-1:]) @ self.qkv[layer].T).view(count, -1, SIZE)
            query, key, value = parts.transpose(0, 1).split([HEADS, KV_HEADS, KV_HEADS])
            query, key = rotated(query, positions), rotated(key, positions)
            self.window[layer] = query[:, -SETTINGS.window :]
            self._store(row, layer, key, value)
            keys, values = self._stored(row, layer, row.slots + count)
            mask = torch.ones(count, row.slots + count, dtype=torch.bool, device=tokens.device).tril(row.slots)
            attended = functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
            hidden = hidden + attended.transpose(0, 1).reshape(count, -1) @ self.out[layer].T
        row.slots += count
        row.length += count
        return functional.rms_norm(hidden[-1], hidden.shape[-1:]) @ self.embedding.T

    def _store(self, row: Row, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        slots = torch.arange(row.slots, row.slots + key.shape[1])
        blocks = torch.tensor(row.blocks)[slots // self.tokens_per_block]
        for kind, rows in enumerate((key, value)):
            self.pool[blocks, layer, kind, :, slots % self.tokens_per_block] = rows.transpose(0, 1)

    def _stored(self, row: Row, layer: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self.pool[row.blocks, layer].permute(1, 2, 0, 3, 4)  # [2, Hkv, blocks, tokens_per_block, D]
        keys, values = blocks.flatten(2, 3)[:, :, :slots]
        return keys, values


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate heads [heads, tokens, D] by logical positions."""
    angles = positions[:, None] / 10_000 ** (torch.arange(0, SIZE, 2, device=x.device) / SIZE)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def run(library: NativeLibrary, device: str = "cpu", tokens_per_block: int = 32) -> dict[str, int]:
    """Prefill two prompts, compress their rows, decode; return how many blocks were used before and after."""
    decoder = Decoder(device, blocks=96, tokens_per_block=tokens_per_block)
    free = list(range(96))
    prompt = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(2)).to(device)
    first = Row(blocks=[free.pop() for _ in range(-(-600 // tokens_per_block))])
    decoder.append(first, prompt)
    queries = [dict(decoder.window)]
    shared = 256  # tokens of the second prompt that the first has too: their blocks are used again
    second = Row(first.blocks[: shared // tokens_per_block], shared, shared)
    second.blocks = [*second.blocks, *(free.pop() for _ in range(-(-(500 - shared) // tokens_per_block)))]
    decoder.append(second, prompt[: 500 - shared].flip(0))
    queries.append(dict(decoder.window))
    rows = [first, second]
    before = len({block for row in rows for block in row.blocks})

    result = compress_pool(
        library,
        SETTINGS,
        decoder.pool,
        [row.blocks for row in rows],
        [row.length for row in rows],
        queries={layer: torch.stack([each[layer] for each in queries]).contiguous() for layer in (0, 2)},
        free_blocks=free,
    )
    for row, blocks, kept in zip(rows, result.block_tables, result.kept_lengths, strict=True):
        row.blocks, row.slots = list(blocks), kept  # row.length stays: positions are logical
    used = {block for row in rows for block in row.blocks}
    free = [*(block for block in free if block not in used), *result.freed]

    for row in rows:
        token = torch.tensor([7], device=device)
        for _ in range(40):
            if row.slots == len(row.blocks) * tokens_per_block:
                row.blocks.append(free.pop())
            token = decoder.append(row, token).argmax()[None]
    print(f"{before} blocks before, {len(used)} after; rows of {[row.length for row in rows]} tokens decode on")
    return {"before": before, "after": len(used), "freed": len(result.freed)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where the pool lies; default: cuda")
    run(NativeLibrary(), parser.parse_args().device)
