"""Shared memory and temporary folders of servers, with names by which those of dead servers are known and removed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from chunkkv.triton.server.processes import command_lines, is_running

SHM_PREFIX = re.compile(r"chunkkv[0-9a-f]{8}_")
FOLDER_PREFIX = "chunkkv-triton-"
_SHARED_MEMORY = Path("/dev/shm")


def new_shm_prefix() -> str:
    """Return a prefix for the names of one server's shared memory, which nobody can guess."""
    return f"chunkkv{secrets.token_hex(4)}_"


def remove_shared_memory(shm_prefix: str, folder: Path = _SHARED_MEMORY) -> None:
    """Remove the shared memory of a server that has ended."""
    for region in folder.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)


def sweep_shared_memory(folder: Path = _SHARED_MEMORY) -> list[str]:
    """Remove what servers left behind whose supervisor was killed; returns their prefixes.

    A server that runs has its prefix in its command line, and so have its model processes.
    """
    found = {match[0] for region in folder.glob("chunkkv*") if (match := SHM_PREFIX.match(region.name))}
    running = "\n".join(command_lines()) if found else ""
    dead = sorted(prefix for prefix in found if prefix not in running)
    for prefix in dead:
        try:
            remove_shared_memory(prefix, folder)
        except PermissionError:  # of another user
            continue
    return dead


def new_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder of this supervisor, after removing those of supervisors that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")
