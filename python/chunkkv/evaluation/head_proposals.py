"""Which KV heads could read far, and what they and the others could keep: the settings that calibration proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkkv.errors import ConfigError
from chunkkv.evaluation.measured_heads import HeadCandidate
from chunkkv.limits import KEEP_SCALE, RANGES
from chunkkv.settings import ChunkKVSettings

BUDGET_SHARES = (0.45, 0.65, 0.85)  # of the budget, what heads that keep everything take together
HEAD_SHARES = (1 / 8, 1 / 4)  # of all heads, how many choose where not all that read can keep everything
SHORT_WINDOW, SHORT_CHUNK = 8, 10  # what other heads keep at least is the window, the sinks and a chunk
_LARGEST_SHARE = RANGES["reading_share_per_10k"][1]


def proposals_after(
    engine: ChunkKVSettings, demand: np.ndarray, keep_per_10k: int, length: int, count: int | None = None
) -> list[HeadCandidate]:
    """Return proposals for prompts that are compressed and asked later.

    Reading heads keep everything; the others keep recent tokens without any scores, or the chunks of a second reading.
    Or more heads read, keep short chunks of a second reading, and leave the others the least. The last proposals rank
    the chunks of all layers together, the chunks of all heads, and the single tokens of all heads. Raises ConfigError
    for a `count` that is no number of heads.

    Parameters
    ----------
    engine : ChunkKVSettings
        Windows, sinks and chunks.
    demand : numpy.ndarray
        What every head wants [layers,H]; those that want most read.
    keep_per_10k : int
        The keep ratio that the proposals are for, in shares of 10,000.
    length : int
        Tokens of the prompts: in shorter ones, what the others keep at least takes more of the budget.
    count : int or None, default None
        How many heads read; None proposes several numbers.
    """
    _check_count(demand, count)
    whole = [
        _keeping_all(engine, demand, number, keep_per_10k, policy)
        for number in _whole_counts(demand, keep_per_10k, count)
        for policy in ("recent", "chunks")
    ]
    shared = [
        _sharing(shortened(engine), demand, number, keep_per_10k, reread=True)
        for number in _sharing_counts(demand, count)
    ]
    rankings = _rankings(engine, keep_per_10k, demand.shape[1])
    return [*_fitting(whole, shared, keep_per_10k, length), *rankings]


def proposals_in_prompt(
    engine: ChunkKVSettings, demand: np.ndarray, keep_per_10k: int, length: int, count: int | None = None
) -> list[HeadCandidate]:
    """Return proposals for prompts that end with their question; parameters and errors as in proposals_after.

    Reading heads keep everything, and nothing is scored. Or more heads read and keep chunks, chosen by the attention of
    the last tokens, and the others are left the least.
    """
    _check_count(demand, count)
    whole = [
        _keeping_all(engine, demand, number, keep_per_10k, "recent")
        for number in _whole_counts(demand, keep_per_10k, count)
    ]
    shared = [
        _sharing(form, demand, number, keep_per_10k, reread=False)
        for number in _sharing_counts(demand, count)
        for form in dict.fromkeys((engine, shortened(engine)))
    ]
    return _fitting(whole, shared, keep_per_10k, length)


def shortened(engine: ChunkKVSettings) -> ChunkKVSettings:
    """Return the settings with a short window and short chunks, so that heads that need little may keep little."""
    window, chunk = min(engine.window, SHORT_WINDOW), min(engine.chunk_size, SHORT_CHUNK)
    return dataclasses.replace(engine, window=window, chunk_size=chunk)


def largest(demand: np.ndarray, count: int) -> list[int]:
    """Return the `count` heads of the largest demand [layers,H], numbered through all layers, ascending."""
    return sorted(np.argsort(-demand.ravel(), kind="stable")[:count].tolist())


def _check_count(demand: np.ndarray, count: int | None) -> None:
    if count is not None and not 0 < count < demand.size:
        raise ConfigError(f"heads is {count}; of {demand.size} KV heads 1 to {demand.size - 1} can read")


def _whole_counts(demand: np.ndarray, keep_per_10k: int, count: int | None) -> list[int]:
    """Return numbers of heads whose tokens alone fit into the budget."""
    room = demand.size * KEEP_SCALE / _whole_share(keep_per_10k)
    counts = {round(room * part) for part in BUDGET_SHARES} if count is None else {count}
    return sorted(number for number in counts if 0 < number < min(room, demand.size))


def _sharing_counts(demand: np.ndarray, count: int | None) -> list[int]:
    counts = {round(demand.size * part) for part in HEAD_SHARES} if count is None else {count}
    return sorted(number for number in counts if 0 < number < demand.size)


def _fitting(
    whole: Sequence[HeadCandidate], shared: Sequence[HeadCandidate], keep_per_10k: int, length: int
) -> list[HeadCandidate]:
    """Return what is what its name says: reading heads keep all of a prompt, or else they choose."""

    def keeps_all(one: HeadCandidate) -> bool:
        return one.settings is not None and one.settings.class_lengths(length, keep_per_10k)[0] == length

    return [*(one for one in whole if keeps_all(one)), *(one for one in shared if not keeps_all(one))]


def _whole_share(keep_per_10k: int) -> int:
    """Return the share, relative to what is kept, with which a head keeps everything."""
    return min(-(-KEEP_SCALE * KEEP_SCALE // keep_per_10k), _LARGEST_SHARE)


def _plain(engine: ChunkKVSettings, keep_per_10k: int) -> ChunkKVSettings:
    least = engine.window + engine.sinks + engine.chunk_size
    return dataclasses.replace(engine, min_tokens=least, keep_per_10k=keep_per_10k, budget_tokens=0)


def _rankings(engine: ChunkKVSettings, keep_per_10k: int, heads: int) -> list[HeadCandidate]:
    """Return rankings of everything together by a second reading; `heads` are the KV heads of a layer."""
    of_layers: dict[str, Any] = {"budget_split": "ranked"}
    of_heads: dict[str, Any] = {**of_layers, "heads": "each", "num_kv_heads": heads}
    tokens = dataclasses.replace(engine, chunk_size=1, pooling=1)
    return [
        HeadCandidate(name, dataclasses.replace(_plain(form, keep_per_10k), **split), True)
        for name, form, split in (
            ("one ranking of all layers", engine, of_layers),
            ("one ranking of all heads", engine, of_heads),
            ("one ranking of all heads, single tokens", tokens, of_heads),
        )
    ]


def _keeping_all(
    engine: ChunkKVSettings, demand: np.ndarray, number: int, keep_per_10k: int, policy: str
) -> HeadCandidate:
    share, others = _whole_share(keep_per_10k), "recent tokens" if policy == "recent" else "chunks"
    rest = round((demand.size * KEEP_SCALE - number * share) / (demand.size - number))
    settings = _split(_plain(engine, keep_per_10k), demand, number, (share, rest), policy)
    return HeadCandidate(f"{number} of {demand.size} heads read, others {others}", settings, policy == "chunks")


def _sharing(
    engine: ChunkKVSettings, demand: np.ndarray, number: int, keep_per_10k: int, reread: bool
) -> HeadCandidate:
    """Return a proposal that gives the others a share of zero, which means min_tokens, and reading heads the rest."""
    plain = _plain(engine, keep_per_10k)
    shares = (round(demand.size * KEEP_SCALE / number), 0)
    name = f"{number} of {demand.size} heads read chunks of {engine.chunk_size}, others {plain.min_tokens} tokens"
    return HeadCandidate(name, _split(plain, demand, number, shares, "recent"), reread)


def _split(
    plain: ChunkKVSettings, demand: np.ndarray, number: int, shares: tuple[int, int], policy: str
) -> ChunkKVSettings:
    layers, heads = demand.shape
    return dataclasses.replace(
        plain,
        budget_split="classes",
        num_kv_heads=heads,
        reading_heads=_by_layer(largest(demand, number), layers, heads),
        reading_share_per_10k=shares[0],
        local_share_per_10k=shares[1],
        local_policy=policy,
    )


def _by_layer(numbers: Sequence[int], layers: int, heads: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(n - layer * heads for n in numbers if n // heads == layer) for layer in range(layers))
