"""Sets an existing model repository so that a ChunkKV engine runs under TensorRT-LLM's own C++ backend.

What is not a setting stays as it is written, comments and order included.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from chunkkv.engine.directory import TENSORRT_LLM, EngineFiles
from chunkkv.engine.json_files import read_text
from chunkkv.errors import ConfigError
from chunkkv.files import write_whole
from chunkkv.triton.repository import pbtxt
from chunkkv.triton.repository.check import LOADER, SPECULATIVE

_BACKEND = "tensorrtllm"
_MODEL_PATH = "gpt_model_path"
# Every request comes in one piece and keeps its own blocks; one that is paused would be compressed twice.
_ALWAYS = {
    "gpt_model_type": "inflight_fused_batching",
    "enable_kv_cache_reuse": "false",
    "enable_chunked_context": "false",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "max_beam_width": "1",
}


def patch_repository(engine_dir: Path, repository: Path, dry_run: bool = False) -> str:
    """Edit every config.pbtxt that names an engine and return the diff; with `dry_run` only return it.

    Raises ConfigError for another backend's engine, for a repository without a model of the C++ backend, and for a
    file whose settings are written in a way that cannot be edited.
    """
    files = EngineFiles.load(engine_dir)
    if files.backend != TENSORRT_LLM:
        raise ConfigError(
            f"{engine_dir} was built for {files.backend}; TensorRT-LLM's backend runs engines of --backend "
            f"{TENSORRT_LLM} only: build one, or serve this one with chunkkv triton init"
        )
    paths = sorted(repository.glob(f"*/{pbtxt.CONFIG_FILE}"))
    engines = [path for path in paths if pbtxt.text_of(pbtxt.read_config(path), "backend") == _BACKEND]
    if not engines:
        raise ConfigError(
            f"model_repository {repository} has no model with backend {_BACKEND}; give one made from TensorRT-LLM's "
            "templates, or make one with chunkkv triton init"
        )
    edits = [(path, read_text(path, ConfigError), _edited(path, path in engines, files)) for path in paths]
    changed = [edit for edit in edits if edit[1] != edit[2]]
    if not dry_run:
        for path, _, text in changed:
            write_whole(path, text)
    shown = "".join(_diff(path.relative_to(repository).as_posix(), old, new) for path, old, new in changed)
    return f"{shown}# start tritonserver with LD_PRELOAD=/path/to/{LOADER}\n"


def _edited(path: Path, runs_engine: bool, files: EngineFiles) -> str:
    """Return the file's text with what has to change."""
    config = pbtxt.read_config(path)
    values = pbtxt.parameters(config)
    text = read_text(path, ConfigError)
    wanted = {_MODEL_PATH: os.path.abspath(files.path)} if runs_engine or _MODEL_PATH in values else {}
    if runs_engine:
        wanted |= _ALWAYS | _only_where_wrong(values, files.build["max_seq_len"])
        text = _with_batch_size(text, pbtxt.text_of(config, "max_batch_size"), files.build["max_batch_size"])
    for name, value in wanted.items():
        if values.get(name) != value:
            text = _with_parameter(text, name, value, name in values)
    partial = pbtxt.parameters(pbtxt.parse(text, path))
    if wrong := [name for name, value in wanted.items() if partial.get(name) != value]:
        raise ConfigError(
            f"{path}: {wrong[0]} is written in a way that cannot be edited; set it to {wanted[wrong[0]]!r}"
        )
    return text


def _only_where_wrong(values: dict[str, str], max_seq_len: int) -> dict[str, str]:
    """Return settings that are fine when absent, as they must be where they are given."""
    found = {}
    windows = [int(number) for number in re.findall(r"\d+", values.get("max_attention_window_size", ""))]
    if windows and min(windows) < max_seq_len:
        found["max_attention_window_size"] = str(max_seq_len)
    if values.get("sink_token_length", "").isdigit() and int(values["sink_token_length"]) > 0:
        found["sink_token_length"] = "0"
    if any(word in values.get("decoding_mode", "").lower() for word in SPECULATIVE):
        found["decoding_mode"] = "top_k_top_p"
    if values.get("batching_strategy", _ALWAYS["gpt_model_type"]) != _ALWAYS["gpt_model_type"]:
        found["batching_strategy"] = _ALWAYS["gpt_model_type"]
    return found


def _with_parameter(text: str, name: str, value: str, is_there: bool) -> str:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    if not is_there:
        end = "" if text.endswith("\n") else "\n"
        return f'{text}{end}parameters {{\n  key: "{name}"\n  value {{\n    string_value: "{quoted}"\n  }}\n}}\n'
    entry = re.compile(
        rf'(key\s*:\s*"{re.escape(name)}"\s*,?\s*value\s*:?\s*\{{\s*string_value\s*:\s*)"(?:\\.|[^"\\])*"'
    )
    return entry.sub(lambda match: f'{match[1]}"{quoted}"', text)


def _with_batch_size(text: str, given: str, most: int) -> str:
    if not given.isdigit() or int(given) <= most:
        return text
    return re.sub(r"^(\s*max_batch_size\s*:\s*)\d+", rf"\g<1>{most}", text, count=1, flags=re.MULTILINE)


def _diff(name: str, old: str, new: str) -> str:
    lines = [text.splitlines(keepends=True) for text in (old, new)]
    return "".join(difflib.unified_diff(*lines, fromfile=f"a/{name}", tofile=f"b/{name}"))
