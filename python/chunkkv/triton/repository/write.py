"""Writes Triton model repositories for an engine directory: layout `single` or `trtllm`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.batching.batcher import BatchingLimits
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import ConfigError
from chunkkv.files import whole_directory
from chunkkv.session import MAX_THREADS
from chunkkv.triton.models.logs import LEVELS
from chunkkv.triton.repository.config_text import (
    CONFIG_FILE,
    Tensor,
    add_tensors,
    new_config,
    parse,
    run_on_cpu,
    set_parameters,
    to_text,
)

LAYOUTS = ("single", "trtllm")
MODEL_FILE = "model.py"
_SINGLE = "chunkkv"

# Per request, besides TensorRT-LLM's names.
BUDGET: tuple[Tensor, ...] = (("keep_ratio", "FP32", (1,)), ("budget_tokens", "INT32", (1,)))
SAMPLING: tuple[Tensor, ...] = (
    ("temperature", "FP32", (1,)),
    ("top_k", "INT32", (1,)),
    ("top_p", "FP32", (1,)),
    ("repetition_penalty", "FP32", (1,)),
    ("seed", "UINT64", (1,)),
    ("end_id", "INT32", (1,)),
    ("pad_id", "INT32", (1,)),
    # Accepted at the value that means "off", so that clients which always send them work.
    ("beam_width", "INT32", (1,)),
    ("num_return_sequences", "INT32", (1,)),
    ("min_tokens", "INT32", (1,)),
    ("presence_penalty", "FP32", (1,)),
    ("frequency_penalty", "FP32", (1,)),
    ("length_penalty", "FP32", (1,)),
)
TEXT_INPUTS: tuple[Tensor, ...] = (
    ("text_input", "STRING", (1,)),
    ("max_tokens", "INT32", (1,)),
    ("stop_words", "STRING", (-1,)),
    ("bad_words", "STRING", (-1,)),
    ("stream", "BOOL", (1,)),
    ("exclude_input_in_output", "BOOL", (1,)),
    ("ignore_eos", "BOOL", (1,)),
    *SAMPLING,
    *BUDGET,
)
SINGLE_INPUTS: tuple[Tensor, ...] = (
    *TEXT_INPUTS,
    ("return_num_input_tokens", "BOOL", (1,)),
    ("return_num_output_tokens", "BOOL", (1,)),
)
COUNTS: tuple[Tensor, ...] = tuple(
    (name, "INT32", (1,)) for name in ("num_input_tokens", "num_output_tokens", "kept_tokens")
)
SINGLE_OUTPUTS: tuple[Tensor, ...] = (
    ("text_output", "STRING", (1,)),
    ("output_ids", "INT32", (-1,)),
    ("finish_reason", "STRING", (1,)),
    *COUNTS,
    ("kv_cache_bytes", "INT64", (1,)),
    *((name, "FP32", (1,)) for name in ("ttft_ms", "tpot_ms", "prefill_ms", "compress_ms")),
)


@dataclass(frozen=True)
class ServeOptions:
    """Parameters of the model that holds the engine; None leaves the default of the model (chunkkv.batching)."""

    slots: int | None = None
    waiting: int | None = None
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    kv_bytes: int | None = None
    max_prompt_bytes: int | None = None
    stream_interval_ms: float | None = None
    threads: int | None = None
    log_level: str | None = None

    def check(self, max_batch_size: int) -> None:
        """Raise ConfigError for what the model would refuse when the server starts."""
        if self.slots is not None and not 1 <= self.slots <= max_batch_size:
            raise ConfigError(
                f"slots is {self.slots}; this engine takes 1 to {max_batch_size} rows: give fewer, or build with a "
                "larger --max_batch_size"
            )
        names = {field.name for field in dataclasses.fields(BatchingLimits)}
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        BatchingLimits(**{name: value for name, value in given.items() if name in names})
        if self.max_prompt_bytes is not None and self.max_prompt_bytes < 1:
            raise ConfigError(f"max_prompt_bytes is {self.max_prompt_bytes}; give a number of bytes of at least 1")
        if self.stream_interval_ms is not None and not 0 <= self.stream_interval_ms < math.inf:
            raise ConfigError(f"stream_interval_ms is {self.stream_interval_ms}; give milliseconds of at least 0")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads is {self.threads}; allowed is 1 to {MAX_THREADS}")
        if self.log_level is not None and self.log_level not in LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}; allowed is {' or '.join(LEVELS)}")


@dataclass(frozen=True)
class Model:
    """One model of a repository: its configuration and the Python class behind it, None for an ensemble."""

    config: Any
    python: str | None


def write_repository(
    engine_dir: Path,
    repository: Path,
    layout: str = "single",
    options: ServeOptions | None = None,
    python_env: Path | None = None,
    bls_instances: int = 4,
) -> list[str]:
    """Write the models of a layout and return their names.

    `python_env` is the virtual environment that runs them (None: the python3 that the server finds). Raises
    EngineError for a directory that holds no engine, ConfigError for a repository that exists or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; allowed is {' or '.join(LAYOUTS)}")
    check_place(repository)
    if repository.exists() and any(repository.iterdir() if repository.is_dir() else [repository]):
        raise ConfigError(f"model_repository {repository} exists and is not empty; give a new directory")
    if python_env is not None and not (python_env / "bin" / "python").exists():
        raise ConfigError(f"python_env {python_env} has no bin/python; give a virtual environment")
    files = EngineFiles.load(engine_dir)
    parameters = {"engine_dir": os.path.abspath(engine_dir), **dataclasses.asdict(options or ServeOptions())}
    (options or ServeOptions()).check(files.build["max_batch_size"])
    if bls_instances < 1:
        raise ConfigError(f"bls_instances is {bls_instances}; give at least 1")
    if layout == "single":
        models = [single(parameters)]
    else:
        from chunkkv.triton.repository.write_trtllm import trtllm

        models = trtllm(parameters, bls_instances)
    if python_env is not None:
        for model in models:
            if model.python is not None:
                set_parameters(model.config, {"EXECUTION_ENV_PATH": os.path.abspath(python_env)})
    _write(repository, models)
    return [model.config.name for model in models]


