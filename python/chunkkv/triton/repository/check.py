"""What in a Triton model repository would break an engine with ChunkKV, or undo its benefit."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from chunkkv.engine.backends import TENSORRT_LLM
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.findings import Finding
from chunkkv.triton.repository.config_text import CONFIG_FILE, read_config, string_parameters
from chunkkv.triton.repository.cpp_backend import (
    BACKEND,
    IN_FLIGHT_BATCHING,
    LOADER_LIBRARY,
    NO_EVICTION,
    attention_windows,
    is_placeholder,
    is_speculative,
    whole_number,
)
from chunkkv.triton.server.files import numpy_problem

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Settings that must be false, and what happens where they are true.
_MUST_BE_FALSE = {
    "enable_kv_cache_reuse": "blocks of a compacted prompt hold other tokens than their hash says: "
    "the second hit of a prefix fails and ends every running request",
    "enable_chunked_context": "a prompt must come in one piece: its second chunk fails and ends every running request",
}
# Disaggregated serving: what its model names, and the variables that choose how caches travel between processes.
_DISAGGREGATED = ("context_model_name", "generation_model_name")
_TRANSFERS = tuple(f"TRTLLM_USE_{way}_KVCACHE" for way in ("MPI", "UCX", "NIXL", "MOONCAKE"))
_NO_TRANSFER = "caches move between processes as if they were whole: answers are wrong, and nothing fails"
# Settings with a largest value: the value, and why no larger one works.
_LARGEST = {
    "max_beam_width": (1, "beams share a prompt's blocks"),
    "sink_token_length": (0, "ChunkKV keeps sinks"),
    "kv_cache_host_memory_bytes": (0, "a live request's block on the host ends every running request"),
}


def check_repository(repository: Path, files: EngineFiles, environment: Mapping[str, str]) -> list[Finding]:
    """Return what every config.pbtxt of a repository says about serving an engine.

    Parameters
    ----------
    repository : Triton's model repository.
    files : the engine directory that it should serve.
    environment : variables with which tritonserver is going to be started.

    Without the extra `triton` the one finding says what to install.
    """
    if not repository.is_dir():
        return [
            Finding.breaks(
                "triton repository", f"{repository} is no directory", "give the --model-repository of Triton"
            )
        ]
    findings: list[Finding] = []
    runs_engine = False
    for path in sorted(repository.glob(f"*/{CONFIG_FILE}")):
        model = path.parent.name
        try:
            config = read_config(path, is_template=True)
        except BackendUnavailableError as error:
            return [Finding.breaks("triton repository", "was not checked", str(error))]
        except ConfigError as error:
            findings.append(Finding.breaks(model, str(error), "repair the file"))
            continue
        parameters = string_parameters(config)
        if files.settings is not None and any(name in parameters for name in _DISAGGREGATED):
            change = "serve the engine without disaggregated serving"
            findings.append(Finding.breaks(f"{model}: disaggregated serving", _NO_TRANSFER, change))
        if config.backend == BACKEND:
            runs_engine = True
            findings += _check_engine_model(model, config.max_batch_size, parameters, files)
            findings += _check_environment(model, files, environment)
        elif "engine_dir" in parameters:
            runs_engine = True
            findings += _check_path(model, "engine_dir", parameters["engine_dir"], files)
            findings += _check_python(model, parameters.get("EXECUTION_ENV_PATH", ""))
    if not runs_engine:
        change = f"make one with chunkkv triton init, or add a model with backend {BACKEND}"
        findings.append(Finding.breaks("triton repository", f"{repository} has no model that runs an engine", change))
    return findings


def _check_engine_model(
    model: str, max_batch_size: int, parameters: Mapping[str, str], files: EngineFiles
) -> list[Finding]:
    """Check a model of the C++ backend, which allocates blocks by logical length and returns none."""
    if files.backend != TENSORRT_LLM:
        change = "build with --backend tensorrt_llm, or serve it with chunkkv triton init"
        return [Finding.breaks(f"{model}: backend", f"{BACKEND} runs no engine of backend {files.backend}", change)]

    def value(name: str) -> str:
        return parameters.get(name, "")

    findings = _check_path(model, "gpt_model_path", value("gpt_model_path"), files)
    findings += [_must_be_false(model, name, value(name), reason) for name, reason in _MUST_BE_FALSE.items()]
    findings.append(_check_batching(model, value("gpt_model_type")))
    findings.append(_check_eviction(model, value("batch_scheduler_policy")))
    for name, (largest, reason) in _LARGEST.items():
        findings.append(_at_most(model, name, value(name), largest, reason))
    findings.append(_check_window(model, value("max_attention_window_size"), files.build["max_seq_len"]))
    if is_speculative(value("decoding_mode")):
        problem = f"{value('decoding_mode').lower()}: draft tokens and beams take tokens back by cache length"
        findings.append(Finding.breaks(f"{model}: decoding_mode", problem, "leave it empty, or top_k_top_p"))
    if max_batch_size > (limit := files.build["max_batch_size"]):
        problem = f"{max_batch_size}, the engine takes {limit}"
        findings.append(Finding.breaks(f"{model}: max_batch_size", problem, f"set it to {limit}"))
    memory = "the C++ runtime keeps allocating by logical length: decode gets faster, no KV memory comes back"
    change = "build TensorRT-LLM with docker/tensorrt_llm_patch, or serve it with chunkkv triton init"
    findings.append(Finding.warning(f"{model}: memory", memory, change))
    errors = "a step that a ChunkKV plugin refuses ends every request that is running, not the one at fault alone"
    if files.settings is not None:
        findings.append(Finding.warning(f"{model}: plugin errors", errors, "keep the settings above as they should be"))
    return findings


def _check_path(model: str, name: str, value: str, files: EngineFiles) -> list[Finding]:
    check, engine_dir = f"{model}: {name}", os.path.realpath(files.path)
    if not value or is_placeholder(value):
        return [Finding.breaks(check, f"{value or 'nothing'} is set", f"set {name} to {engine_dir}")]
    if not os.path.isdir(value):
        change = f"make sure that the server finds {engine_dir} there"
        return [Finding.warning(check, f"{value} is not on this machine, so it was not compared", change)]
    if os.path.realpath(value) != engine_dir:
        return [Finding.breaks(check, f"{value} is another engine", f"set {name} to {engine_dir}")]
    return [Finding.ok(check, value)]


def _must_be_false(model: str, name: str, value: str, reason: str) -> Finding:
    check, change = f"{model}: {name}", f'set {name} to "false"'
    if value.lower() in _TRUE:
        return Finding.breaks(check, f"{value}: {reason}", change)
    if value.lower() in _FALSE:
        return Finding.ok(check, value)
    return Finding.breaks(check, f"{value or 'not set'}: the default differs between versions; {reason}", change)


def _check_batching(model: str, value: str) -> Finding:
    check = f"{model}: gpt_model_type (batching_strategy)"  # what it is called, and what it is called in the templates
    if value == IN_FLIGHT_BATCHING:
        return Finding.ok(check, value)
    problem = f"{value or 'not set'}; only the source for {IN_FLIGHT_BATCHING} was read with ChunkKV in mind"
    return Finding.warning(check, problem, f"set it to {IN_FLIGHT_BATCHING}")


def _check_eviction(model: str, value: str) -> Finding:
    check = f"{model}: batch_scheduler_policy"
    if value == NO_EVICTION:
        return Finding.ok(check, value)
    problem = f"{value or 'not set'}: a request that is paused is prefilled again, and compressed with another length"
    return Finding.warning(check, problem, f"set it to {NO_EVICTION}")


def _at_most(model: str, name: str, value: str, largest: int, reason: str) -> Finding:
    if not value or is_placeholder(value):
        return Finding.ok(f"{model}: {name}", f"not set, {largest}")
    number = whole_number(value)
    if number is None or number > largest:
        return Finding.breaks(f"{model}: {name}", f"{value}: {reason}", f"set it to {largest}, or leave it out")
    return Finding.ok(f"{model}: {name}", value)


def _check_window(model: str, value: str, max_seq_len: int) -> Finding:
    check, windows = f"{model}: max_attention_window_size", attention_windows(value)
    if windows and min(windows) < max_seq_len:
        problem = f"{value}, below max_seq_len {max_seq_len}: a window that slides overwrites kept tokens"
        return Finding.breaks(check, problem, f"leave it out, or at least {max_seq_len}")
    return Finding.ok(check, value if windows else "not set")


def _check_python(model: str, environment: str) -> list[Finding]:
    python = Path(environment) / "bin" / "python" if environment else Path(sys.executable)
    problem = numpy_problem(python) if python.exists() else None
    change = "install it in an environment of its own, and name that with --python_env"
    return [Finding.breaks(f"{model}: numpy", problem, change)] if problem else []


def _check_environment(model: str, files: EngineFiles, environment: Mapping[str, str]) -> list[Finding]:
    if files.settings is None:
        return []
    findings = [
        Finding.breaks(f"{model}: {name}", f"{environment[name]}: {_NO_TRANSFER}", f"unset {name}")
        for name in _TRANSFERS
        if environment.get(name, "0") not in ("", "0")
    ]
    return [*findings, _check_preload(model, environment)]


def _check_preload(model: str, environment: Mapping[str, str]) -> Finding:
    check, preload = f"{model}: LD_PRELOAD", environment.get("LD_PRELOAD", "")
    change = f"start tritonserver with LD_PRELOAD=/path/to/{LOADER_LIBRARY} (mpirun: -x LD_PRELOAD)"
    paths = [path for path in re.split(r"[:\s]+", preload) if Path(path).name.startswith("libchunkkv_tensorrt")]
    if not paths:
        return Finding.breaks(check, "the C++ backend finds no ChunkKV plugins in this environment", change)
    if not Path(paths[0]).is_file():
        return Finding.breaks(check, f"{paths[0]} is no file", change)
    return Finding.ok(check, paths[0])
