"""Exceptions of ChunkKV-TRT: every message names what was given, what is allowed and what to change."""

from __future__ import annotations


class ChunkKVError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(ChunkKVError, ValueError):
    """A setting, flag or model configuration is outside what is supported."""


class CheckpointError(ChunkKVError):
    """A checkpoint directory cannot be read: missing, damaged or misshaped files or tensors."""


class EngineError(ChunkKVError):
    """An engine directory is incomplete, damaged or was changed after it was built."""


class EngineMismatchError(EngineError):
    """An engine was built by another version, for another backend or with other settings than asked for."""


class BackendUnavailableError(ChunkKVError):
    """The backend asked for cannot be used on this machine."""


class BuildError(ChunkKVError):
    """An engine's builder refused a graph, or could not build it."""


class EngineRunError(ChunkKVError, RuntimeError):
    """An engine or its device failed while it ran."""


class CacheFullError(ChunkKVError):
    """The KV cache has no room now; the same request may fit once others have ended."""


class RequestError(ChunkKVError, ValueError):
    """A generation request is invalid; it is refused before any work is done."""


class OverloadedError(ChunkKVError):
    """A server's queue is full, or it is going down: ask again later."""


class RequestTimeoutError(ChunkKVError):
    """A request waited or ran longer than the server allows."""


class NativeError(ChunkKVError, RuntimeError):
    """The native library could not be used, or a launch failed; the message holds its own words."""


class NativeArgumentError(NativeError, ValueError):
    """An argument of a native op is out of range, of the wrong type or shape, or has no kernel."""


class ProfileError(ChunkKVError):
    """A profiler could not run, or its file cannot be read or says nothing about the stages."""
