"""What every backend of the builder can do; `chunkkv_builder.build` knows no more of them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Protocol, TypeVar

from chunkkv_builder.progress import Progress


class PlannedBuild(Protocol):
    """A build that is read and planned; nothing has been written. Its backend alone knows the rest of it."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory whose tokenizer files belong into the engine, None where there is no tokenizer."""

    def show(self) -> None:
        """Print to standard output what would be built: the answer to --dry_run."""


Planned = TypeVar("Planned", bound=PlannedBuild)


class Backend(Protocol[Planned]):
    """Builds engine directories for one engine.

    The calls of a build come in this order: missing, plan, check, and unless it is a dry run, build. Options that only
    one backend has are arguments of its constructor.
    """

    @property
    def name(self) -> str:
        """The value of --backend, which the manifest records; one of chunkkv.engine.directory.BACKENDS."""

    def missing(self, flags: Namespace) -> list[str]:
        """Return what this machine lacks for what `flags` ask for, each to be read after "needs"; empty if nothing."""

    def plan(self, flags: Namespace, progress: Progress) -> Planned:
        """Read checkpoint and tokenizer and plan the build; nothing is written.

        Raises UsageError for a flag's value that does not fit the model, other ChunkKVError subclasses for what cannot
        be read.
        """

    def check(self, planned: Planned, progress: Progress) -> None:
        """Raise ChunkKVError subclasses for whatever would fail later, so that it fails before the long work."""

    def build(self, planned: Planned, folder: Path, progress: Progress) -> dict[str, str]:
        """Write the engine's files to `folder`, which is empty; return the versions of the packages that took part.

        Tokenizer files and the manifest are written afterwards, by build.py.
        """
