"""Hugging Face checkpoint directories, read without torch: every tensor is checked, none is copied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from chunkkv.engine.json_files import read_object
from chunkkv.errors import CheckpointError
from chunkkv.text.tokenizer import TOKENIZER_FILE
from chunkkv_builder.checkpoint import values
from chunkkv_builder.checkpoint.blocks import StoredBlocks
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.checkpoint.safetensors_file import READABLE, SafetensorsFile
from chunkkv_builder.checkpoint.stored_tensors import stored_shapes, stored_tensors
from chunkkv_builder.checkpoint.tensor_shapes import expected_shapes
from chunkkv_builder.checkpoint.tokenizer_files import GENERATION_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_UNUSED = re.compile(r".*rotary_emb\.inv_freq")  # recomputed from the config; old checkpoints store it
_NAMES_SHOWN = 3
GIVE = "the directory of a Hugging Face checkpoint, or a GGUF file"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # of two tensors, compared at once


class HuggingFaceCheckpoint:
    """A checkpoint directory whose tensors are complete and well-shaped; made by `open`.

    Its files stay mapped into memory while the object lives; nothing is copied before a tensor is converted.
    """

    def __init__(
        self, path: Path, config: ModelConfig, sources: list[SafetensorsFile], notes: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self.config = config
        self.notes = notes
        self.tokenizer_dir = path if (path / TOKENIZER_FILE).is_file() else None
        self._sources = {name: source for source in sources for name in source.entries}
        self._shapes = expected_shapes(config)
        self._places = stored_tensors(config)

    @classmethod
    def open(cls, directory: str | Path) -> HuggingFaceCheckpoint:
        """Open the checkpoint in `directory` and check every tensor against its config.

        Raises CheckpointError naming file and tensor for anything missing, extra, misshaped, truncated or of a dtype
        other than float32, float16 or bfloat16; ConfigError for a model that is not supported.
        """
        path = Path(directory)
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {problem}; give {GIVE}")
        for name in (CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILE):
            _refuse_dangling(path / name)
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path} has no {CONFIG_FILE}; give {GIVE}")
        generation = path / GENERATION_FILE
        config = ModelConfig.from_hf(
            read_object(path / CONFIG_FILE, CheckpointError),
            read_object(generation, CheckpointError) if generation.is_file() else None,
            source=str(path / CONFIG_FILE),
        )
        sources = _open_weights(path)
        notes: tuple[str, ...] = ()
        is_untied = config.tie_word_embeddings and _has_own_head(sources)
        if is_untied:
            config = dataclasses.replace(config, tie_word_embeddings=False)
            notes = (
                f"{path}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}: it is used as it is",
            )
        _check_tensors(config, sources, path)
        stored = next(source for source in sources if _EMBEDDING in source.entries)
        dtype = READABLE[stored.entries[_EMBEDDING].dtype][0]
        return cls(path, dataclasses.replace(config, dtype=dtype), sources, notes)

    def names(self) -> tuple[str, ...]:
        """Return the names of the model's tensors, in layer order."""
        return tuple(self._shapes)

    def tensor(self, name: str) -> np.ndarray:
        """Return the tensor's stored values as a read-only view of its mapped file, in the dtype they are stored in."""
        source, place = self._source(name), self._places[name]
        return source.tensor(place.name)[place.first : place.stop]

    def converted(self, name: str, dtype: str) -> np.ndarray:
        """Return the tensor in another dtype; raises CheckpointError where a value is, or becomes, infinite or NaN."""
        source, stored = self._source(name), self.tensor(name)
        if self._places[name].adds_one:
            stored = stored.astype(np.float32) + np.float32(1)
        return values.converted(stored, dtype, name, source.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape without touching its data."""
        self._source(name)
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return "float32", "float16" or "bfloat16"."""
        return READABLE[self._source(name).entries[self._places[name].name].dtype][0]

    def stored_type(self, name: str) -> str:
        """Return the same as `dtype`."""
        return self.dtype(name)

    def stored_blocks(self, name: str, bits: int) -> StoredBlocks | None:
        """Return None: these checkpoints are not quantised."""
        return None

    def _source(self, name: str) -> SafetensorsFile:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path}: this model has no tensor {name!r}")
        return self._sources[self._places[name].name]


