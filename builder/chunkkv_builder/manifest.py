"""Writes an engine directory so that it is complete or absent, whatever ends the build.

A build writes to `<output_dir>.partial-<process id>`, writes the manifest last, and renames the folder. An engine that
is replaced waits as `<output_dir>.replaced-<process id>` between two renames. The build holds a lock on these folders
while it lives. So the next build can tell what a killed one has left: it removes a partial folder without a lock, and
gives a replaced engine its name back where the new one did not come.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import chunkkv
from chunkkv.engine.directory import MANIFEST_FILE, PARTIAL_MARK, FileRecord, Manifest, hash_file
from chunkkv.engine.tensorrt_build import TensorRTBuild
from chunkkv.errors import ConfigError, EngineError
from chunkkv.files import errors_name_target
from chunkkv_builder.progress import Progress

_locks: ModuleType | None
try:
    import fcntl as _locks
except ImportError:  # no such locks on this system: what a killed build leaves must be removed by hand
    _locks = None

_REPLACED_MARK = ".replaced-"  # where the old engine waits while the new one takes its name
_LOCK_ATTEMPTS = 5
_FILE_MANAGERS_FILES = re.compile(r"\.DS_Store|\.localized|\._.*|\.directory|Thumbs\.db|desktop\.ini", re.IGNORECASE)
Warn = Callable[[str], None]


def write_manifest(
    folder: Path,
    backend: str,
    versions: Mapping[str, str],
    progress: Progress,
    tensorrt: TensorRTBuild | None = None,
) -> None:
    """Force every file in `folder` to disk and write manifest.json, without which no engine loads.

    Parameters
    ----------
    folder : Path
        The engine directory, with all its other files.
    backend : str
        The engine that runs it.
    versions : mapping
        Versions of the packages that took part in the build, by name; Python's and this package's are added.
    progress : Progress
        Shows the stage "checksums".
    tensorrt : TensorRTBuild or None, default None
        Which TensorRT built the engines; None for other backends than TensorRT.
    """
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE)
    progress.stage("checksums", sum(path.stat().st_size for path in files), unit="bytes")
    records: dict[str, FileRecord] = {path.name: hash_file(path, progress.advance, sync=True) for path in files}
    path = folder / MANIFEST_FILE
    used = {"chunkkv": chunkkv.__version__, "python": platform.python_version(), **versions}
    path.write_text(Manifest(backend, used, records, tensorrt).to_json(), encoding="utf-8")
    hash_file(path, sync=True)
    _sync_directory(folder)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ConfigError unless `target` is free, empty, or an engine that `overwrite` allows to replace."""
    target = Path(os.path.realpath(target))
    try:
        str(target).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"output_dir {os.fsencode(target)!r} is not UTF-8, which onnx needs; give another") from None
    if not os.path.lexists(target):
        parent = next(path for path in target.parents if path.exists())
        if not parent.is_dir():
            raise ConfigError(f"output_dir {target} would lie in {parent}, which is no directory; give another one")
        return
    if Path.cwd().is_relative_to(target):
        raise ConfigError(f"output_dir {target} is or holds the current directory; give a new directory")
    if not target.is_dir():
        raise ConfigError(f"output_dir {target} exists and is not a directory; give another one")
    present = {path.name for path in target.iterdir() if not _is_made_by_file_managers(path)}
    if not present:
        return
    try:
        foreign = sorted(present - {*Manifest.read(target / MANIFEST_FILE).files, MANIFEST_FILE})
    except EngineError:
        raise ConfigError(
            f"output_dir {target} is not empty and holds no engine of chunkkv-build; give an empty or new directory"
        ) from None
    if foreign:
        raise ConfigError(
            f"output_dir {target} holds an engine and {foreign[0]!r}, which is not part of it: "
            "move that away or give another directory"
        )
    if not overwrite:
        raise ConfigError(f"output_dir {target} holds an engine already; give --overwrite or another directory")


def _is_made_by_file_managers(path: Path) -> bool:
    """Return whether a file came by looking into its folder, so that it may go with it."""
    return _FILE_MANAGERS_FILES.fullmatch(path.name) is not None and path.is_file()


