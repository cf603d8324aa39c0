"""What a ChunkKV engine was built with, and N(L): the number of prompt tokens that stay in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from chunkkv.errors import ConfigError
from chunkkv.limits import CHOICES, KEEP_SCALE, KERNEL_CHOICES, RANGES

LEADERS = CHOICES["leader"]
# The chunk size of delimiter boundaries where none is given. A size of 10 would cut most sentences in two.
DELIMITER_CHUNK_SIZE = 20
# Settings that act on attention weights, and the value that goes with other scores.
_OF_ATTENTION_WEIGHTS = {"window_reduce": "mean", "head_reduce": "mean", "value_norm": "off"}
_LISTS_OF_LISTS = ("layer_groups", "reading_heads")


def keep_ratio_to_per_10k(keep_ratio: object, setting: str = "keep_ratio") -> int:
    """Return round(keep_ratio * 10000) for a real number in (0, 1].

    Raises ConfigError, which calls the value `setting`, for anything else and for a ratio that rounds to zero.
    """
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real):
        raise ConfigError(f"{setting} is {keep_ratio!r}; give a number in (0, 1], e.g. 0.2 to keep 20 %")
    if not keep_ratio <= 1.0 or keep_ratio <= 0.0:  # the first also refuses NaN
        raise ConfigError(f"{setting} is {keep_ratio}; allowed is (0, 1]: 0.2 keeps 20 % of the prompt")
    per_10k = round(float(keep_ratio) * KEEP_SCALE)
    if per_10k == 0:
        raise ConfigError(f"{setting} is {keep_ratio}; the smallest keep ratio is {1 / KEEP_SCALE}")
    return per_10k


@dataclass(frozen=True)
class ChunkKVSettings:
    """Settings of the ChunkKV op, fixed when an engine is built; only the budget may vary per request.

    The allowed values are in chunkkv.limits. Raises ConfigError for any other value and for a contradiction.

    Parameters
    ----------
    keep_per_10k : int, default 5000
        Tokens kept of every 10000 prompt tokens: round(keep_ratio * 10000). Not used where budget_tokens is set.
    budget_tokens : int, default 0
        Tokens kept of a prompt, whatever its length. 0 means that keep_per_10k decides.
    max_keep_per_10k : int, default 10000
        The largest keep_per_10k that a request may ask for.
    window : int, default 16
        Tokens at the end of the prompt whose attention scores the tokens before them. They are always kept.
    chunk_size : int, default 10
        Tokens of a chunk; with delimiter boundaries the most tokens of a chunk.
    sinks : int, default 4
        Tokens at the start of the prompt that are always kept.
    boundaries : {"fixed", "delimiter"}, default "fixed"
        Where chunks end: every chunk_size tokens, or also after a token whose text ends a clause or a line.
    pooling : int, default 5
        Neighbouring tokens over which scores are averaged, an odd number. 1 means no pooling.
    score : {"softmax", "logits", "given"}, default "softmax"
        What scores a token: its attention weights, the raw products q·k, summed, or scores from outside the engine.
    min_tokens : int, default 64
        Prompts of up to this many tokens are kept whole, and no budget goes below it.
    leader : {"first", "last"}, default "first"
        The layer of a group whose attention decides for the whole group, where `leaders` is empty.
    layer_groups : tuple of tuples of int, default ()
        Consecutive layers that share one choice of tokens. Empty means that groups were not assigned yet.
    leaders : tuple of int, default ()
        The layer of each group whose attention decides for the whole group. Empty means that `leader` says it.
    window_reduce : {"mean", "max"}, default "mean"
        How the attention weights of the window's queries become one score of a head.
    head_reduce : {"mean", "max"}, default ""
        How the scores of the query heads of a choice become one. Empty means "max" for score "softmax", and "mean"
        for the others, which have no other rule.
    value_norm : {"off", "on"}, default "off"
        Whether a head's score is multiplied by the length (L2 norm) of the token's value vector.
    heads : {"shared", "each"}, default "shared"
        Whether the KV heads of a layer and class keep the same tokens, or each its own: equally many, but for
        budget_split "ranked", where each keeps what its own chunks win.
    budget_split : {"uniform", "classes", "ranked"}, default "uniform"
        Who keeps how many tokens: every layer and head the same, two classes of KV heads different shares, or every
        layer what its chunks win in one ranking over all layers; with heads "each", every KV head.
    num_kv_heads : int, default 0
        KV heads of a layer. Present exactly where heads of a layer may keep unequal numbers of tokens: budget_split
        "classes", and "ranked" with heads "each".
    reading_heads : tuple of tuples of int, default ()
        For every layer its KV heads of the class "reading", ascending; the others are the class "local". Present
        exactly where budget_split is "classes".
    reading_share_per_10k : int, default 10000
        What a reading head keeps, relative to what the request keeps. Both shares average to one over all heads.
    local_share_per_10k : int, default 10000
        What a local head keeps, relative to what the request keeps.
    local_policy : {"chunks", "recent"}, default "recent"
        What local heads keep: the best chunks, or sinks and the last tokens.
    """

    keep_per_10k: int = 5_000
    budget_tokens: int = 0
    max_keep_per_10k: int = KEEP_SCALE
    window: int = 16
    chunk_size: int = 10
    sinks: int = 4
    boundaries: str = "fixed"
    pooling: int = 5
    score: str = "softmax"
    min_tokens: int = 64
    leader: str = "first"
    layer_groups: tuple[tuple[int, ...], ...] = ()
    leaders: tuple[int, ...] = ()
    window_reduce: str = "mean"
    head_reduce: str = ""
    value_norm: str = "off"
    heads: str = "shared"
    budget_split: str = "uniform"
    num_kv_heads: int = 0
    reading_heads: tuple[tuple[int, ...], ...] = ()
    reading_share_per_10k: int = KEEP_SCALE
    local_share_per_10k: int = KEEP_SCALE
    local_policy: str = "recent"

    def __post_init__(self) -> None:
        for name in ("layer_groups", "reading_heads"):
            object.__setattr__(self, name, tuple(tuple(numbers) for numbers in getattr(self, name)))
        object.__setattr__(self, "leaders", tuple(self.leaders))
        if self.head_reduce == "":
            rule = "max" if self.score == "softmax" else _OF_ATTENTION_WEIGHTS["head_reduce"]
            object.__setattr__(self, "head_reduce", rule)
        self._check_values()
        self._check_budget()
        self._check_score()
        self._check_leaders()
        self._check_split()

    def _check_values(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} is {value!r}; give a whole number from {low} to {high}")
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; allowed is {low} to {high}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed is {' or '.join(allowed)}")
        if self.pooling % 2 == 0:
            raise ConfigError(f"pooling is {self.pooling}; allowed are odd values (1 = off, 5 = SnapKV's)")

    def _check_budget(self) -> None:
        least = self.layer_floor
        if self.min_tokens < least:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; it must be at least window + sinks + chunk_size = {least}: "
                "raise min_tokens or lower one of the three"
            )
        if 0 < self.budget_tokens < self.min_tokens:
            raise ConfigError(
                f"budget_tokens is {self.budget_tokens}, below min_tokens = {self.min_tokens}, which is kept anyway: "
                "raise budget_tokens or lower min_tokens"
            )
        if self.keep_per_10k > self.max_keep_per_10k:
            raise ConfigError(
                f"keep_ratio {self.keep_per_10k / KEEP_SCALE} is above max_keep_ratio "
                f"{self.max_keep_per_10k / KEEP_SCALE}: raise max_keep_ratio or lower keep_ratio"
            )

    def _check_score(self) -> None:
        for name, plain in _OF_ATTENTION_WEIGHTS.items():
            if self.score != "softmax" and getattr(self, name) != plain:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which acts on attention weights, but score is {self.score!r}: "
                    f"use score 'softmax' or {name} {plain!r}"
                )

    def _check_leaders(self) -> None:
        if not self.leaders:
            return
        fits = len(self.leaders) == len(self.layer_groups)
        if not fits or any(leader not in group for leader, group in zip(self.leaders, self.layer_groups, strict=True)):
            raise ConfigError(
                f"leaders is {self.leaders} for the layer groups {self.layer_groups}; name one layer of every group, "
                "in order"
            )

    def _check_split(self) -> None:
        classes = self.budget_split == "classes"
        if bool(self.num_kv_heads) != (classes or self.ranks_heads):
            raise ConfigError(
                f"num_kv_heads is {self.num_kv_heads}, budget_split is {self.budget_split!r} and heads is "
                f"{self.heads!r}; give the KV heads of a layer exactly where they may keep unequal numbers of tokens: "
                "budget_split 'classes', or 'ranked' with heads 'each'"
            )
        if bool(self.reading_heads) != classes:
            raise ConfigError(
                f"reading_heads is {self.reading_heads!r} and budget_split is {self.budget_split!r}; the heads of the "
                "class 'reading' are listed exactly where budget_split is 'classes'"
            )
        if classes:
            _check_classes(self)
        elif (self.reading_share_per_10k, self.local_share_per_10k) != (KEEP_SCALE, KEEP_SCALE):
            raise ConfigError(
                f"reading_share_per_10k is {self.reading_share_per_10k} and local_share_per_10k is "
                f"{self.local_share_per_10k}; shares other than {KEEP_SCALE} need budget_split 'classes'"
            )
        if self.budget_split == "ranked" and any(len(group) > 1 for group in self.layer_groups):
            raise ConfigError(
                f"budget_split is 'ranked', for which every layer chooses for itself, and layer_groups is "
                f"{self.layer_groups}: use layer_reuse 1"
            )

    @property
    def keep_ratio(self) -> float:
        """The default share of a prompt that is kept."""
        return self.keep_per_10k / KEEP_SCALE

    def kept_tokens(self, length: int, keep_per_10k: int | None = None, budget_tokens: int | None = None) -> int:
        """Return N(L), the tokens kept of a prompt of `length` tokens; a request's own ratio or budget overrides.

        Integer arithmetic only (docs/method.md, section 1). A budget of 0 means ratio mode.
        """
        budget = self._budget(keep_per_10k, budget_tokens)
        if budget > 0:
            return min(length, max(self.min_tokens, budget))
        per_10k = self.keep_per_10k if keep_per_10k is None else keep_per_10k
        return min(length, max(self.min_tokens, length * per_10k // KEEP_SCALE))

    @property
    def length_classes(self) -> int:
        """How many lengths the caches of a prompt have.

        1 (uniform), 2 (classes), or one per layer (ranked); with heads "each", which are ranked apart, one per KV head.
        """
        ranked = len(self.layer_groups) * (self.num_kv_heads if self.ranks_heads else 1)
        return {"uniform": 1, "classes": 2, "ranked": ranked}[self.budget_split]

    @property
    def ranks_heads(self) -> bool:
        """Whether every KV head takes part in one ranking for itself: budget_split "ranked" with heads "each"."""
        return self.budget_split == "ranked" and self.heads == "each"

    def of_one_part(self) -> ChunkKVSettings:
        """Return settings by which one part of the cache scores: what is ranked, a layer or a KV head, for itself."""
        if self.budget_split != "ranked":
            return self
        return dataclasses.replace(self, budget_split="uniform", heads="shared", num_kv_heads=0)

    def class_lengths(
        self, length: int, keep_per_10k: int | None = None, budget_tokens: int | None = None
    ) -> tuple[int, ...]:
        """Return the tokens that every length class keeps of a prompt (docs/method.md, section 1).

        One length for budget_split "uniform"; for "classes" those of the reading and of the local heads, in that order.

        Parameters
        ----------
        length : int
            Tokens of the prompt.
        keep_per_10k, budget_tokens : int, optional
            The request's own ratio or budget, as in kept_tokens.

        Raises
        ------
        ConfigError
            For budget_split "ranked", where the lengths depend on the scores.
        """
        if self.budget_split == "ranked":
            raise ConfigError("budget_split is 'ranked', so lengths depend on the scores: use class_capacities")
        kept = self.kept_tokens(length, keep_per_10k, budget_tokens)
        if self.budget_split == "uniform":
            return (kept,)
        heads = self.num_kv_heads * len(self.reading_heads)
        reading = sum(map(len, self.reading_heads))
        local = heads - reading
        if length <= self.min_tokens or reading == 0 or local == 0:
            return kept, kept
        budget = self._budget(keep_per_10k, budget_tokens)
        if budget > 0:
            wanted = budget * self.reading_share_per_10k // KEEP_SCALE
        else:
            ratio = self.keep_per_10k if keep_per_10k is None else keep_per_10k
            wanted = length * ratio * self.reading_share_per_10k // KEEP_SCALE**2
        # The local heads keep min_tokens at least, whatever the reading heads want.
        most = (heads * kept - local * self.min_tokens) // reading
        of_reading = min(length, max(self.min_tokens, min(wanted, most)))
        return of_reading, min(length, (heads * kept - reading * of_reading) // local)

    def class_capacities(
        self, length: int, keep_per_10k: int | None = None, budget_tokens: int | None = None
    ) -> tuple[int, ...]:
        """Return the most tokens that every length class can keep; parameters as in class_lengths.

        These are the class lengths themselves but for budget_split "ranked": there one layer, or KV head, may win what
        all others leave above layer_floor.
        """
        if self.budget_split != "ranked":
            return self.class_lengths(length, keep_per_10k, budget_tokens)
        ranked, least = self.length_classes, min(length, self.layer_floor)
        total = ranked * self.kept_tokens(length, keep_per_10k, budget_tokens)
        return (min(length, total - (ranked - 1) * least),) * ranked

    @property
    def layer_floor(self) -> int:
        """The fewest tokens that a layer keeps with budget_split "ranked": sinks, window and one chunk."""
        return self.window + self.sinks + self.chunk_size

    def _budget(self, keep_per_10k: int | None, budget_tokens: int | None) -> int:
        """Return the number of tokens that decides, 0 where it is a ratio."""
        return self.budget_tokens if budget_tokens is None and keep_per_10k is None else (budget_tokens or 0)

    def check_kernels(self) -> None:
        """Raise ConfigError for a word that the native kernels, and so the plugins, do not compute."""
        for name, words in KERNEL_CHOICES.items():
            if getattr(self, name) not in words:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which the CUDA kernels do not compute: give "
                    f"{' or '.join(words)}, or use what runs without them (backend onnxruntime, chunkkv.reference)"
                )

    def with_score(self, score: str) -> ChunkKVSettings:
        """Return settings that choose in the same way by another score, "logits" or "given"; raises ConfigError."""
        return dataclasses.replace(self, score=score, window_reduce="mean", head_reduce="mean", value_norm="off")

    def leader_of(self, group: tuple[int, ...]) -> int:
        """Return the layer of `group` whose attention decides what the whole group keeps."""
        if self.leaders:
            return next(leader for leader in self.leaders if leader in group)
        return group[0] if self.leader == "first" else group[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = dataclasses.asdict(self)
        for name in _LISTS_OF_LISTS:
            values[name] = [list(numbers) for numbers in values[name]]
        values["leaders"] = list(self.leaders)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChunkKVSettings:
        """Read settings written by to_dict; raises ConfigError for unknown, missing or invalid entries."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"unknown chunkkv setting {unknown[0]!r}; known are {', '.join(sorted(names))}")
        if missing := sorted(names - set(values)):
            raise ConfigError(f"chunkkv setting {missing[0]!r} is missing")
        groups, heads, leaders = (values[name] for name in (*_LISTS_OF_LISTS, "leaders"))
        if not _is_list_of_lists(groups) or not all(groups):
            raise ConfigError(f"layer_groups is {groups!r}; give a list of non-empty lists of layer numbers")
        if not _is_list_of_lists(heads):
            raise ConfigError(f"reading_heads is {heads!r}; give a list of lists of head numbers, one per layer")
        if not _is_list_of_lists([leaders]):
            raise ConfigError(f"leaders is {leaders!r}; give a list of layer numbers")
        return cls(**values)


