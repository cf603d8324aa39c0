"""What a suite is: one kind of task, its cells (groups of examples) and how an example of a cell is made."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.prompt_writer import PromptWriter
from chunkkv.evaluation.texts.questions import Example
from chunkkv.settings import ChunkKVSettings

Cell = dict[str, Any]  # what one group of examples has in common: length, depth, …


@dataclass(frozen=True)
class Suite:
    """One kind of task.

    Parameters
    ----------
    name : str
        What --suite calls it.
    about : str
        The task in a few words.
    cells : Callable[[Sequence[int], ChunkKVSettings], list[Cell]]
        Returns its groups of examples for some prompt lengths (in tokens) and an engine's settings. A cell with "line"
        is a single example, that of a file.
    make : Callable[[PromptWriter, Cell], Example]
        Writes one example of a cell.
    modes : tuple[str, ...], default ("in", "after")
        The modes that make sense: the question in the compressed prompt, or after it.
    general : bool, default False
        Whether it needs a wording for general models.
    content : str, default ""
        Fingerprint of a file's examples.
    """

    name: str
    about: str
    cells: Callable[[Sequence[int], ChunkKVSettings], list[Cell]]
    make: Callable[[PromptWriter, Cell], Example]
    modes: tuple[str, ...] = ("in", "after")
    general: bool = False
    content: str = ""

    def seed(self, seed: int, cell: Cell, index: int) -> list[int]:
        """Return the seed of one example of a run whose seed is `seed`; it is the same in both modes."""
        return [seed, zlib.crc32(self.name.encode()), zlib.crc32(repr(sorted(cell.items())).encode()), index]


def check_suite(suite: Suite, wording_is_general: bool) -> None:
    """Raise ConfigError for a suite that the wording has no templates for."""
    if suite.general and not wording_is_general:
        raise ConfigError(f"suite {suite.name} has no wording 'needle'; give --wording english, or leave it out")