@contextmanager
def staged_output(
    output_dir: str | os.PathLike[str], overwrite: bool = False, warn: Warn = lambda text: None
) -> Iterator[Path]:
    """Yield an empty directory beside `output_dir` that takes its name when the block ends well.

    Where the block raises, Ctrl-C included, it is removed; where the process is killed, the next build removes it.
    `warn` is told of an old engine that cannot be removed, as in a folder that is read-only.
    Raises ConfigError for an output directory that may not be written, see check_target.
    """
    target = Path(os.path.realpath(output_dir))
    if target.parent.is_dir():
        _clean_up(target)  # first, because it may bring an engine back
    check_target(target, overwrite)
    with errors_name_target(output_dir, _stage_name(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage, lock = _new_stage(target)
    try:
        with errors_name_target(output_dir, stage):
            yield stage
            if not (stage / MANIFEST_FILE).is_file():
                raise EngineError(f"{stage} has no {MANIFEST_FILE}; nothing is put in place of {target}")
            _publish(stage, target, overwrite, warn)
    finally:
        _remove(stage)
        if lock is not None:
            os.close(lock)


def _publish(stage: Path, target: Path, overwrite: bool, warn: Warn) -> None:
    """Rename `stage` to `target`; an engine that is replaced keeps its name until the new one is complete."""
    check_target(target, overwrite)  # another build may have finished meanwhile
    if not target.is_dir():
        os.rename(stage, target)
    elif all(map(_is_made_by_file_managers, target.iterdir())):
        for file in target.iterdir():
            file.unlink()
        target.rmdir()  # not every system renames over an empty directory
        os.rename(stage, target)
    else:
        _replace(stage, target, warn)
    _sync_directory(target.parent)


def _replace(stage: Path, target: Path, warn: Warn) -> None:
    lock = _try_lock(target)  # tells other builds that what lies aside is not left over
    aside = target.with_name(f"{target.name}{_REPLACED_MARK}{os.getpid()}")
    try:
        os.rename(target, aside)
        os.rename(stage, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        if target.exists():
            _remove(aside)
            if aside.exists():
                warn(f"the old engine could not be removed and stays as {aside}: remove it")
        if lock is not None:
            os.close(lock)


def _stage_name(target: Path) -> Path:
    return target.with_name(f"{target.name}{PARTIAL_MARK}{os.getpid()}")


def _new_stage(target: Path) -> tuple[Path, int | None]:
    """Create the directory to build in and lock it where the system can, so that other builds see that it is alive."""
    stage = _stage_name(target)
    for _ in range(_LOCK_ATTEMPTS):
        try:
            stage.mkdir()
            lock = _try_lock(stage)
            with suppress(FileNotFoundError):
                # Another build's clean-up may have come before the lock; then the name is gone.
                if lock is None or os.path.samestat(os.fstat(lock), stage.stat()):
                    return stage, lock
        except FileExistsError:
            break
        except BaseException:
            with suppress(OSError):
                stage.rmdir()  # still empty, unless it is another build's
            raise
        if lock is not None:
            os.close(lock)
    raise EngineError(f"{stage} exists: another build may be writing it; remove it if none is")


def _clean_up(target: Path) -> None:
    """Remove what killed builds of `target` left; give an engine its name back that was being replaced."""
    marks = re.compile(re.escape(target.name) + f"({re.escape(PARTIAL_MARK)}|{re.escape(_REPLACED_MARK)})" + r"\d+")
    for path in sorted(target.parent.iterdir()):
        match = marks.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        lock = _try_lock(path)
        if lock is None:
            continue
        with suppress(FileNotFoundError):
            if match[1] == _REPLACED_MARK and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove `folder` as far as possible, also where Ctrl-C comes in between."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _try_lock(folder: Path) -> int | None:
    """Return a handle that holds the lock on `folder`, None where that cannot be had."""
    if _locks is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        _locks.flock(handle, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _sync_directory(folder: Path) -> None:
    with suppress(OSError):  # some systems and file systems cannot open a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
