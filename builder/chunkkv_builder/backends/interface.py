"""What every backend of the builder can do; `chunkkv_builder.build` knows no more of them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from chunkkv.engine.tensorrt_build import TensorRTBuild
from chunkkv_builder.progress import Progress


@dataclass(frozen=True)
class Built:
    """What the manifest says of a build that has ended well.

    Parameters
    ----------
    versions : dict of str to str
        Version of each package that took part, by name.
    tensorrt : TensorRTBuild or None, default None
        Which TensorRT built the engines; None for other backends.
    """

    versions: dict[str, str]
    tensorrt: TensorRTBuild | None = None


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
        """The value of --backend, which the manifest records; one of chunkkv.engine.backends.BACKENDS."""

    def missing(self, flags: Namespace) -> list[str]:
        """Return what this machine lacks for what `flags` ask for, each to be read after "needs"; empty if nothing."""

    def plan(self, flags: Namespace, progress: Progress) -> Planned:
        """Read checkpoint and tokenizer and plan the build; nothing is written.

        Raises UsageError for a flag's value that does not fit the model, other ChunkKVError subclasses for what cannot
        be read.
        """

    def check(self, planned: Planned, progress: Progress) -> None:
        """Raise ChunkKVError subclasses for whatever would fail later, so that it fails before the long work."""

    def build(self, planned: Planned, folder: Path, progress: Progress) -> Built:
        """Write the engine's files to `folder`, which is empty; return what the manifest says of the build.

        Tokenizer files and the manifest are written afterwards, by build.py.
        """
