"""The scorer "reread" against kvpress's own KVzip: its scores, and its choice over all layers at equal kept tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpress import KVzipPress
from support import engines
from transformers import AutoModelForCausalLM, DynamicCache

from chunkkv import ChunkKVSession, rereading
from chunkkv.contexts.make import context_request

# Single tokens, of which the first 4 and the last always stay: KVzip keeps sinks, and has no window.
TOKENS = {"chunkkv_chunk_size": 1, "chunkkv_pooling": 1, "chunkkv_sinks": 4, "chunkkv_window": 1}
DOCUMENT = [{"role": "user", "content": "the key, of the cache is. in the token; a block of keys is the end! " * 3}]
KEEP = 0.3


class KVzip(KVzipPress):
    """KVzipPress that hands out its scores [layers,Hkv,L], and in whose cut the last token stays as its sinks do."""

    def compress_post(self, model: Any) -> None:
        self.scores = self.score_val[:, 0].clone().numpy()
        self.score_val[..., -1:] = self.score_val.amax() + 1.0
        super().compress_post(model)


@pytest.fixture
def torch_model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return the torch model of a checkpoint, of which KVzip finds the tokenizer by its directory."""
    directory = engines.checkpoint_dir("llama3", **request.param)
    yield AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()


def session_of(model: Any, **flags: Any) -> ChunkKVSession:
    """Return a session on an engine of the same checkpoint, which keeps single tokens."""
    directory = Path(model.config.name_or_path)
    return engines.session("llama3", checkpoint_dir=directory, max_seq_len=512, **TOKENS, **flags)


def zipped(model: Any, press: KVzip, ids: np.ndarray) -> None:
    """Prefill a prompt under the press, which tells every layer what it drops."""
    with torch.no_grad(), press(model):
        model.model(input_ids=torch.from_numpy(ids)[None], past_key_values=DynamicCache())


@pytest.mark.parametrize("torch_model", [{}], indirect=True)
@pytest.mark.parametrize("piece", [2_048, 70])
def test_scores_are_kvzips(torch_model: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt that is repeated whole, and of one that is repeated piece by piece."""
    monkeypatch.setattr(rereading, "PIECE_TOKENS", piece)
    session = session_of(torch_model)
    request, _, _ = context_request(session, DOCUMENT, KEEP, scorer="reread")
    assert (len(request.reread) > 1) == (piece == 70)
    prefiller, length = session.executor.blockwise_prefiller(), len(request.ids)
    cache: Any = prefiller.new_cache(1, length + max(len(one.ids) for one in request.reread))
    prefiller.fill(request.ids, cache, threading.Event())
    scores = prefiller.reread_scores(cache, length, request.reread)
    press = KVzip(compression_ratio=0.5, chunk_size=piece)
    zipped(torch_model, press, request.ids)
    assert press.scores.shape[1] == 2 and press.scores.max() > 2 * np.median(press.scores)
    np.testing.assert_allclose(np.stack([scores[part] for part in sorted(scores)]), press.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("torch_model", "heads"), [({"num_key_value_heads": 1}, "shared"), ({}, "each")], indirect=["torch_model"]
)
def test_one_ranking_keeps_what_kvzip_keeps(torch_model: Any, heads: str) -> None:
    """At equal kept tokens a ranking of all KV heads is KVzip's, and so is one of layers that have one head each."""
    session = session_of(torch_model, chunkkv_budget_split="ranked", chunkkv_heads=heads)
    found = session.inspect(DOCUMENT, KEEP, scorer="reread", as_context=True)
    context = session.compress(DOCUMENT, keep_ratio=KEEP, scorer="reread")
    length, ranked = len(context), len(found.groups)
    layers = torch_model.model.layers
    assert ranked == len(layers) * (2 if heads == "each" else 1)
    assert len(set(context.slots)) > 1 and sum(context.slots) == ranked * found.kept_tokens
    press = KVzip(compression_ratio=(ranked * (length - found.kept_tokens) + 0.5) / (ranked * length))
    zipped(torch_model, press, context.token_ids)
    for group in found.groups:
        _, of_heads, dropped = (places.numpy() for places in layers[group.leader].self_attn.masked_key_indices)
        head = group.kv_heads[0]
        assert group.kept_indices.tolist() == np.setdiff1d(np.arange(length), dropped[of_heads == head]).tolist()
