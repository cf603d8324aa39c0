"""kvpress's own presses on the product's keys and values, and answers on sets of tokens that differ in number by head.

Needs torch, transformers and kvpress (the extra "peers"). The model is the same GGUF file, read by transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from benchmarks.real.full_cache import FullCache, Scored
from chunkkv.evaluation.lm_eval.continuations import log_probabilities

MASKED_ATTENTION = "kept_by_head"
SAFEGUARD = 0.2  # AdaKVPress's default: the share of N that every head keeps at least


def _masked_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention [1,Hq,S,D] in which every KV head sees its own kept tokens, and the block after them causally."""
    size, kept = query.shape[2], module.kept_by_head
    block = torch.ones(size, size, dtype=torch.bool).tril().expand(len(kept), -1, -1)
    visible = torch.cat([kept[:, None].expand(-1, size, -1), block], dim=2)
    groups = query.shape[1] // len(kept)
    bias = visible.repeat_interleave(groups, 0)[None]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


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

    @torch.no_grad()
    def hidden_states(self, ids: np.ndarray) -> list[torch.Tensor]:
        """Return per layer the input [1,L,hidden] of its attention."""
        seen: list[torch.Tensor] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
            )
            for module in self._modules
        ]
        try:
            self.model.model(torch.from_numpy(ids)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @torch.no_grad()
    def kvzip_scores(self, ids: np.ndarray) -> np.ndarray:
        """Return KVzip's scores [layers,Hkv,L] of a prompt."""
        press = KVzip(compression_ratio=0.5)
        with press(self.model):
            self.model.model(input_ids=torch.from_numpy(ids)[None], past_key_values=DynamicCache())
        return press.scores.numpy()

    @torch.no_grad()
    def score(self, full: FullCache, kept: np.ndarray, fed: Sequence[int], answer: Sequence[int], first: int) -> Scored:
        """Score an answer as Engine.score does; kept bool [layers,Hkv,L] may hold any number of tokens per head."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(full.keys, full.values, strict=True)):
            cache.update(torch.from_numpy(key)[None], torch.from_numpy(value)[None], layer)
            self._modules[layer].kept_by_head = torch.tensor(kept[layer])
        block = torch.tensor([[*fed, *answer[:-1]]])
        positions = torch.arange(len(full), len(full) + block.shape[1])[None]
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(MASKED_ATTENTION)
        try:
            logits = self.model(
                block, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer) - first
            ).logits[0]
        finally:
            self.model.set_attn_implementation(before)
        expected = np.array(answer[first:], np.int64)
        scored = logits.numpy()
        right = scored.argmax(axis=1) == expected
        return Scored(tuple(map(int, right)), tuple(log_probabilities(scored, expected).tolist()))


class PromptScores:
    """kvpress's scores of one prompt, each computed when it is first asked for."""

    def __init__(self, peers: Peers, full: FullCache, zipped: np.ndarray | None) -> None:
        self._peers, self._full, self._zipped = peers, full, zipped
        self._hidden = peers.hidden_states(full.ids)
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
            zipped = np.zeros((*self._zipped.shape[:2], len(self._full)), np.float32)
            zipped[..., : self._zipped.shape[2]] = self._zipped
            zipped[..., self._zipped.shape[2] :] = self._zipped.max() + 1  # the question stays, as in KVzip's use
            return best(zipped, count, over=3)
        if name.startswith("kvpress AdaKV"):
            window = int(name.rsplit(maxsplit=1)[-1]) if name[-1].isdigit() else 64
            return self._ada(AdaKVPress(SnapKVPress(window_size=window)), window, count)
        return best(self.scores(name, PRESSES[name]()), count, over=1)

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


PRESSES: dict[str, Any] = {
    "kvpress SnapKV": SnapKVPress,
    "kvpress SnapKV, window 16": lambda: SnapKVPress(window_size=16),
    "kvpress ExpectedAttention": ExpectedAttentionPress,
    "kvpress KeyDiff": KeyDiffPress,
    "kvpress TOVA": TOVAPress,
}
PEERS = (*PRESSES, "kvpress AdaKV", "kvpress AdaKV, window 16", "kvpress ChunkKV", "kvpress KVzip")


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


def same_count(mask: np.ndarray) -> np.ndarray | None:
    """Return the positions [layers,Hkv,N] of a mask where every head keeps equally many, else None."""
    counts = mask.sum(axis=2)
    if counts.min() != counts.max():
        return None
    return np.nonzero(mask)[2].reshape(*mask.shape[:2], -1)
