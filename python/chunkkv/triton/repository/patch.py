"""Sets an existing model repository so that a ChunkKV engine runs under TensorRT-LLM's own C++ backend.

What is not a setting stays as it is written, comments and order included.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chunkkv.engine.backends import TENSORRT_LLM
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError
from chunkkv.files import write_whole
from chunkkv.triton.repository.config_text import CONFIG_FILE, parse, read_config, string_parameters
from chunkkv.triton.repository.cpp_backend import (
    BACKEND,
    IN_FLIGHT_BATCHING,
    LOADER_LIBRARY,
    NO_EVICTION,
    attention_windows,
    is_speculative,
    whole_number,
)

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_MODEL_PATH = "gpt_model_path"
# Every request comes in one piece and keeps its own blocks; one that is paused would be compressed twice.
_ALWAYS = {
    "gpt_model_type": IN_FLIGHT_BATCHING,
    "enable_kv_cache_reuse": "false",
    "enable_chunked_context": "false",
    "batch_scheduler_policy": NO_EVICTION,
    "max_beam_width": "1",
}


def patch_repository(engine_dir: Path, repository: Path, dry_run: bool = False) -> str:
    """Edit every config.pbtxt that names an engine and return the diff.

    Parameters
    ----------
    engine_dir : engine directory of backend tensorrt_llm; its absolute path is written into the repository.
    repository : model repository made from TensorRT-LLM's templates.
    dry_run : only return the diff, change nothing.

    Raises ConfigError for another backend's engine, for a repository without a model of the C++ backend, and for a
    file whose settings are written in a way that cannot be edited; nothing is changed then. Raises
    BackendUnavailableError without the extra `triton`.
    """
    files = EngineFiles.load(engine_dir)
    if files.backend != TENSORRT_LLM:
        raise ConfigError(
            f"{engine_dir} was built for {files.backend}; TensorRT-LLM's backend runs engines of --backend "
            f"{TENSORRT_LLM} only: build one, or serve this one with chunkkv triton init"
        )
    configs = [_ConfigFile.read(path) for path in sorted(repository.glob(f"*/{CONFIG_FILE}"))]
    if not any(config.runs_engine for config in configs):
        raise ConfigError(
            f"model_repository {repository} has no model with backend {BACKEND}; give one made from TensorRT-LLM's "
            "templates, or make one with chunkkv triton init"
        )
    edited = [(config, _edited(config, files)) for config in configs]
    changed = [(config, text) for config, text in edited if text != config.text]
    if not dry_run:
        for config, text in changed:
            write_whole(config.path, text)
    diffs = [_diff(config.path.relative_to(repository).as_posix(), config.text, text) for config, text in changed]
    return f"{''.join(diffs)}# start tritonserver with LD_PRELOAD=/path/to/{LOADER_LIBRARY}\n"


@dataclass(frozen=True)
class _ConfigFile:
    """A config.pbtxt as it is written, and what it says."""

    path: Path
    text: str
    message: ModelConfig

    @classmethod
    def read(cls, path: Path) -> _ConfigFile:
        message = read_config(path, is_template=True)
        return cls(path, read_text(path, ConfigError), message)

    @property
    def runs_engine(self) -> bool:
        return self.message.backend == BACKEND


def _edited(config: _ConfigFile, files: EngineFiles) -> str:
    """Return the file's text with what has to change."""
    current, text = string_parameters(config.message), config.text
    required = {}
    if config.runs_engine or _MODEL_PATH in current:
        required[_MODEL_PATH] = os.path.abspath(files.path)
    if config.runs_engine:
        required |= _ALWAYS | _only_where_wrong(current, files.build["max_seq_len"])
        if config.message.max_batch_size > files.build["max_batch_size"]:
            text = _with_batch_size(text, files.build["max_batch_size"])
    for name, value in required.items():
        if current.get(name) != value:
            text = _with_parameter(text, name, value, name in current)
    # The edits are made on lines; parsing the result shows whether each of them took effect.
    result = string_parameters(parse(text, config.path, is_template=True))
    if missed := [name for name, value in required.items() if result.get(name) != value]:
        raise ConfigError(
            f"{config.path}: {missed[0]} is written in a way that cannot be edited; set it to {required[missed[0]]!r}"
        )
    return text


def _only_where_wrong(current: dict[str, str], max_seq_len: int) -> dict[str, str]:
    """Return settings that may be absent, but are wrong at the value they have."""
    corrections = {}
    windows = attention_windows(current.get("max_attention_window_size", ""))
    if windows and min(windows) < max_seq_len:
        corrections["max_attention_window_size"] = str(max_seq_len)
    if (whole_number(current.get("sink_token_length", "")) or 0) > 0:
        corrections["sink_token_length"] = "0"
    if is_speculative(current.get("decoding_mode", "")):
        corrections["decoding_mode"] = "top_k_top_p"
    if current.get("batching_strategy", IN_FLIGHT_BATCHING) != IN_FLIGHT_BATCHING:
        corrections["batching_strategy"] = IN_FLIGHT_BATCHING
    return corrections


def _with_parameter(text: str, name: str, value: str, is_there: bool) -> str:
    """Return `text` with a parameter set: its value replaced where it stands, or the parameter added at the end."""
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    if not is_there:
        end = "" if text.endswith("\n") else "\n"
        return f'{text}{end}parameters {{\n  key: "{name}"\n  value {{\n    string_value: "{quoted}"\n  }}\n}}\n'
    entry = re.compile(
        rf'(key\s*:\s*"{re.escape(name)}"\s*,?\s*value\s*:?\s*\{{\s*string_value\s*:\s*)"(?:\\.|[^"\\])*"'
    )
    return entry.sub(lambda match: f'{match[1]}"{quoted}"', text)


def _with_batch_size(text: str, max_batch_size: int) -> str:
    return re.sub(r"^(\s*max_batch_size\s*:\s*)\d+", rf"\g<1>{max_batch_size}", text, count=1, flags=re.MULTILINE)


def _diff(name: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), fromfile=f"a/{name}", tofile=f"b/{name}"
    )
    return "".join(lines)
