"""Kernels that TensorRT for RTX compiles on the user's GPU, kept in a file for the next process.

TensorRT for RTX compiles an engine's kernels when its contexts are made and when new shapes run. The file lies beside
the engine directory, not in it: the manifest lists everything that a directory holds.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from pathlib import Path
from typing import Any

from chunkkv.engine.directory import MANIFEST_FILE, hash_file
from chunkkv.files import write_whole
from chunkkv.gpu.cuda_runtime import Gpu

_DIGITS = 12  # of the digest in the file's name


class JitCache:
    """One tensorrt_rtx.IRuntimeCache for all contexts of an engine directory. Thread safe.

    A cache that cannot be read or written costs time in the next process, nothing else: it is told in a
    RuntimeWarning, once.

    Parameters
    ----------
    path : Path
        The file. It need not exist; what TensorRT for RTX does not take from it, because the driver changed for
        example, is compiled again and replaces it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._cache: Any = None
        self._content = b""  # of the file, as far as this process knows
        self._usable = True

    def attach(self, config: Any) -> None:
        """Give the cache to a tensorrt_rtx.IRuntimeConfig, before a context is made with it."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._load()
            config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled so far, if the file does not hold it yet."""
        with self._lock:
            if self._cache is None or not self._usable:
                return
            content = bytes(self._cache.serialize())
            if content == self._content:
                return
            try:
                write_whole(self.path, content)
            except OSError as error:
                self._give_up(f"{self.path} cannot be written ({error.strerror or error})")
            else:
                self._content = content

    def _load(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._give_up(f"{self.path} cannot be read ({error.strerror or error})")
            return
        if self._cache.deserialize(content):
            self._content = content

    def _give_up(self, reason: str) -> None:
        self._usable = False
        warnings.warn(f"every process compiles its kernels again: {reason}", RuntimeWarning, stacklevel=4)


def jit_cache_path(engine_dir: Path, version: str, gpu: Gpu) -> Path:
    """Return where the kernels of one build of an engine lie, for one TensorRT for RTX and one kind of GPU.

    Parameters
    ----------
    engine_dir : Path
        The engine directory, which has a manifest.
    version : str
        Version of TensorRT for RTX.
    gpu : Gpu
        The GPU that the kernels are compiled for.
    """
    directory = Path(os.path.realpath(engine_dir))  # a name is needed: the given path may be "."
    build = hash_file(directory / MANIFEST_FILE).sha256  # the manifest lists the digests of all files
    key = "\n".join((build, version, gpu.name, gpu.compute_capability))
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGITS]
    return directory.with_name(f"{directory.name}.jit-cache-{digest}")
