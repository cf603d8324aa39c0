"""What contexts and scorers need of the engine that runs them."""

from __future__ import annotations

from typing import Any, Protocol

from chunkkv.executors.interface import Executor
from chunkkv.requests import Limits
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer


class Engine(Protocol):
    """What a context needs of the engine that made it; a ChunkKVSession is one."""

    @property
    def executor(self) -> Executor[Any]:
        """Runs the engine's graphs."""

    @property
    def settings(self) -> ChunkKVSettings | None:
        """What the engine was built with."""

    @property
    def limits(self) -> Limits:
        """The sizes that the engine was built for."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns text into tokens."""

    @property
    def engine_sha256(self) -> str:
        """Digest of the engine's files; empty for an engine that was not loaded from a directory."""
