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
# How many tokens a gated chunk contributes at its turn; its other tokens rank behind those of all other chunks.
GATE_TOKENS = 4


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
    window : int, default 32
        Tokens at the end of the prompt whose attention scores the tokens before them. They are always kept.
    chunk_size : int, default 10
        Tokens of a chunk; with delimiter boundaries the most tokens of a chunk.
    sinks : int, default 4
        Tokens at the start of the prompt that are always kept.
    boundaries : {"fixed", "delimiter"}, default "fixed"
        Where chunks end: every chunk_size tokens, or also after a token whose text ends a clause or a line.
    pooling : int, default 5
        Neighbouring tokens over which scores are averaged, an odd number. 1 means no pooling.
    score : {"softmax", "logits"}, default "softmax"
        What scores a token: its attention weights, averaged, or the raw products q·k, summed.
    gate : {"none", "entropy"}, default "none"
        "entropy" takes only GATE_TOKENS tokens, at first, of a high-scoring chunk whose score comes from few tokens.
    min_tokens : int, default 64
        Prompts of up to this many tokens are kept whole, and no budget goes below it.
    leader : {"first", "last"}, default "last"
        The layer of a group whose attention decides for the whole group.
    layer_groups : tuple of tuples of int, default ()
        Consecutive layers that share one choice of tokens. Empty means that groups were not assigned yet.
    """

    keep_per_10k: int = 5_000
    budget_tokens: int = 0
    max_keep_per_10k: int = KEEP_SCALE
    window: int = 32
    chunk_size: int = 10
    sinks: int = 4
    boundaries: str = "fixed"
    pooling: int = 5
    score: str = "softmax"
    gate: str = "none"
    min_tokens: int = 64
    leader: str = "last"
    layer_groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
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
        if self.gate == "entropy" and self.score == "logits":
            raise ConfigError("gate is 'entropy', which needs shares of attention: use score 'softmax' or gate 'none'")
        least = self.window + self.sinks + self.chunk_size
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
        object.__setattr__(self, "layer_groups", tuple(tuple(group) for group in self.layer_groups))

    @property
    def keep_ratio(self) -> float:
        """The default share of a prompt that is kept."""
        return self.keep_per_10k / KEEP_SCALE

    def kept_tokens(self, length: int, keep_per_10k: int | None = None, budget_tokens: int | None = None) -> int:
        """Return N(L), the tokens kept of a prompt of `length` tokens; a request's own ratio or budget overrides.

        Integer arithmetic only (docs/method.md, section 1). A budget of 0 means ratio mode.
        """
        budget = self.budget_tokens if budget_tokens is None and keep_per_10k is None else (budget_tokens or 0)
        if budget > 0:
            return min(length, max(self.min_tokens, budget))
        per_10k = self.keep_per_10k if keep_per_10k is None else keep_per_10k
        return min(length, max(self.min_tokens, length * per_10k // KEEP_SCALE))

    def check_kernels(self) -> None:
        """Raise ConfigError for a word that the native kernels, and so the plugins, do not compute."""
        for name, words in KERNEL_CHOICES.items():
            if getattr(self, name) not in words:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which the CUDA kernels do not compute: give "
                    f"{' or '.join(words)}, or use what runs without them (backend onnxruntime, chunkkv.reference)"
                )

    def leader_of(self, group: tuple[int, ...]) -> int:
        """Return the layer of `group` whose attention decides what the whole group keeps."""
        return group[0] if self.leader == "first" else group[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = dataclasses.asdict(self)
        values["layer_groups"] = [list(group) for group in self.layer_groups]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChunkKVSettings:
        """Read settings written by to_dict; raises ConfigError for unknown, missing or invalid entries."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"unknown chunkkv setting {unknown[0]!r}; known are {', '.join(sorted(names))}")
        if missing := sorted(names - set(values)):
            raise ConfigError(f"chunkkv setting {missing[0]!r} is missing")
        groups = values["layer_groups"]
        if not isinstance(groups, list) or not all(
            isinstance(group, list) and group and all(isinstance(layer, int) for layer in group) for group in groups
        ):
            raise ConfigError(f"layer_groups is {groups!r}; give a list of non-empty lists of layer numbers")
        return cls(**{**values, "layer_groups": tuple(tuple(group) for group in groups)})
