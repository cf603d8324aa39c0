"""Writes files and folders whole or not at all: under a temporary name beside the target, which is then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write, which name no file


@contextmanager
def errors_name_target(target: str | os.PathLike[str], temporary: Path) -> Iterator[None]:
    """Let an OSError of a write name the target, not the temporary file or nothing at all.

    Parameters
    ----------
    target : str or path
        What the user asked for.
    temporary : Path
        What is written in its place meanwhile, a file or a folder.

    Raises
    ------
    OSError
        With `target` as its file name, where the block raises one that names `temporary`, something in it or a folder
        above it, or one that names nothing because the disk is full. Others are passed on.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            is_of_target = error.errno in _NO_ROOM
        else:
            path = Path(os.fsdecode(error.filename))
            is_of_target = path == temporary or temporary in path.parents or path in temporary.parents
        if not is_of_target:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` to `path` so that a reader sees the old file or the complete new one, never a part.

    Nothing is forced to disk: a power failure shortly after the call may lose the new file.

    Parameters
    ----------
    path : str or path
        The file. Its folder must exist; a file that is there already is replaced.
    content : bytes or str
        What it shall hold; text is written as UTF-8 with the line ends it has.

    Raises
    ------
    OSError
        Where the file cannot be written. The old file is then unchanged, and the temporary one removed.
    """
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a file to write to, which takes the name `path` when the block ends well, as in write_whole.

    Parameters
    ----------
    path : str or path
        The file. Its folder must exist; a file that is there already is replaced.

    Raises
    ------
    OSError
        Where the file cannot be written. The old file is then unchanged, and the temporary one removed.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        with errors_name_target(path, temporary):
            with temporary.open("xb") as file:
                yield file
            os.replace(temporary, target)
    except BaseException:  # Ctrl-C included
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that takes the name `target` when the block ends well, and is removed when it raises.

    Parameters
    ----------
    target : str or path
        Must not exist yet, or be an empty folder. Missing parents are made, symbolic links are followed.

    Raises
    ------
    OSError
        Where the folder cannot be made or renamed.
    """
    named, target = target, Path(os.path.realpath(target))
    temporary = _temporary_name(target)
    with errors_name_target(named, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with errors_name_target(named, temporary):
            yield temporary
            if target.is_dir():
                target.rmdir()  # not every system renames over an empty folder
            temporary.rename(target)
    except BaseException:  # Ctrl-C included
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary_name(target: Path) -> Path:
    # The same folder, because a rename is atomic only within one file system; the random part is for threads, and for
    # processes of the same number in different containers.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
