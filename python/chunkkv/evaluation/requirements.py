"""What evaluation needs of an engine: ChunkKV settings, a tokenizer, and the queries of the layers that score."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from chunkkv.engine.directory import MANIFEST_FILE
from chunkkv.errors import ConfigError, EngineMismatchError
from chunkkv.session import ChunkKVSession
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer


def settings_and_tokenizer(session: ChunkKVSession) -> tuple[ChunkKVSettings, Tokenizer]:
    """Return the engine's ChunkKV settings and its tokenizer; raises EngineMismatchError where one is missing."""
    if session.settings is None:
        raise EngineMismatchError("this engine was built without ChunkKV; build it with --chunkkv")
    if session.tokenizer is None:
        raise EngineMismatchError("this engine was built without a tokenizer, and the suites are texts")
    return session.settings, session.tokenizer


def engine_fingerprint(engine_dir: Path) -> str:
    """Return the SHA-256 of an engine's manifest: results of two engines are never mixed."""
    return hashlib.sha256((engine_dir / MANIFEST_FILE).read_bytes()).hexdigest()


def check_queries(layer: int, window: int, layers: Collection[int], engine_window: int) -> None:
    """Check that an engine gives the last `window` queries of a layer.

    Parameters
    ----------
    layer : int
        The layer whose queries score the tokens.
    window : int
        How many of the last queries are needed.
    layers : Collection[int]
        The layers whose queries the engine gives: its group leaders.
    engine_window : int
        How many of the last queries the engine gives per layer.

    Raises
    ------
    ConfigError
        Where the layer is not among `layers`, or `window` is larger than `engine_window`.
    """
    if layer not in layers:
        raise ConfigError(
            f"layer {layer} scores for its group, but the engine gives the queries of layers "
            f"{', '.join(map(str, layers))} only: build it with --chunkkv_layer_reuse 1"
        )
    if window > engine_window:
        raise ConfigError(
            f"window is {window}, the engine gives the last {engine_window} queries: build it with "
            f"--chunkkv_window {window} or more, or ask for less"
        )
