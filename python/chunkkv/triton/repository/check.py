"""What in a Triton model repository would break an engine with ChunkKV, or take its benefit away."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from chunkkv.engine.directory import TENSORRT_LLM, EngineFiles
from chunkkv.errors import ConfigError
from chunkkv.findings import Finding, breaks, ok, warning
from chunkkv.triton.repository import pbtxt

LOADER = "libchunkkv_tensorrt_loader.so"
_TRUE = ("1", "true", "yes", "on")
_REUSE = "blocks of a compacted prompt hold other tokens than their hash says: the second hit of a prefix fails"
_CHUNKED = "a prompt must come in one piece: its second chunk fails"
# name: what happens with true, what to set
_MUST_BE_FALSE = {"enable_kv_cache_reuse": _REUSE, "enable_chunked_context": _CHUNKED}
SPECULATIVE = ("medusa", "eagle", "lookahead", "redrafter", "explicit_draft_tokens", "beam_search")


def check_repository(repository: Path, files: EngineFiles, environment: Mapping[str, str]) -> list[Finding]:
    """Return what a look at every config.pbtxt in `repository` says about serving the engine in `files`."""
    if not repository.is_dir():
        return [breaks("triton repository", f"{repository} is no directory", "give the --model-repository of Triton")]
    found, serving = [], False
    for path in sorted(repository.glob(f"*/{pbtxt.CONFIG_FILE}")):
        try:
            config = pbtxt.read_config(path)
        except ConfigError as error:
            found.append(breaks(path.parent.name, str(error), "repair the file"))
            continue
        values = pbtxt.parameters(config)
        if pbtxt.text_of(config, "backend") == "tensorrtllm":
            serving = True
            model = path.parent.name
            found += _check_engine_model(model, config, values, files)
            found += _check_environment(model, files, environment)
        elif "engine_dir" in values:
            serving = True
            found += _check_path(path.parent.name, "engine_dir", values["engine_dir"], files)
    if not serving:
        change = "make one with chunkkv triton init, or add a model with backend tensorrtllm"
        found.append(breaks("triton repository", f"{repository} has no model that runs an engine", change))
    return found


def _check_engine_model(
    model: str, config: pbtxt.Message, values: Mapping[str, str], files: EngineFiles
) -> list[Finding]:
    """Check a model of the C++ backend, which allocates blocks by logical length and returns none."""
    if files.backend != TENSORRT_LLM:
        change = "build with --backend tensorrt_llm, or serve it with chunkkv triton init"
        return [breaks(f"{model}: backend", f"tensorrtllm runs no engine of backend {files.backend}", change)]
    name = "gpt_model_path"
    found = _check_path(model, name, values.get(name, ""), files)
    found += [_must_be_false(model, name, values.get(name, ""), why) for name, why in _MUST_BE_FALSE.items()]
    found.append(_batching(model, values.get("batching_strategy") or values.get("gpt_model_type", "")))
    found.append(_policy(model, values.get("batch_scheduler_policy", "")))
    found.append(
        _at_most(model, "max_beam_width", values.get("max_beam_width", ""), 1, "beams share a prompt's blocks")
    )
    found.append(_at_most(model, "sink_token_length", values.get("sink_token_length", ""), 0, "ChunkKV keeps sinks"))
    name, why = "kv_cache_host_memory_bytes", "a live request's block on the host fails the step"
    found.append(_at_most(model, name, values.get(name, ""), 0, why))
    found.append(_window(model, values.get("max_attention_window_size", ""), files.build["max_seq_len"]))
    mode = values.get("decoding_mode", "").lower()
    if any(word in mode for word in SPECULATIVE):
        why = f"{mode}: draft tokens and beams take tokens back by cache length"
        found.append(breaks(f"{model}: decoding_mode", why, "leave it empty, or top_k_top_p"))
    size = pbtxt.text_of(config, "max_batch_size")
    if (_whole(size) or 0) > files.build["max_batch_size"]:
        limit = files.build["max_batch_size"]
        found.append(breaks(f"{model}: max_batch_size", f"{size}, the engine takes {limit}", f"set it to {limit}"))
    memory = "the C++ runtime keeps allocating by logical length: decode gets faster, no KV memory comes back"
    found.append(warning(f"{model}: memory", memory, "serve it with chunkkv triton init to get blocks back"))
    return found


def _check_path(model: str, name: str, value: str, files: EngineFiles) -> list[Finding]:
    check, here = f"{model}: {name}", os.path.realpath(files.path)
    if not value or _is_placeholder(value):
        return [breaks(check, f"{value or 'nothing'} is set", f"set {name} to {here}")]
    if not os.path.isdir(value):
        change = f"make sure that the server finds {here} there"
        return [warning(check, f"{value} is not on this machine, so it was not compared", change)]
    if os.path.realpath(value) != here:
        return [breaks(check, f"{value} is another engine", f"set {name} to {here}")]
    return [ok(check, value)]


def _must_be_false(model: str, name: str, value: str, why: str) -> Finding:
    check, change = f"{model}: {name}", f'set {name} to "false"'
    if value.lower() in _TRUE:
        return breaks(check, f"{value}: {why}", change)
    if value.lower() in ("false", "0", "no", "off"):
        return ok(check, value)
    return warning(check, f"{value or 'not set'}: the default differs between versions", change)


def _batching(model: str, value: str) -> Finding:
    check, wanted = f"{model}: batching_strategy", "inflight_fused_batching"
    if value == wanted:
        return ok(check, value)
    return warning(check, f"{value or 'not set'}; looked at was {wanted}", f"set it to {wanted}")


def _policy(model: str, value: str) -> Finding:
    check, wanted = f"{model}: batch_scheduler_policy", "guaranteed_no_evict"
    if value == wanted:
        return ok(check, value)
    why = f"{value or 'not set'}: a request that is paused is prefilled again, and compressed with another length"
    return warning(check, why, f"set it to {wanted}")


def _at_most(model: str, name: str, value: str, most: int, why: str) -> Finding:
    if not value or _is_placeholder(value):
        return ok(f"{model}: {name}", f"not set, {most}")
    number = _whole(value)
    if number is None or number > most:
        return breaks(f"{model}: {name}", f"{value}: {why}", f"set it to {most}, or leave it out")
    return ok(f"{model}: {name}", value)


def _window(model: str, value: str, max_seq_len: int) -> Finding:
    check = f"{model}: max_attention_window_size"
    words = [] if _is_placeholder(value) else re.findall(r"[0-9]+", value)
    windows = [window for word in words if (window := _whole(word)) is not None]
    if windows and min(windows) < max_seq_len:
        why = f"{value}, below max_seq_len {max_seq_len}: a window that slides overwrites kept tokens"
        return breaks(check, why, f"leave it out, or at least {max_seq_len}")
    return ok(check, value if windows else "not set")


def _check_environment(model: str, files: EngineFiles, environment: Mapping[str, str]) -> list[Finding]:
    if files.settings is None:
        return []
    check, preload = f"{model}: LD_PRELOAD", environment.get("LD_PRELOAD", "")
    change = f"start tritonserver with LD_PRELOAD=/path/to/{LOADER} (mpirun: -x LD_PRELOAD)"
    libraries = [word for word in re.split(r"[:\s]+", preload) if Path(word).name.startswith("libchunkkv_tensorrt")]
    if not libraries:
        return [breaks(check, "the C++ backend finds no ChunkKV plugins in this environment", change)]
    if not Path(libraries[0]).is_file():
        return [breaks(check, f"{libraries[0]} is no file", change)]
    return [ok(check, libraries[0])]


def _whole(text: str) -> int | None:
    """Return a whole number, None where `text` is none; beyond 18 digits any is too large for a setting."""
    return int(text[:18]) if re.fullmatch("[0-9]+", text) else None


def _is_placeholder(value: str) -> bool:
    return value.startswith("${")
