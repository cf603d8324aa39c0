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
    slots : int or None, default None
        Prompts and answers in work at once. None takes 256 on an engine that gives each row the memory it needs, as
        ONNX Runtime does, and as many as the engine has rows (max_batch_size) on others.
    waiting : int, default 64
        Requests that may queue beside them.
    queue_timeout_s : float, default 60.0
        Seconds that a request may wait for a slot.
    request_timeout_s : float, default 600.0
        Seconds that a request may take, waiting included.
    kv_bytes : int or None, default None
        Bytes of all KV caches together, those of prompts in work included. None takes 80 % of the memory that is free
        at the start for an engine on the CPU, and allocates as needed for others.
    """

    slots: int | None = None
    waiting: int = 64
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "waiting"):
            if not (_is_positive(getattr(self, name)) or (name == "slots" and self.slots is None)):
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
        Prompts that are prefilled and answers that grow.
    waiting : int
        Requests in the queue.
    kv_bytes_used : int
        Bytes of KV cache that hold tokens.
    kv_bytes_allocated : int
        Bytes of KV cache that are set aside for requests in work, up to the end of their answers.
    kv_bytes_bound : int or None, default None
        Most bytes of all KV caches; None where they are allocated as needed.
    slots : int, default 0
        Most requests in work at once.
    """

    active: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_allocated: int
    kv_bytes_bound: int | None = None
    slots: int = 0
