"""An engine directory: what is in it, and the check that nothing is missing, changed or foreign."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_object
from chunkkv.engine.tensorrt_llm_side_file import SIDE_FILE, SideFile
from chunkkv.errors import ConfigError, EngineError, EngineMismatchError
from chunkkv.settings import ChunkKVSettings

CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
STEP_FILE, COMPRESS_FILE = "step.onnx", "compress.onnx"  # of an engine for ONNX Runtime
TENSORRT_LLM = "tensorrt_llm"  # the backend whose config.json is not ours
FORMAT = "chunkkv-engine"
FORMAT_VERSION = 1
PARTIAL_MARK = ".partial-"  # a build writes to <output_dir>.partial-<process id> until it is complete
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = 4 << 20
_REBUILD = "build it again"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The list of an engine's files with what built them; it vouches for itself by its own digest."""

    backend: str
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        """Return the manifest as it is written to disk."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "backend": self.backend,
            "versions": dict(sorted(self.versions.items())),
            "files": {name: vars(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps({**values, "manifest_sha256": _digest(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read manifest.json; raises EngineError where it is damaged, EngineMismatchError for another format."""
        values = read_object(path, EngineError)
        if values.get("format") != FORMAT:
            raise EngineMismatchError(f"{path}: format is {values.get('format')!r}; this program reads {FORMAT!r}")
        if values.get("format_version") != FORMAT_VERSION:
            raise EngineMismatchError(
                f"{path}: format_version is {values.get('format_version')!r}; this program reads {FORMAT_VERSION}: "
                f"{_REBUILD} with the version of ChunkKV-TRT that is to run it"
            )
        given, found = values.pop("manifest_sha256", None), _digest(values)
        if given != found:
            raise EngineError(f"{path} was changed: manifest_sha256 says {given}, its content has {found}; {_REBUILD}")
        files, versions = values.get("files"), values.get("versions")
        if not isinstance(files, dict) or CONFIG_FILE not in files:
            raise EngineError(f"{path}: 'files' must list at least {CONFIG_FILE}; {_REBUILD}")
        if not _is_str_dict(versions) or not isinstance(values.get("backend"), str):
            raise EngineError(f"{path}: 'backend' must be text and 'versions' an object of text; {_REBUILD}")
        return cls(values["backend"], versions, {name: _record(path, name, entry) for name, entry in files.items()})


@dataclass(frozen=True)
class EngineFiles:
    """A checked engine directory: model and build limits as config.json has them, and ChunkKV's settings if any."""

    path: Path
    backend: str
    versions: dict[str, str]
    model: dict[str, Any]
    build: dict[str, Any]
    settings: ChunkKVSettings | None

    @property
    def budget_is_fixed(self) -> bool:
        """Whether the share that is kept stands in the engine, so that no request may bring its own."""
        return self.backend == TENSORRT_LLM

    @classmethod
    def load(cls, engine_dir: str | os.PathLike[str]) -> EngineFiles:
        """Read an engine directory after checking every byte of it against the manifest.

        Raises EngineError for a missing, changed or foreign file, with the expected and the found value;
        EngineMismatchError for a directory in another format.
        """
        path = Path(engine_dir)
        try:
            _check_directory(path)
            manifest = Manifest.read(path / MANIFEST_FILE)
            _check_names(path, manifest)
            for name, record in manifest.files.items():
                _check_file(path / name, record)
        except OSError as error:
            raise EngineError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
        config = read_object(path / CONFIG_FILE, EngineError)
        model, build = (_section(path, config, name) for name in ("pretrained_config", "build_config"))
        if manifest.backend == TENSORRT_LLM:
            # TensorRT-LLM writes and reads these two sections: what it does not know stands in the side file.
            side = SideFile.read(path)
            model = {**model, "eos_token_ids": list(side.eos_token_ids)}
            build = {**build, "backend": TENSORRT_LLM}
            if config.get("chunkkv") != side.settings.to_dict():
                raise EngineError(f"{path}: 'chunkkv' in {CONFIG_FILE} differs from {SIDE_FILE}; {_REBUILD}")
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            _count(path, "build_config", build, name)
        for name in ("vocab_size", "num_hidden_layers"):
            _count(path, "pretrained_config", model, name)
        if build.get("backend") != manifest.backend:
            raise EngineError(
                f"{path}: {CONFIG_FILE} says backend {build.get('backend')!r}, {MANIFEST_FILE} says "
                f"{manifest.backend!r}; {_REBUILD}"
            )
        settings = _settings(path, config, model["num_hidden_layers"])
        _check_values(path, model, build, settings)
        return cls(path, manifest.backend, manifest.versions, model, build, settings)


