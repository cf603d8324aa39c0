"""GGUF files as checkpoints: one file, or the parts of a split one, with weights, configuration and tokenizer."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from chunkkv.engine.fields import Fields
from chunkkv.errors import CheckpointError
from chunkkv_builder.checkpoint import values
from chunkkv_builder.checkpoint.blocks import QuantizedBlocks, StoredBlocks
from chunkkv_builder.checkpoint.gguf_file import MAGIC, GgufFile, GgufTensor, TensorType
from chunkkv_builder.checkpoint.gguf_model import PLAIN_TYPES, ROPE_FACTORS, read_config, tensor_name
from chunkkv_builder.checkpoint.gguf_quants import BLOCK_FORMATS, dequantize, to_blocks
from chunkkv_builder.checkpoint.gguf_tokenizer import GgufTokenizer, read_tokenizer
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.checkpoint.stored_tensors import stored_tensors
from chunkkv_builder.checkpoint.tensor_shapes import expected_shapes

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHOWN = 3


class GgufCheckpoint:
    """A model in GGUF, complete and well-shaped; satisfies chunkkv_builder.checkpoint.interface.Checkpoint.

    Its files stay mapped into memory while the object lives; a tensor is read and dequantised when it is asked for.
    `tokenizer_dir` is a temporary folder that goes with the object.
    """

    def __init__(self, path: Path, config: ModelConfig, files: list[GgufFile], tokenizer: GgufTokenizer | None) -> None:
        self.path = path
        self.config = config
        self.notes: tuple[str, ...] = ()
        self._shapes = expected_shapes(config)
        self._places = stored_tensors(config)
        self._sources = {
            tensor_name(name, config.architecture): (file, name) for file in files for name in file.entries
        }
        self.tokenizer_dir: Path | None = None
        if tokenizer is not None:
            self.tokenizer_dir = Path(tempfile.mkdtemp(prefix="chunkkv-tokenizer-"))
            weakref.finalize(self, shutil.rmtree, self.tokenizer_dir, ignore_errors=True)
            tokenizer.write(self.tokenizer_dir)

    @classmethod
    def open(cls, path: str | Path) -> GgufCheckpoint:
        """Open a GGUF file, or the one model in a folder of them, and check every tensor against its metadata.

        Raises CheckpointError for anything missing, extra, misshaped, truncated or of a type that is not read, and for
        a tokenizer that is not; ConfigError for a model that is not supported.
        """
        first, *others = _parts(Path(path))
        files = [GgufFile(first)]
        _check_part(files[0], 0, 1 + len(others))
        for number, part in enumerate(others, start=1):
            files.append(GgufFile(part))
            _check_part(files[-1], number, 1 + len(others))
        tensors = _all_tensors(files)
        metadata = files[0].metadata
        tokenizer = read_tokenizer(metadata, str(first))
        config = read_config(metadata, tensors, _rope_factors(files), tokenizer, str(first))
        return cls(Path(path), config, files, tokenizer)

    def names(self) -> tuple[str, ...]:
        """Return the names of the model's tensors, in layer order."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape without touching its data."""
        self._source(name)
        return self._shapes[name]

    def stored_type(self, name: str) -> str:
        """Return the type that the tensor is stored in, such as "float16" or "Q4_K"."""
        kind = self._kind(name).name
        return PLAIN_TYPES.get(kind, kind)

    def converted(self, name: str, dtype: str) -> np.ndarray:
        """Return the tensor in `dtype`; raises CheckpointError where a value is, or becomes, infinite or NaN."""
        file, stored_name = self._source(name)
        tensor = dequantize(self._rows(name), self._kind(name)).reshape(self.shape(name))
        return values.converted(tensor, dtype, stored_name, file.path)

    def stored_blocks(self, name: str, bits: int) -> StoredBlocks | None:
        """Return the tensor's blocks of 32 as codes of `bits` bits, None where its type has none that fit."""
        block_format = BLOCK_FORMATS.get(self._kind(name).name)
        if block_format is None or block_format.bits > bits:
            return None
        return StoredBlocks(block_format.has_minimum, partial(self._blocks, name, bits))

    def _blocks(self, name: str, bits: int) -> QuantizedBlocks:
        file, stored_name = self._source(name)
        blocks = to_blocks(self._rows(name), self._kind(name), bits)
        for numbers in (blocks.scales, blocks.offsets):
            if numbers is not None:
                values.converted(numbers, "float32", stored_name, file.path)
        return blocks

    def _rows(self, name: str) -> np.ndarray:
        """Return the tensor's bytes [rows, bytes of a row], rows in the order of Hugging Face's checkpoints.

        GGUF's "llama" keeps the two halves of each rotated pair of a query or key next to each other; here they are
        half a head apart.
        """
        file, stored_name = self._source(name)
        rows = file.data(stored_name)
        if len(self.shape(name)) == 2:
            rows = rows[self._places[name].first : self._places[name].stop]
        if self.config.family != "llama" or (".q_proj." not in name and ".k_proj." not in name):
            return rows
        if len(self.shape(name)) == 1:  # a bias: one row of numbers, which move as the rows of a weight do
            return rows.reshape(-1, self._kind(name).block_bytes)[self._unpaired(name)].reshape(1, -1)
        return rows[self._unpaired(name)]

    def _unpaired(self, name: str) -> np.ndarray:
        """Return where each row of a query or key projection lies in the file."""
        pairs = np.arange(self.shape(name)[0]).reshape(-1, self.config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(-1)

    def _kind(self, name: str) -> TensorType:
        file, stored_name = self._source(name)
        return file.entries[stored_name].type

    def _source(self, name: str) -> tuple[GgufFile, str]:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path}: this model has no tensor {name!r}")
        return self._sources[self._places[name].name]


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a GGUF file, or a folder that holds one and no other weights."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _parts(path: Path) -> list[Path]:
    """Return the files of the model at `path`, in order; raises CheckpointError where that is not one model."""
    if path.is_dir():
        names = sorted(file.name for file in path.glob(f"*{SUFFIX}"))
        firsts = [name for name in names if not (match := _PART.fullmatch(name)) or int(match["number"]) == 1]
        if len(firsts) != 1:
            listed = ", ".join((firsts or names)[:_SHOWN])
            raise CheckpointError(
                f"{path} has {len(firsts)} GGUF models ({listed}{', …' if len(firsts) > _SHOWN else ''}); give the "
                "file of one, and of a split one the first part"
            )
        path = path / firsts[0]
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    if int(match["number"]) != 1:
        raise CheckpointError(
            f"{path} is a later part of a split GGUF model; give the first, which ends in -00001-of-…"
        )
    parts = [
        path.with_name(f"{match['name']}-{number:05d}-of-{match['count']}{SUFFIX}")
        for number in range(1, int(match["count"]) + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(f"{path.parent}: {missing[0]} is missing, a part of {path.name}: download it")
    return parts


def _check_part(file: GgufFile, number: int, count: int) -> None:
    """Raise CheckpointError unless `file` says that it is part `number`, counted from 0, of `count`."""
    split = Fields(file.metadata, str(file.path), CheckpointError)
    stated = split.integer("split.no", low=0, default=0), split.integer("split.count", low=0, default=1) or 1
    if stated != (number, count):
        raise CheckpointError(
            f"{file.path} says it is part {stated[0] + 1} of {stated[1]}, but is named as part {number + 1} of "
            f"{count}: keep all parts in one folder under the names they were made with"
        )


def _all_tensors(files: list[GgufFile]) -> Mapping[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in tensors:
                raise CheckpointError(f"{file.path}: tensor {name!r} is in another part, too: download the parts again")
            tensors[name] = entry
    first = files[0]
    expected = Fields(first.metadata, str(first.path), CheckpointError).integer(
        "split.tensors.count", default=len(tensors)
    )
    if expected != len(tensors):
        raise CheckpointError(
            f"{first.path} is said to have {expected} tensors in all its parts, which have {len(tensors)}: download "
            "them again"
        )
    return tensors


def _rope_factors(files: list[GgufFile]) -> tuple[float, ...] | None:
    """Return the divisors of the rotary frequencies that the model brings along, None where all are 1."""
    for file in files:
        if ROPE_FACTORS in file.entries:
            factors = dequantize(file.data(ROPE_FACTORS), file.entries[ROPE_FACTORS].type).reshape(-1)
            return None if (factors == 1).all() else tuple(float(factor) for factor in factors)
    return None
