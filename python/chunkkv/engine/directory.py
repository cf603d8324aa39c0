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

from chunkkv.engine.backends import BACKENDS, TENSORRT, TENSORRT_LLM, TRAITS, BackendTraits
from chunkkv.engine.fields import LARGEST_OFFSET, Fields
from chunkkv.engine.json_files import read_object
from chunkkv.engine.tensorrt_build import TensorRTBuild
from chunkkv.engine.tensorrt_llm_side_file import SIDE_FILE, SideFile
from chunkkv.errors import ConfigError, EngineError, EngineMismatchError
from chunkkv.settings import ChunkKVSettings

CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
# Of an engine for ONNX Runtime: the model, the op, the op by scores from outside, and what scores a second reading.
STEP_FILE, COMPRESS_FILE, GIVEN_FILE, REREAD_FILE = "step.onnx", "compress.onnx", "compress_given.onnx", "reread.onnx"
# Of engines with w8a8: the model as it appends all blocks of a prompt but the last, its first layers and the others.
PREFILL_BLOCKS_FILES = ("prefill_blocks.onnx", "prefill_blocks_rest.onnx")
LONG_BLOCK = "long_block"  # of w8a8: tokens, int32, from which a block attends in whole numbers
PRODUCTS_KEY, WHOLE_NUMBERS = "chunkkv.products", "whole numbers"  # in the metadata of each graph of w8a8
HIDDEN, NEXT_HIDDEN = "hidden", "next_hidden"  # what the second takes of the first, and what the first calls it
FORMAT = "chunkkv-engine"
FORMAT_VERSION = 2
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
    """The list of an engine's files and what built them; the file holds a digest of its own content.

    Parameters
    ----------
    backend : str
        One of chunkkv.engine.backends.BACKENDS, or another name in an engine of a later version.
    versions : dict
        Version of each package that took part in the build, by name.
    files : dict
        Size and digest of every file but the manifest, by name.
    tensorrt : TensorRTBuild or None
        Which TensorRT built the engines; None for other backends than TENSORRT.
    """

    backend: str
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensorrt: TensorRTBuild | None = None

    @property
    def files_sha256(self) -> str:
        """One digest over the names and contents of all files: what tells two engines apart."""
        return _digest({name: record.sha256 for name, record in self.files.items()})

    def to_json(self) -> str:
        """Return the manifest as it is written to disk."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "backend": self.backend,
            "versions": dict(sorted(self.versions.items())),
            **({} if self.tensorrt is None else {"tensorrt": self.tensorrt.to_dict()}),
            "files": {name: vars(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps({**values, "manifest_sha256": _digest(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read manifest.json; raises EngineError where it is damaged, EngineMismatchError for another format."""
        fields = Fields(read_object(path, EngineError), str(path), EngineError, _REBUILD)
        if fields.get("format") != FORMAT:
            raise EngineMismatchError(f"{path}: format is {fields.get('format')!r}; this program reads {FORMAT!r}")
        if fields.get("format_version") != FORMAT_VERSION:
            raise EngineMismatchError(
                f"{path}: format_version is {fields.get('format_version')!r}; this program reads {FORMAT_VERSION}: "
                f"{_REBUILD} with the version of ChunkKV-TRT that is to run it"
            )
        stated = fields.get("manifest_sha256")
        digest = _digest({name: value for name, value in fields.values.items() if name != "manifest_sha256"})
        if stated != digest:
            raise EngineError(
                f"{path} was changed: manifest_sha256 says {stated}, its content has {digest}; {_REBUILD}"
            )
        files = fields.section("files")
        if CONFIG_FILE not in files.values:
            raise files.error(CONFIG_FILE, "every engine has that file")
        records = {name: _record(files, name) for name in files.values}
        backend = fields.text("backend")
        tensorrt = TensorRTBuild.from_fields(fields.section("tensorrt")) if backend == TENSORRT else None
        return cls(backend, fields.text_section("versions"), records, tensorrt)


