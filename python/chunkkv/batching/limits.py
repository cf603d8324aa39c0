"""What a batcher takes on, and what it is doing."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        for name, least in (("slots", 1), ("waiting", 1), ("queue_timeout_s", 0), ("request_timeout_s", 0)):
            value = getattr(self, name)
            if not value >= least or (least == 0 and not 0 < value < math.inf):
                rule = f"a whole number of at least {least}" if least else "a number of seconds above 0"
                raise ConfigError(f"{name} is {value}; give {rule}")
        if self.kv_bytes is not None and self.kv_bytes < 1:
            raise ConfigError(f"kv_bytes is {self.kv_bytes}; give a number of bytes of at least 1, or none")


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
