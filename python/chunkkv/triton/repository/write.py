"""Writes Triton model repositories for an engine directory: layout `single` or `trtllm`."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from chunkkv.batching import BatchingLimits
from chunkkv.engine.backends import ONNXRUNTIME
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import ConfigError
from chunkkv.files import whole_directory
from chunkkv.logs import LEVELS
from chunkkv.session import MAX_THREADS
from chunkkv.triton.repository.config_text import CONFIG_FILE, parse, set_parameters, to_text
from chunkkv.triton.repository.layouts import LAYOUTS, RepositoryModel, single_layout, trtllm_layout

MODEL_FILE = "model.py"


@dataclass(frozen=True)
class ServeOptions:
    """Parameters of the model that holds the engine, written to its config.pbtxt.

    None, the default of each, leaves the parameter out; the model then uses the default named here.

    Parameters
    ----------
    slots : requests in work at once; 256 for an engine on ONNX Runtime, else as many rows as the engine takes.
    waiting : requests that may wait for a slot; 64. One more is refused.
    queue_timeout_s : longest wait for a slot, in seconds; 60.
    request_timeout_s : longest time of a request, waiting and answering together, in seconds; 600.
    kv_bytes : bound of the memory of all KV caches, in bytes; 80 % of the free memory for an engine on ONNX Runtime.
    max_prompt_bytes : longest prompt, in bytes of UTF-8; 32 per token of the engine's longest prompt, at least 64 KiB.
    stream_interval_ms : tokens that come sooner after the last response than this share one; 0 milliseconds.
    threads : threads of an engine on the CPU; one per core.
    log_level : least important log lines that are written: debug, info, warning or error; info.
    """

    slots: int | None = None
    waiting: int | None = None
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    kv_bytes: int | None = None
    max_prompt_bytes: int | None = None
    stream_interval_ms: float | None = None
    threads: int | None = None
    log_level: str | None = None

    def check(self, files: EngineFiles) -> None:
        """Raise ConfigError for what the model would refuse when the server starts on the engine in `files`."""
        max_batch_size = files.build["max_batch_size"]
        if self.slots is not None and self.slots > max_batch_size and files.backend != ONNXRUNTIME:
            raise ConfigError(
                f"slots is {self.slots}; this engine takes 1 to {max_batch_size} rows: give fewer, or build with a "
                "larger --max_batch_size"
            )
        if self.kv_bytes is not None and 0 < self.kv_bytes < (least := _least_kv_bytes(files)):
            raise ConfigError(
                f"kv_bytes is {self.kv_bytes}; the shortest answer of this engine needs {least}: give more"
            )
        limits = {field.name: getattr(self, field.name) for field in dataclasses.fields(BatchingLimits)}
        BatchingLimits(**{name: value for name, value in limits.items() if value is not None})
        if self.max_prompt_bytes is not None and self.max_prompt_bytes < 1:
            raise ConfigError(f"max_prompt_bytes is {self.max_prompt_bytes}; give a number of bytes of at least 1")
        if self.stream_interval_ms is not None and not 0 <= self.stream_interval_ms < math.inf:
            raise ConfigError(f"stream_interval_ms is {self.stream_interval_ms}; give milliseconds of at least 0")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads is {self.threads}; allowed is 1 to {MAX_THREADS}")
        if self.log_level is not None and self.log_level not in LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}; allowed is {' or '.join(LEVELS)}")


def write_repository(
    engine_dir: Path,
    repository: Path,
    layout: str = "single",
    options: ServeOptions | None = None,
    python_env: Path | None = None,
) -> list[str]:
    """Write the models of a layout and return their names.

    Parameters
    ----------
    engine_dir : engine directory that the models serve.
    repository : folder of the new model repository; it must not exist yet, or be empty.
    layout : `single`, one model, or `trtllm`, five under TensorRT-LLM's names.
    options : parameters of the engine's model; None leaves the default of each.
    python_env : virtual environment that runs the models; None: the python3 that the server finds.

    Raises EngineError for a directory that holds no engine, ConfigError for a repository that exists, an unknown layout
    or an option out of range, BackendUnavailableError without the extra `triton`. Nothing is written then.
    """
    options = ServeOptions() if options is None else options
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; allowed is {' or '.join(LAYOUTS)}")
    check_path(repository)
    if repository.exists() and any(repository.iterdir() if repository.is_dir() else [repository]):
        raise ConfigError(f"model_repository {repository} exists and is not empty; give a new directory")
    if python_env is not None and not (python_env / "bin" / "python").exists():
        raise ConfigError(f"python_env {python_env} has no bin/python; give a virtual environment")
    files = EngineFiles.load(engine_dir)
    options.check(files)
    if not (files.path / "tokenizer.json").is_file():
        raise ConfigError(
            f"{engine_dir} has no tokenizer.json, and these models take text: build the engine from a checkpoint with "
            "its tokenizer"
        )
    parameters = {"engine_dir": os.path.abspath(engine_dir), **dataclasses.asdict(options)}
    models = single_layout(parameters) if layout == "single" else trtllm_layout(parameters)
    with whole_directory(repository) as folder:
        for model in models:
            if python_env is not None and model.module is not None:
                set_parameters(model.config, {"EXECUTION_ENV_PATH": os.path.abspath(python_env)})
            _write_model(model, folder / model.config.name)
    return [model.config.name for model in models]


def _least_kv_bytes(files: EngineFiles) -> int:
    """Return the bytes of a row with one token of a prompt and one of an answer; on ONNX Runtime whole pages."""
    model, heads = files.model, 2 * files.model["num_hidden_layers"] * files.model["num_key_value_heads"]
    if files.backend != ONNXRUNTIME:
        return heads * 2 * model["head_size"]
    return heads * -(-2 * model["head_size"] * 4 // mmap.PAGESIZE) * mmap.PAGESIZE


def check_path(repository: Path) -> None:
    """Raise ConfigError for a path with white space: Triton's python backend splits it and never starts."""
    if any(letter.isspace() for letter in os.path.abspath(repository)):
        raise ConfigError(
            f"model_repository {os.path.abspath(repository)!r} has white space in it, with which Triton's python "
            "backend does not start: choose another directory"
        )


def _write_model(model: RepositoryModel, folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    text = to_text(model.config)
    assert parse(text, folder) == model.config, "what is written is what Triton will read"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    if model.module is not None:
        program = (
            '"""Made by chunkkv triton init; the model itself is part of the package chunkkv."""\n\n'
            f"from {model.module} import TritonPythonModel\n\n"
            '__all__ = ["TritonPythonModel"]\n'
        )
        (folder / "1" / MODEL_FILE).write_text(program, encoding="utf-8")
