"""Finds libchunkkv, loads it, and checks that it is the one this package was written for."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from chunkkv.errors import BackendUnavailableError
from chunkkv.native.structs import ABI_VERSION
from chunkkv.native_files import HOW_TO_GET, LIBRARY_FOLDERS

LIBRARY_NAME = "libchunkkv.so"


def load_library(path: str | os.PathLike[str] | None = None) -> tuple[Path, ctypes.CDLL]:
    """Return the path of a libchunkkv and the loaded library, whose functions have their return types set.

    `path` comes first, then what CHUNKKV_LIB names, then LIBRARY_FOLDERS. Raises BackendUnavailableError
    where there is none, or one with another version of the C ABI.
    """
    library_path = _find(path)
    try:
        library = ctypes.CDLL(str(library_path))
        library.chunkkv_abi_version.restype = ctypes.c_int32
        version = library.chunkkv_abi_version()
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(f"{library_path} cannot be loaded as libchunkkv: {error}") from error
    if version != ABI_VERSION:
        raise BackendUnavailableError(
            f"{library_path} has ABI version {version}, this package needs {ABI_VERSION}: build the library again"
        )
    library.chunkkv_last_error.restype = ctypes.c_char_p
    library.chunkkv_device.restype = ctypes.c_char_p
    library.chunkkv_params_size.restype = ctypes.c_size_t
    library.chunkkv_kept_tokens.restype = ctypes.c_int64
    library.chunkkv_max_chunks.restype = ctypes.c_int64
    return library_path, library


def _find(path: str | os.PathLike[str] | None) -> Path:
    named = path or os.environ.get("CHUNKKV_LIB")
    candidates = [Path(named)] if named else [folder / LIBRARY_NAME for folder in LIBRARY_FOLDERS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise BackendUnavailableError(
        f"libchunkkv was not found at {looked}; {HOW_TO_GET}, or let CHUNKKV_LIB name a libchunkkv"
    )