def check_place(repository: Path) -> None:
    """Raise ConfigError for a path with white space: Triton's python backend splits it and never starts."""
    if any(letter.isspace() for letter in os.path.abspath(repository)):
        raise ConfigError(
            f"model_repository {os.path.abspath(repository)!r} has white space in it, with which Triton's python "
            "backend does not start: choose another directory"
        )


def single(parameters: Mapping[str, object]) -> Model:
    """Return the one model of layout `single`.

    Its batch dimension of 1 is for clients that send every value as [[x]]; batching is the model's own matter.
    """
    config = new_config(name=_SINGLE, backend="python", max_batch_size=1)
    config.model_transaction_policy.decoupled = True
    add_tensors(config, SINGLE_INPUTS, ("text_input",), SINGLE_OUTPUTS)
    run_on_cpu(config)
    set_parameters(config, parameters)
    return Model(config, "chunkkv.triton.models.model")


def _write(repository: Path, models: list[Model]) -> None:
    """Write all models to a folder beside the repository and rename it."""
    with whole_directory(repository) as folder:
        for model in models:
            _write_model(model, folder / model.config.name)


def _write_model(model: Model, folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    text = to_text(model.config)
    assert parse(text, folder) == model.config
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    if model.python is not None:
        program = (
            '"""Made by chunkkv triton init; the model itself is part of the package chunkkv."""\n\n'
            f"from {model.python} import TritonPythonModel\n\n"
            '__all__ = ["TritonPythonModel"]\n'
        )
        (folder / "1" / MODEL_FILE).write_text(program, encoding="utf-8")
