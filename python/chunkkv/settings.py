"""What a ChunkKV engine was built with, and N(L): the number of prompt tokens that stay in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from chunkkv.errors import ConfigError

KEEP_SCALE = 10_000
MAX_WINDOW = 128
MAX_CHUNK_SIZE = 256
BOUNDARIES = ("fixed", "delimiter")
LEADERS = ("first", "last")
SCORES = ("softmax", "logits")
GATES = ("none", "entropy")
DELIMITER_CHUNK_SIZE = 20  # where delimiters cut and no size is given: 10 would cut most sentences once more
GATE_TOKENS = 4  # what a gated chunk gives before every other chunk was asked


def keep_ratio_to_per_10k(keep_ratio: float, setting: str = "keep_ratio") -> int:
    """Return round(keep_ratio * 10000); raises ConfigError outside (0, 1] or where it rounds to zero."""
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real):
        raise ConfigError(f"{setting} is {keep_ratio!r}; give a number in (0, 1], e.g. 0.2 to keep 20 %")
    if not 0.0 < keep_ratio <= 1.0:  # also refuses NaN
        raise ConfigError(f"{setting} is {keep_ratio}; allowed is (0, 1]: 0.2 keeps 20 % of the prompt")
    per_10k = round(float(keep_ratio) * KEEP_SCALE)
    if per_10k == 0:
        raise ConfigError(f"{setting} is {keep_ratio}; the smallest keep ratio is {1 / KEEP_SCALE}")
    return per_10k


@dataclass(frozen=True)
class ChunkKVSettings:
    """Settings of the ChunkKV op, fixed when an engine is built; only the budget may vary per request.

    `keep_per_10k` is round(keep_ratio * 10000). `budget_tokens` > 0 selects budget mode and overrides the ratio.
    `max_keep_per_10k` bounds what a request may ask for. `layer_groups` lists consecutive layers that share one
    choice; an empty tuple means that groups were not assigned yet. Raises ConfigError for any invalid value.
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
        for name, low, high in (
            ("keep_per_10k", 1, KEEP_SCALE),
            ("budget_tokens", 0, 2**31 - 1),
            ("max_keep_per_10k", 1, KEEP_SCALE),
            ("window", 1, MAX_WINDOW),
            ("chunk_size", 1, MAX_CHUNK_SIZE),
            ("sinks", 0, 2**16),
            ("pooling", 1, 63),
            ("min_tokens", 1, 2**31 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} is {value!r}; give a whole number from {low} to {high}")
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; allowed is {low} to {high}")
        choices = (("boundaries", BOUNDARIES), ("leader", LEADERS), ("score", SCORES), ("gate", GATES))
        for name, allowed in choices:
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

        Integer arithmetic only (contract section 1). A budget of 0 means ratio mode.
        """
        budget = self.budget_tokens if budget_tokens is None and keep_per_10k is None else (budget_tokens or 0)
        if budget > 0:
            return min(length, max(self.min_tokens, budget))
        per_10k = self.keep_per_10k if keep_per_10k is None else keep_per_10k
        return min(length, max(self.min_tokens, length * per_10k // KEEP_SCALE))

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