@dataclass(frozen=True)
class EngineFiles:
    """A checked engine directory.

    Parameters
    ----------
    path : Path
        The directory.
    backend : str
        The engine that runs it, one of BACKENDS.
    versions : dict
        Versions of the packages it was built with, by name.
    model : dict
        `pretrained_config` of config.json: the model's sizes under TensorRT-LLM's names.
    build : dict
        `build_config` of config.json: the limits it was built for, under trtllm-build's names.
    settings : ChunkKVSettings or None
        ChunkKV's settings, None for an engine that keeps every token.
    tensorrt : TensorRTBuild or None
        Which TensorRT built the engines; None for other backends than TENSORRT.
    sha256 : str, default ""
        One digest over the names and contents of all files.
    """

    path: Path
    backend: str
    versions: dict[str, str]
    model: dict[str, Any]
    build: dict[str, Any]
    settings: ChunkKVSettings | None
    tensorrt: TensorRTBuild | None = None
    sha256: str = ""

    @property
    def traits(self) -> BackendTraits:
        """What holds for every engine of its backend."""
        return TRAITS[self.backend]

    @classmethod
    def load(cls, engine_dir: str | os.PathLike[str]) -> EngineFiles:
        """Read an engine directory after checking every byte of it against the manifest.

        Raises EngineError for a missing, changed or foreign file, with the expected and the found value;
        EngineMismatchError for a directory in another format or of a backend that this version does not have.
        """
        if not isinstance(engine_dir, (str, os.PathLike)) or not os.fspath(engine_dir):
            raise EngineError(f"engine_dir is {engine_dir!r}; give the directory that chunkkv-build wrote")
        path = Path(engine_dir)
        try:
            _check_directory(path)
            manifest = Manifest.read(path / MANIFEST_FILE)
            _check_names(path, manifest)
            for name, record in manifest.files.items():
                _check_file(path / name, record)
        except OSError as error:
            raise EngineError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
        return cls._checked(path, manifest)

    @classmethod
    def _checked(cls, path: Path, manifest: Manifest) -> EngineFiles:
        """Check what config.json says, alone and against the manifest."""
        if manifest.backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise EngineMismatchError(
                f"{path} was built for backend {manifest.backend!r}; this version runs {known}: "
                f"{_REBUILD} for one of them, or run it with the version of ChunkKV-TRT that built it"
            )
        config = Fields(read_object(path / CONFIG_FILE, EngineError), str(path / CONFIG_FILE), EngineError, _REBUILD)
        model, build = config.section("pretrained_config"), config.section("build_config")
        if manifest.backend == TENSORRT_LLM:
            # TensorRT-LLM writes and reads these two sections: what it does not know stands in the side file.
            side = SideFile.read(path)
            model = model.with_values(eos_token_ids=list(side.eos_token_ids))
            build = build.with_values(backend=TENSORRT_LLM)
            if config.get("chunkkv") != side.settings.to_dict():
                raise EngineError(f"{path}: 'chunkkv' in {CONFIG_FILE} differs from {SIDE_FILE}; {_REBUILD}")
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            build.integer(name)
        for name in ("vocab_size", "num_hidden_layers"):
            model.integer(name)
        model.integers("eos_token_ids")
        if build.get("backend") != manifest.backend:
            raise build.error("backend", f"{MANIFEST_FILE} says {manifest.backend!r}")
        settings = _settings(config, model.integer("num_hidden_layers"))
        if settings is not None and build.integer("max_num_tokens") < settings.window:
            raise build.error("max_num_tokens", f"it must hold the observation window of {settings.window} tokens")
        values = dict(model.values), dict(build.values)
        return cls(
            path, manifest.backend, manifest.versions, *values, settings, manifest.tensorrt, manifest.files_sha256
        )


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


def _record(files: Fields, name: str) -> FileRecord:
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_FILE:
        raise EngineError(f"{files.source} lists {name!r}; expected the plain name of a file in the same directory")
    entry = files.section(name)
    record = FileRecord(entry.integer("size", low=0, high=LARGEST_OFFSET), entry.text("sha256"))
    if not _SHA256.fullmatch(record.sha256):
        raise entry.error("sha256", "give 64 hexadecimal digits")
    return record


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
    """Raise EngineError unless the directory holds exactly the listed files, as plain files or links to such.

    What else begins with a dot is left alone: file managers and version control put it there.
    """
    expected = {*manifest.files, MANIFEST_FILE}
    with os.scandir(path) as entries:
        kinds = {entry.name: _kind(entry) for entry in entries if not entry.name.startswith(".")}
    if missing := sorted(expected - set(kinds)):
        raise EngineError(f"{path / missing[0]} is missing, though {MANIFEST_FILE} lists it; {_REBUILD}")
    if foreign := sorted(set(kinds) - expected):
        raise EngineError(
            f"{path / foreign[0]} is foreign: {MANIFEST_FILE} lists only {', '.join(sorted(manifest.files))}; remove it"
        )
    for name, kind in sorted(kinds.items()):
        if kind != stat.S_IFREG:
            problem = "a symbolic link to nothing" if kind == stat.S_IFLNK else "no plain file"
            raise EngineError(f"{path / name} is {problem}; an engine has plain files, or links to them: {_REBUILD}")


def _kind(entry: os.DirEntry[str]) -> int:
    """Return the kind of a file, of its target for a link, as in a cache; that of the link where it leads nowhere."""
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)


def _check_file(path: Path, expected: FileRecord) -> None:
    size = path.stat().st_size
    if size != expected.size:
        raise EngineError(f"{path} was changed: {MANIFEST_FILE} says {expected.size} bytes, found {size}; {_REBUILD}")
    record = hash_file(path)
    if record != expected:
        raise EngineError(
            f"{path} was changed: {MANIFEST_FILE} says sha256 {expected.sha256}, found {record.sha256}; {_REBUILD}"
        )


def _settings(config: Fields, num_layers: int) -> ChunkKVSettings | None:
    """Return ChunkKV's settings, None where config.json has no section of that name."""
    if "chunkkv" not in config.values:
        return None
    section = config.section("chunkkv")
    try:
        settings = ChunkKVSettings.from_dict(section.values)
    except ConfigError as error:
        raise EngineError(f"{section.source}: {error}; {_REBUILD}") from None
    if [layer for group in settings.layer_groups for layer in group] != list(range(num_layers)):
        raise section.error("layer_groups", f"the model has layers 0 to {num_layers - 1}")
    return settings
