"""What an engine is to the benchmark: it prepares its model, and runs a case in a process of its own.

The modules in benchmarks/cpu/engines run in the environments of their engines, so they import nothing but that engine,
NumPy and this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Case:
    """One measurement of one engine.

    Parameters
    ----------
    work : Path
        Folder with the prepared models.
    model : Path
        The model's GGUF file.
    weights : str
        How the weights are stored, as the engine names it.
    keep : int
        Percent of a prompt's tokens that stay in the cache while tokens are generated; 100 is the full cache.
    threads : int
        Threads of the engine.
    steps : int
        Decode steps behind the first token.
    prompts : tuple of tuple of int
        Token ids, one prompt for each row; all have the same length.
    """

    work: Path
    model: Path
    weights: str
    keep: int
    threads: int
    steps: int
    prompts: tuple[tuple[int, ...], ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """Return the case that `to_json` wrote."""
        prompts = tuple(map(tuple, fields["prompts"]))
        return cls(**{**fields, "work": Path(fields["work"]), "model": Path(fields["model"]), "prompts": prompts})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**vars(self), "work": str(self.work), "model": str(self.model)}

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return len(self.prompts[0])

    @property
    def kept(self) -> int:
        """Tokens of a prompt that stay."""
        return self.length * self.keep // 100

    def array(self) -> np.ndarray:
        """Return the prompts as [rows,length] int64."""
        return np.array(self.prompts, np.int64)


class Runner(Protocol):
    """A loaded model with the prompts of one case."""

    def prefill(self) -> list[int]:
        """Run all prompts and compress them; return the first token of each row."""

    def step(self) -> list[int]:
        """Return the next token of each row."""

    def compress_s(self) -> float | None:
        """Return the seconds of compression within prefill, None where they cannot be told apart."""


class BenchmarkEngine(Protocol):
    """One engine: a module in benchmarks/cpu/engines has one as ENGINE."""

    def version(self) -> str:
        """Return its version; raises ImportError or OSError where it is not installed."""

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Write the model in the engine's own files, unless they are there."""

    def load(self, case: Case) -> Runner:
        """Load the model."""


def greedy(logits: Any) -> list[int]:
    """Return the likeliest token of each row of logits [rows,vocab]."""
    return [int(token) for token in np.asarray(logits).argmax(axis=-1)]


def folder_of(work: Path, engine: str, weights: str) -> Path:
    """Return where the model of an engine lies."""
    return work / f"{engine}-{weights}"


def is_ready(folder: Path) -> bool:
    """Return whether a model was written to its end."""
    return (folder / ".ready").is_file()


def transformers_folder(work: Path) -> Path:
    """Return the model as transformers wrote it; raises OSError where it did not."""
    folder = folder_of(work, "transformers", "float32")
    if not is_ready(folder):
        raise OSError("its model is made from the folder that transformers writes, which is not there")
    return folder


def mark_ready(folder: Path) -> None:
    """Say that a model was written to its end."""
    (folder / ".ready").touch()