def hash_file(path: Path, advance: Callable[[int], None] | None = None, sync: bool = False) -> FileRecord:
    """Return size and sha256 of `path`, read in pieces; `sync` also forces it to disk."""
    digest, size, piece = hashlib.sha256(), 0, memoryview(bytearray(_PIECE))
    with open(path, "r+b" if sync else "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
            if advance is not None:
                advance(count)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_str_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_FILE:
        raise EngineError(f"{path} lists {name!r}; expected the plain name of a file in the same directory")
    size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    if not whole or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise EngineError(f"{path}: the entry of {name!r} must have a size and a sha256; {_REBUILD}")
    return FileRecord(size, sha256)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise EngineError(f"engine directory {path} {problem}; give the --output_dir of a chunkkv-build run")
    if re.search(re.escape(PARTIAL_MARK) + r"\d+$", path.resolve().name):
        raise EngineError(f"{path} is the unfinished output of a build; {_REBUILD}")
    if not (path / MANIFEST_FILE).is_file():
        raise EngineError(
            f"{path} has no {MANIFEST_FILE}: it is no engine of chunkkv-build, or its build was cut off; {_REBUILD}"
        )


def _check_names(path: Path, manifest: Manifest) -> None:
    """Raise EngineError unless the directory holds exactly the listed files, as plain files."""
    listed = {*manifest.files, MANIFEST_FILE}
    with os.scandir(path) as entries:
        found = {entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) for entry in entries}
    if missing := sorted(listed - set(found)):
        raise EngineError(f"{path / missing[0]} is missing, though {MANIFEST_FILE} lists it; {_REBUILD}")
    if foreign := sorted(set(found) - listed):
        raise EngineError(
            f"{path / foreign[0]} is foreign: {MANIFEST_FILE} lists only {', '.join(sorted(manifest.files))}; remove it"
        )
    for name, kind in sorted(found.items()):
        if kind != stat.S_IFREG:
            problem = "a symbolic link" if kind == stat.S_IFLNK else "no plain file"
            raise EngineError(f"{path / name} is {problem}; an engine has plain files only: {_REBUILD}")


def _check_file(path: Path, expected: FileRecord) -> None:
    size = path.stat().st_size
    if size != expected.size:
        raise EngineError(f"{path} was changed: {MANIFEST_FILE} says {expected.size} bytes, found {size}; {_REBUILD}")
    found = hash_file(path)
    if found != expected:
        raise EngineError(
            f"{path} was changed: {MANIFEST_FILE} says sha256 {expected.sha256}, found {found.sha256}; {_REBUILD}"
        )


def _section(path: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise EngineError(f"{path / CONFIG_FILE}: {name!r} must be an object; {_REBUILD}")
    return section


def _count(path: Path, section: str, values: Mapping[str, Any], name: str) -> None:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineError(
            f"{path / CONFIG_FILE}: {section}.{name} is {value!r}; it must be a whole number of at least 1: {_REBUILD}"
        )


def _check_values(
    path: Path, model: Mapping[str, Any], build: Mapping[str, Any], settings: ChunkKVSettings | None
) -> None:
    ends = model.get("eos_token_ids")
    if not isinstance(ends, list) or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise EngineError(
            f"{path / CONFIG_FILE}: pretrained_config.eos_token_ids is {ends!r}; it must be a list of ids: {_REBUILD}"
        )
    if settings is not None and build["max_num_tokens"] < settings.window:
        raise EngineError(
            f"{path / CONFIG_FILE}: build_config.max_num_tokens is {build['max_num_tokens']}, below the observation "
            f"window of {settings.window} tokens: {_REBUILD}"
        )


def _settings(path: Path, config: Mapping[str, Any], num_layers: int) -> ChunkKVSettings | None:
    if "chunkkv" not in config:
        return None
    try:
        settings = ChunkKVSettings.from_dict(_section(path, config, "chunkkv"))
    except ConfigError as error:
        raise EngineError(f"{path / CONFIG_FILE}: chunkkv: {error}; {_REBUILD}") from None
    if [layer for group in settings.layer_groups for layer in group] != list(range(num_layers)):
        raise EngineError(
            f"{path / CONFIG_FILE}: chunkkv.engine.layer_groups is {settings.layer_groups}; "
            f"the model has layers 0 to {num_layers - 1}: {_REBUILD}"
        )
    return settings
