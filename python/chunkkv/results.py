"""What a session returns: answers, stream events, statistics, and the choice ChunkKV made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.sampling import TokenChoice
from chunkkv.settings import ChunkKVSettings


@dataclass(frozen=True)
class RequestStatistics:
    """Counts and times of one prompt.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of the prompt, those of its context included.
    context_tokens : int
        How many of them belong to a context, so that they were not prefilled again; 0 without one.
    kept_tokens : int
        How many of the prompt's tokens stayed in the cache.
    new_tokens : int
        Tokens of the answer, the end token included.
    ttft_s : float
        Seconds from the call to the first token; compression, and the prompts that were served before, included.
    tpot_s : float or None
        Mean seconds of the decode steps that this prompt took part in; None for an answer of a single token.
    prefill_s : float
        Seconds of prefill.
    compress_s : float
        Seconds of compression; 0 where the engine compacts within prefill, so that `prefill_s` includes it.
    cache_bytes : int
        Bytes of KV cache that the kept prompt tokens take.
    full_cache_bytes : int
        Bytes that the whole prompt would take.
    allocated_cache_bytes : int
        Bytes that decode held for this prompt: kept tokens and room for new ones, of the longest prompt of its batch.
    peak_cache_bytes : int
        The same and the keys and values that were alive beside it during prefill: the whole prompt's in all layers, or
        in one layer-reuse group where the engine compacts within prefill.
    """

    prompt_tokens: int
    context_tokens: int
    kept_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    prefill_s: float
    compress_s: float
    cache_bytes: int
    full_cache_bytes: int
    allocated_cache_bytes: int
    peak_cache_bytes: int


@dataclass(frozen=True)
class GenerationResult:
    """The answer to one prompt.

    Parameters
    ----------
    text : str
        The answer without special tokens and stop strings; empty for an engine without a tokenizer.
    token_ids : tuple of int
        Every generated token, the end token included.
    finish_reason : str
        "stop" (end token or stop string), "length" or "cancelled".
    logprobs : tuple of float or None
        Natural logarithm of each token's probability; None unless SamplingParams asked for it.
    statistics : RequestStatistics
        Counts and times.
    top_logprobs : tuple of tuple of (int, float) or None, default None
        For each token the likeliest ones at its place with their log probabilities; None unless SamplingParams asked.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None
    statistics: RequestStatistics
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StreamEvent:
    """A piece of one prompt's answer.

    Parameters
    ----------
    row : int
        Which prompt of the call, from 0.
    text : str
        New text; may be empty while a character or a stop string is incomplete.
    token_ids : tuple of int
        New tokens.
    finished : GenerationResult or None, default None
        The whole answer, in the last event of a row.
    choices : tuple of TokenChoice, default ()
        The new tokens with their log probabilities, where SamplingParams asked for them.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    finished: GenerationResult | None = None
    choices: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True)
class GroupChoice:
    """What heads of one layer-reuse group keep of a prompt of L tokens, by one choice.

    Parameters
    ----------
    layers : tuple of int
        The layers of the group.
    leader : int
        The layer whose attention decides.
    kept_indices : numpy.ndarray
        Kept positions [N] int32, ascending.
    token_scores : numpy.ndarray
        Score of every token [L] float32; zeros for heads that keep recent tokens.
    chunk_starts : numpy.ndarray
        Position of each chunk's first token, ascending; empty where nothing was scored.
    head_class : {"all", "reading", "local"}, default "all"
        The class of these heads.
    kv_heads : tuple of int, default ()
        The KV heads of each layer that the choice is for; all heads where the engine does not split them.
    """

    layers: tuple[int, ...]
    leader: int
    kept_indices: np.ndarray
    token_scores: np.ndarray
    chunk_starts: np.ndarray
    head_class: str = "all"
    kv_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """One prompt as ChunkKV sees it.

    Parameters
    ----------
    tokens : tuple of str
        The prompt's tokens as text, or their ids where there is no tokenizer.
    token_ids : tuple of int
        The prompt's token ids.
    kept_tokens : int
        How many of them stay; the mean over all heads where the budget is split.
    settings : ChunkKVSettings
        What the engine was built with.
    groups : tuple of GroupChoice
        The choice of every layer-reuse group; one entry for each class of heads and for each head that has its own.
    scorer : str, default "window"
        What chose: the attention of the prompt's last tokens, or "reread", of a second reading.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    kept_tokens: int
    settings: ChunkKVSettings
    groups: tuple[GroupChoice, ...]
    scorer: str = "window"

    def keeping_shares(self) -> np.ndarray:
        """Return for every token the share of the KV heads of all layers that keep it.

        Returns
        -------
        numpy.ndarray
            Shares [L] float64 in [0, 1].
        """
        weights = [len(group.layers) * max(len(group.kv_heads), 1) for group in self.groups]
        shares = np.zeros(len(self.token_ids))
        for group, weight in zip(self.groups, weights, strict=True):
            shares[group.kept_indices] += weight
        return shares / sum(weights)