def _is_list_of_lists(values: object) -> bool:
    """Return whether `values` is a list of lists of whole numbers."""
    return isinstance(values, list) and all(
        isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        for numbers in values
    )


def _check_classes(settings: ChunkKVSettings) -> None:
    """Raise ConfigError unless every KV head of every layer is in one class and the shares average to one."""
    groups, listed, count = settings.layer_groups, settings.reading_heads, settings.num_kv_heads
    layers = max((layer for group in groups for layer in group), default=len(listed) - 1) + 1
    if len(listed) != layers:
        raise ConfigError(f"reading_heads lists {len(listed)} layers, layer_groups {layers}: list every layer's heads")
    for layer, heads in enumerate(listed):
        if list(heads) != sorted(set(heads)) or not all(0 <= head < count for head in heads):
            raise ConfigError(
                f"reading_heads of layer {layer} is {heads}; list heads from 0 to {count - 1} once, in ascending order"
            )
    for group in groups:
        if len({listed[layer] for layer in group}) > 1:
            raise ConfigError(
                f"the layer group {group} mixes partitions of heads, {[listed[layer] for layer in group]}: layers that "
                "share one choice must have the same reading_heads"
            )
    all_heads, reading = count * len(listed), sum(map(len, listed))
    shares = settings.reading_share_per_10k, settings.local_share_per_10k
    total = reading * shares[0] + (all_heads - reading) * shares[1]
    if abs(total - all_heads * KEEP_SCALE) >= KEEP_SCALE:
        raise ConfigError(
            f"reading_share_per_10k {shares[0]} of {reading} heads and local_share_per_10k {shares[1]} of "
            f"{all_heads - reading} average to {total / all_heads:.1f}; they must average to {KEEP_SCALE}"
        )
