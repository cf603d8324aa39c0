"""What a batcher takes on, and what it is doing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from chunkkv.errors import ConfigError


@dataclass(frozen=True)
class BatchingLimits:
    """What a batcher takes on; raises ConfigError for a value out of range.

    Parameters
    ----------
    slots : int, default 8
        Answers that grow at once.
    waiting : int, default 64
        Requests that may queue beside them.
    queue_timeout_s : float, default 60.0
        Seconds that a request may wait for a slot.
    request_timeout_s : float, default 600.0
        Seconds that a request may take, waiting included.
    kv_bytes : int or None, default None
        Bytes of all KV caches together; None allocates as needed.
    """

    slots: int = 8
    waiting: int = 64
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "waiting"):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a whole number of at least 1")
        for name in ("queue_timeout_s", "request_timeout_s"):
            if not _is_positive(getattr(self, name), whole=False):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a number of seconds above 0")
        if self.kv_bytes is not None and not _is_positive(self.kv_bytes):
            raise ConfigError(f"kv_bytes is {self.kv_bytes!r}; give a whole number of bytes of at least 1, or none")


def _is_positive(value: object, whole: bool = True) -> bool:
    """Return whether a value is a finite number above 0, a whole one where `whole`; True and False are no numbers."""
    if isinstance(value, bool):
        return False
    if isinstance(value, Integral):
        return int(value) > 0
    return not whole and isinstance(value, Real) and 0 < float(value) < math.inf


@dataclass(frozen=True)
class Load:
    """What a batcher is doing.

    Parameters
    ----------
    active : int
        Answers that grow.
    waiting : int
        Requests in the queue.
    kv_bytes_used : int
        Bytes of KV cache that hold tokens.
    kv_bytes_allocated : int
        Bytes of all KV caches.
    """

    active: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_allocated: int
