"""kvpress's own presses on the product's keys and values, and answers on sets of tokens that differ in number by head.

Needs torch, transformers and kvpress (the extra "peers"). The model is the same GGUF file, read by transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KVzipPress,
    SnapKVPress,
    TOVAPress,
)
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from benchmarks.real.full_cache import FullCache, Scored
from chunkkv.evaluation.lm_eval.continuations import log_probabilities

disable_progress_bar()
logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns of its cost at every prompt

MASKED_ATTENTION = "kept_by_head"


def _masked_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention [B,Hq,S,D] in which every row's KV heads see their own kept tokens, and the block after them causally.

    `module.kept_rows` are keys, values [Hkv,M,D] and visible bool [Hkv,M] for each row.
    """
    rows, kv_heads, size, head_dim = key.shape
    block = torch.ones(size, size, dtype=torch.bool).tril().expand(kv_heads, -1, -1)
    grouped = query.reshape(rows, kv_heads, -1, size, head_dim)
    out = torch.empty_like(grouped)
    for row, (keys, values, visible) in enumerate(module.kept_rows):
        bias = torch.cat([visible[:, None].expand(-1, size, -1), block], dim=2)[:, None]
        seen, read = (
            torch.cat([kept, new[row]], dim=1)[:, None].expand(-1, grouped.shape[2], -1, -1)
            for kept, new in ((keys, key), (values, value))
        )
        out[row] = torch.nn.functional.scaled_dot_product_attention(
            grouped[row], seen, read, attn_mask=bias, scale=scaling
        )
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(MASKED_ATTENTION, _masked_attention)


class KVzip(KVzipPress):
    """KVzipPress that hands out its scores [layers,Hkv,L] instead of one cut."""

    def compress_post(self, model: Any) -> None:
        self.score_val[..., : self.n_sink] = self.score_val.amax() + 1.0  # as KVzipPress does
        self.scores = self.score_val[:, 0].clone()


