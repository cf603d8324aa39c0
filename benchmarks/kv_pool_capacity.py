"""How many sequences a fixed pool of KV blocks takes: counted by running the block manager, not by a formula.

Three ways to prefill are played with equal prompts until the pool is full, then every sequence decodes to its end:
without ChunkKV; together, all prompts whole before any block comes back; staged, one prompt after the other, each into
blocks that the one before gave back.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from chunkkv.errors import CacheFullError
from chunkkv.executors.tensorrt_llm.kv_blocks import BlockManager
from chunkkv.settings import ChunkKVSettings

WAYS = ("without ChunkKV", "prompts together", "prompts staged")


@dataclass(frozen=True)
class Count:
    """What one way of prefilling reached; blocks in use when prefill was done and when every sequence had ended."""

    way: str
    sequences: int
    blocks_after_prefill: int
    blocks_at_end: int


def count_sequences(way: str, pool_tokens: int, tokens_per_block: int, prompt: int, kept: int, new: int) -> Count:
    """Add sequences until the pool refuses one, decode `new` tokens of each, and return what fitted."""
    manager = BlockManager(pool_tokens // tokens_per_block, tokens_per_block)
    kept = prompt if way == WAYS[0] else kept
    running: list[int] = []
    while True:
        try:
            (number,) = manager.add(kept + new)
        except CacheFullError:
            break
        try:
            manager.grow(number, prompt)
        except CacheFullError:
            manager.remove(number)
            break
        running.append(number)
        if way != WAYS[1]:
            manager.truncate(number, kept)
    for number in running:
        manager.truncate(number, kept)
    after_prefill = manager.num_blocks - manager.free_blocks
    for length in range(kept + 1, kept + new + 1):
        for number in running:
            manager.grow(number, length)
    return Count(way, len(running), after_prefill, manager.num_blocks - manager.free_blocks)


def main() -> None:
    """Print the table and, as the last line, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("pool_tokens", 65536, "tokens that the pool holds"),
        ("tokens_per_block", 32, "slots of one block"),
        ("prompt", 8192, "tokens of every prompt"),
        ("new", 256, "tokens that every sequence decodes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--keep_ratios", default="0.5,0.2,0.1", help="shares of the prompt kept (default %(default)s)")
    arguments = parser.parse_args()
    sizes = (arguments.pool_tokens, arguments.tokens_per_block, arguments.prompt)
    print(
        f"{arguments.pool_tokens} tokens in blocks of {arguments.tokens_per_block}; "
        f"prompts of {arguments.prompt}, {arguments.new} new"
    )
    print(f"{'keep':>5}  {'prefill':<16}{'sequences':>10}{'blocks after prefill':>22}{'at the end':>12}")
    counts = []
    for ratio in map(float, arguments.keep_ratios.split(",")):
        kept = ChunkKVSettings(keep_per_10k=round(ratio * 10000)).kept_tokens(arguments.prompt)
        for way in WAYS:
            count = count_sequences(way, *sizes, kept, arguments.new)
            counts.append({"keep_ratio": ratio, **asdict(count)})
            print(
                f"{ratio:>5.2f}  {way:<16}{count.sequences:>10}{count.blocks_after_prefill:>22}"
                f"{count.blocks_at_end:>12}"
            )
    print(json.dumps({**vars(arguments), "counts": counts}))


if __name__ == "__main__":
    main()
