"""How many sequences TensorRT-LLM's C++ runtime keeps in a pool, with and without docker/tensorrt_llm_patch.

A model of its batch manager, not the thing itself: policy guaranteed_no_evict, one beam, no reuse, no chunked context.
In each step every running sequence gets a token. Waiting prompts are admitted in order while the free blocks, less
what the running sequences still need to finish, cover what the prompt needs. Equal prompts come all at once.

  stock            blocks of dropped tokens stay with their sequence
  blocks returned  they go back after prefill, but are still counted as needed (the patch without its two counts)
  patched          they go back and are counted no more
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from chunkkv.settings import ChunkKVSettings

WAYS = ("stock", "blocks returned", "patched")


@dataclass
class Request:
    """A prompt of `prompt` tokens that gets `new` tokens; `generated` of them are there."""

    number: int
    prompt: int
    new: int
    generated: int = 0

    @property
    def is_prefilled(self) -> bool:
        return self.generated > 0


class BatchManager(Protocol):
    """Who owns which blocks, as the scheduler asks and the steps change it."""

    @property
    def free_blocks(self) -> int: ...

    def needed(self, request: Request) -> int:
        """Return the blocks that a request still needs to finish, beyond those that it has."""

    def add(self, request: Request) -> None:
        """Give a prompt its blocks."""

    def prefilled(self, request: Request) -> None:
        """Give back what prefill has made free."""

    def add_token(self, request: Request) -> None:
        """Give a sequence room for one more token."""

    def remove(self, request: Request) -> None:
        """Give back all blocks of a sequence."""


@dataclass
class ModelledManager:
    """The arithmetic of TensorRT-LLM's KVCacheManager for one attention window, and of the patch."""

    blocks: int
    tokens_per_block: int
    kept: Callable[[int], int]
    way: str = WAYS[0]
    tokens: dict[int, int] = field(default_factory=dict)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_block)

    @property
    def free_blocks(self) -> int:
        return self.blocks - sum(map(self.blocks_for, self.tokens.values()))

    def needed(self, request: Request) -> int:
        end = request.prompt + request.new
        if self.way == WAYS[2]:
            at_end = self.kept(request.prompt) + request.new
            end = at_end if request.is_prefilled else max(request.prompt, at_end)
        return self.blocks_for(end) - self.blocks_for(self.tokens.get(request.number, 0))

    def add(self, request: Request) -> None:
        self._set(request, request.prompt)

    def prefilled(self, request: Request) -> None:
        if self.way != WAYS[0]:
            self._set(request, self.kept(request.prompt))

    def add_token(self, request: Request) -> None:
        self._set(request, self.tokens[request.number] + 1)

    def remove(self, request: Request) -> None:
        del self.tokens[request.number]

    def _set(self, request: Request, tokens: int) -> None:
        self.tokens[request.number] = tokens
        if self.free_blocks < 0:
            raise RuntimeError(f"request {request.number} finds no block for its token {tokens}")


@dataclass(frozen=True)
class Count:
    """What a run reached: most sequences at once after a step, steps until all had ended, fewest free blocks."""

    most_sequences: int
    steps: int
    fewest_free_blocks: int


def play(manager: BatchManager, requests: Sequence[Request], max_batch_size: int, max_num_tokens: int) -> Count:
    """Run all requests to their end.

    Raises
    ------
    RuntimeError
        If a sequence finds no block, or nothing can run.
    """
    waiting, running = deque(requests), list[Request]()
    steps = most = 0
    fewest = manager.free_blocks
    while waiting or running:
        available = manager.free_blocks - sum(map(manager.needed, running))
        admitted = list[Request]()
        room = max_num_tokens - len(running)
        while waiting and len(running) + len(admitted) < max_batch_size and waiting[0].prompt <= room:
            needed = manager.needed(waiting[0])
            if needed > available:
                break
            available -= needed
            room -= waiting[0].prompt
            admitted.append(waiting.popleft())
        if not running and not admitted:
            raise RuntimeError(f"a prompt of {waiting[0].prompt} tokens never fits")
        for request in admitted:
            manager.add(request)
        for request in running:
            manager.add_token(request)
        fewest = min(fewest, manager.free_blocks)
        for request in admitted:
            manager.prefilled(request)
        running += admitted
        for request in running:
            request.generated += 1
        steps, most = steps + 1, max(most, len(running))
        for request in [each for each in running if each.generated == each.new]:
            manager.remove(request)
            running.remove(request)
    return Count(most, steps, fewest)


def count(way: str, sizes: tuple[int, int, int, int], kept: Callable[[int], int], requests: int = 64) -> Count:
    """Play equal prompts; `sizes` are the tokens of the pool, of a block and of a prompt, and the new tokens.

    As many sequences may run as come, and one prompt is prefilled in a step.
    """
    pool, tokens_per_block, prompt, new = sizes
    manager = ModelledManager(pool // tokens_per_block, tokens_per_block, kept, way)
    return play(manager, [Request(number, prompt, new) for number in range(requests)], requests, prompt + requests)


def main() -> None:
    """Print the table and, as the last line, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("tokens_per_block", 32, "slots of one block"),
        ("new", 256, "tokens that every sequence gets"),
        ("requests", 64, "prompts in all"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    for name, lists, text in (
        ("pool_tokens", "65536,262144", "tokens that the pool holds"),
        ("prompts", "8192,32768", "tokens of every prompt"),
        ("keep_ratios", "0.5,0.2,0.1", "shares of the prompt kept"),
    ):
        parser.add_argument(f"--{name}", default=lists, help=f"{text} (default {lists})")
    given = parser.parse_args()
    print(f"{given.requests} prompts, {given.new} new tokens each, blocks of {given.tokens_per_block}")
    print(f"{'pool':>8}{'prompt':>8}{'keep':>6}  {'way':<17}{'sequences':>10}{'steps':>8}")
    counts = []
    for pool in map(int, given.pool_tokens.split(",")):
        for prompt in map(int, given.prompts.split(",")):
            for ratio in map(float, given.keep_ratios.split(",")):
                kept = ChunkKVSettings(keep_per_10k=round(ratio * 10000)).kept_tokens
                for way in WAYS:
                    sizes = (pool, given.tokens_per_block, prompt, given.new)
                    counted = count(way, sizes, kept, given.requests)
                    counts.append({"pool_tokens": pool, "prompt": prompt, "keep_ratio": ratio, "way": way})
                    counts[-1] |= asdict(counted)
                    shown = f"{counted.most_sequences:>10}{counted.steps:>8}"
                    print(f"{pool:>8}{prompt:>8}{ratio:>6.2f}  {way:<17}{shown}")
    print(json.dumps({"tokens_per_block": given.tokens_per_block, "new": given.new, "counts": counts}))


if __name__ == "__main__":
    main()