def _has_own_head(sources: list[SafetensorsFile]) -> bool:
    """Return whether the output projection is stored with other bytes than the embedding.

    transformers 5 then uses both as they are, whatever tie_word_embeddings says.
    """
    stored = {name: source for source in sources for name in source.entries}
    if _HEAD not in stored or _EMBEDDING not in stored:
        return False
    head, embedding = stored[_HEAD].entries[_HEAD], stored[_EMBEDDING].entries[_EMBEDDING]
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or head.dtype not in READABLE:
        return True
    ours, theirs = stored[_HEAD].tensor(_HEAD), stored[_EMBEDDING].tensor(_EMBEDDING)
    return any(
        ours[first : first + _ROWS].tobytes() != theirs[first : first + _ROWS].tobytes()
        for first in range(0, len(ours), _ROWS)
    )


def _refuse_dangling(file: Path) -> None:
    """Raise CheckpointError for a symbolic link to nothing, as an interrupted download leaves in a cache."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(f"{file} is a symbolic link to {file.readlink()}, which is not there: download it again")


def _open_weights(path: Path) -> list[SafetensorsFile]:
    for name in (WEIGHTS_FILE, INDEX_FILE):
        _refuse_dangling(path / name)
    if (path / WEIGHTS_FILE).is_file():
        return [SafetensorsFile(path / WEIGHTS_FILE)]
    if (path / INDEX_FILE).is_file():
        return _open_shards(path)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has its weights in {pickles[0]}, a pickle, which is never read because loading one can run code: "
            "convert it, for example with transformers' save_pretrained, to safetensors"
        )
    raise CheckpointError(f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; one of them must hold the weights")


def _open_shards(path: Path) -> list[SafetensorsFile]:
    """Open every shard of the index once; raises CheckpointError where the index and the shards disagree."""
    index = path / INDEX_FILE
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be an object that maps tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to lie in {file!r}; expected the plain name of a .safetensors file "
                "in the same directory"
            )
    shards = sorted(set(weight_map.values()))
    for file in shards:
        _refuse_dangling(path / file)
    if missing := [file for file in shards if not (path / file).is_file()]:
        raise CheckpointError(f"{path}: {_listed(missing)} missing, though {INDEX_FILE} names it: download it again")
    sources = [SafetensorsFile(path / file) for file in shards]
    for source in sources:
        for name in source.entries:
            if weight_map.get(name) != source.path.name and not _UNUSED.fullmatch(name):
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{source.path}: has tensor {name!r}, but {INDEX_FILE} places it {place}")
    entries = {source.path.name: source.entries for source in sources}
    for name, file in weight_map.items():
        if name not in entries[file]:
            raise CheckpointError(f"{path / file}: tensor {name!r} is missing, though {INDEX_FILE} places it there")
    return sources


def _check_tensors(config: ModelConfig, sources: list[SafetensorsFile], path: Path) -> None:
    expected = stored_shapes(config)
    stored = {name: source for source in sources for name in source.entries}
    where = sources[0].path if len(sources) == 1 else path
    if missing := [name for name in expected if name not in stored]:
        raise CheckpointError(
            f"{where}: tensor {_listed(missing)} missing; {CONFIG_FILE} describes {config.architecture} with "
            f"{config.num_layers} layers, which needs {len(expected)} tensors"
        )
    for name, source in _extra(config, stored, expected):
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is extra; {config.architecture} as {CONFIG_FILE} describes it has none of "
            "that name, so it would be left out of every result"
        )
    for name, shape in expected.items():
        source = stored[name]
        entry = source.entries[name]
        if entry.dtype not in READABLE:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has dtype {entry.dtype}; expected one of {', '.join(READABLE)}"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has shape {list(entry.shape)}; {CONFIG_FILE} expects {list(shape)}"
            )


def _extra(
    config: ModelConfig, stored: dict[str, SafetensorsFile], expected: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, SafetensorsFile]]:
    """Yield what the model has no use for, except what is known to be a harmless copy."""
    for name, source in stored.items():
        is_copy = config.tie_word_embeddings and name == _HEAD
        if name not in expected and not is_copy and not _UNUSED.fullmatch(name):
            yield name, source


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more are" if more > 0 else f"{shown} {'is' if len(names) == 1 else 'are'}"