class Peers:
    """The model in transformers, and what kvpress scores with it."""

    def __init__(self, gguf: Path, folder: Path) -> None:
        torch.set_num_threads(1)
        if not (folder / "config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._modules = [layer.self_attn for layer in self.model.model.layers]
        for module in self._modules:
            module.rotary_emb = self.model.model.rotary_emb  # as kvpress's BasePress does

    @contextmanager
    def _inputs(self) -> Iterator[list[torch.Tensor]]:
        """Collect per layer the input [1,S,hidden] of its attention."""
        seen: list[torch.Tensor] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
            )
            for module in self._modules
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def read(self, ids: np.ndarray) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Return KVzip's scores [layers,Hkv,L] of a prompt, and per layer the input [1,L,hidden] of its attention."""
        press = KVzip(compression_ratio=0.5)
        with press(self.model), self._inputs() as hidden:
            self.model.model(input_ids=torch.from_numpy(ids)[None], past_key_values=DynamicCache())
        return press.scores.numpy(), hidden

    @torch.no_grad()
    def read_on(self, full: FullCache, before: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs of all layers for a prompt whose beginning had those `before`."""
        start = before[0].shape[1]
        everything = np.ones((len(full.keys), full.keys[0].shape[0], start), bool)
        with self._inputs() as hidden:
            self._forward(full, [everything], full.ids[start:], 1, start)
        return [torch.cat(pair, dim=1) for pair in zip(before, hidden, strict=True)]

    def _forward(
        self, full: FullCache, masks: Sequence[np.ndarray], block: Sequence[int] | np.ndarray, logits: int, start: int
    ) -> torch.Tensor:
        """Return the last `logits` logits [rows,logits,vocab] of one block behind each of the masks of a prompt."""
        for layer, (key, value) in enumerate(zip(full.keys, full.values, strict=True)):
            self._modules[layer].kept_rows = [_gathered(key, value, mask[layer]) for mask in masks]
        positions = torch.arange(start, start + len(block))[None]
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(MASKED_ATTENTION)
        try:
            result: torch.Tensor = self.model(
                torch.tensor(np.array(block))[None].expand(len(masks), -1),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=logits,
            ).logits
        finally:
            self.model.set_attn_implementation(before)
        return result

    @torch.no_grad()
    def score(
        self, full: FullCache, masks: Sequence[np.ndarray], fed: Sequence[int], answer: Sequence[int], first: int
    ) -> list[Scored]:
        """Score an answer as Engine.score does on each of the masks bool [layers,Hkv,L], all at once.

        A mask may hold any number of tokens per head.
        """
        logits = self._forward(full, masks, [*fed, *answer[:-1]], len(answer) - first, len(full)).numpy()
        expected = np.array(answer[first:], np.int64)
        return [
            Scored(
                tuple(map(int, scored.argmax(axis=1) == expected)), tuple(log_probabilities(scored, expected).tolist())
            )
            for scored in logits
        ]


def _gathered(key: np.ndarray, value: np.ndarray, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the kept keys and values [Hkv,M,D] of a layer, and which of them count: heads with fewer are filled up."""
    counts = kept.sum(axis=1)
    most = int(counts.max())
    positions = np.argsort(~kept, axis=1, kind="stable")[:, :most, None]
    taken = (torch.from_numpy(np.take_along_axis(array, positions, axis=1)) for array in (key, value))
    return *taken, torch.from_numpy(np.arange(most) < counts[:, None])


class PromptScores:
    """kvpress's scores of one prompt, each computed when it is first asked for."""

    def __init__(
        self, peers: Peers, full: FullCache, hidden: list[torch.Tensor], zipped: np.ndarray | None = None
    ) -> None:
        self._peers, self._full, self._hidden, self._zipped = peers, full, hidden, zipped
        positions = torch.arange(len(full))[None]
        self._rotation = peers.model.model.rotary_emb(self._hidden[0], positions)
        self._scores: dict[str, np.ndarray] = {}

    def _run(self, call: Any) -> list[Any]:
        """Call a press's method for every layer on the full cache's tensors."""
        kwargs = {"position_embeddings": self._rotation}
        results = []
        for module, hidden, key, value in zip(
            self._peers._modules, self._hidden, self._full.keys, self._full.values, strict=True
        ):
            keys, values = torch.from_numpy(key)[None], torch.from_numpy(value)[None]
            results.append(call(module, hidden, keys, values, None, kwargs))
        return results

    @torch.no_grad()
    def scores(self, name: str, press: Any) -> np.ndarray:
        """Return a press's scores [layers,Hkv,L]."""
        if name not in self._scores:
            self._scores[name] = torch.cat(self._run(press.score)).numpy()
        return self._scores[name]

    @torch.no_grad()
    def kept(self, name: str, count: int) -> np.ndarray:
        """Return what a press keeps, bool [layers,Hkv,L]: `count` tokens per head, on average where heads compete."""
        if name == "kvpress ChunkKV":
            return self._chunks(ChunkKVPress(SnapKVPress()), count)
        if name.startswith("kvpress KVzip"):
            assert self._zipped is not None, "KVzip reads the context, without a question"
            return best(self._zipped, count, over=3)
        if name.startswith("kvpress AdaKV"):
            window = int(name.rsplit(maxsplit=1)[-1]) if name[-1].isdigit() else 64
            return self._ada(AdaKVPress(SnapKVPress(window_size=window)), window, count)
        return best(self.scores(name, SCORERS[name]()), count, over=1)

    def _ada(self, press: Any, window: int, count: int) -> np.ndarray:
        """AdaKVPress's rule with exactly `count` kept on average; its masks are read back from the module."""
        length = len(self._full)
        press.press.compression_ratio = 1 - (count + 0.5) / length  # int() in compute_n_kept then gives `count`
        masks = []
        for module, _ in zip(self._peers._modules, self._run(press.compress), strict=True):
            mask = np.ones((self._full.keys[0].shape[0], length), bool)
            _, heads, tokens = module.masked_key_indices
            mask[heads.numpy(), tokens.numpy()] = False
            module.masked_key_indices = None
            masks.append(mask)
        return np.stack(masks)

    def _chunks(self, press: Any, count: int) -> np.ndarray:
        """ChunkKVPress keeps whole chunks only: the fewest that hold at least `count` tokens, in its favour."""
        length = len(self._full)
        chunks = -(-length // press.chunk_length)
        numbers = torch.arange(length, dtype=torch.float32)[:, None].expand(1, self._full.keys[0].shape[0], length, -1)
        wanted = -(-count // press.chunk_length)
        while True:
            press.press.compression_ratio = max(1 - (wanted + 0.5) / chunks, 0.0)
            results = self._run(
                lambda module, hidden, keys, values, *rest: press.compress(
                    module, hidden, keys, numbers.repeat(1, 1, 1, keys.shape[3]), *rest
                )[1][0, 0, :, 0]
            )
            if all(len(result) >= count for result in results):
                break
            wanted += 1
        mask = np.zeros((len(results), self._full.keys[0].shape[0], length), bool)
        for layer, result in enumerate(results):
            mask[layer][:, result.long().numpy()] = True
        return mask


SCORERS: dict[str, Any] = {
    "kvpress SnapKV": SnapKVPress,
    "kvpress SnapKV, window 16": lambda: SnapKVPress(window_size=16),
    "kvpress ExpectedAttention": ExpectedAttentionPress,
    "kvpress KeyDiff": KeyDiffPress,
    "kvpress TOVA": TOVAPress,
}


def best(scores: np.ndarray, count: int, over: int) -> np.ndarray:
    """Return the mask of the best tokens of scores [layers,Hkv,L].

    `over` says what competes: 1: the tokens of a head, 2: those of a layer, 3: all. `count` is kept per head, on
    average.
    """
    shape = scores.shape
    flat = scores.reshape(*shape[: 3 - over], -1)
    number = count * int(np.prod(shape[3 - over : 2]))
    chosen = torch.topk(torch.from_numpy(np.ascontiguousarray(flat)), number, dim=-1).indices.numpy()
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, chosen, True, axis=-1)
    return mask.reshape(shape)
