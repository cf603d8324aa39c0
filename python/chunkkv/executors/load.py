"""Picks the executor that an engine directory was built for; no engine is imported before it is needed."""

from __future__ import annotations

from chunkkv.engine.directory import TENSORRT_LLM, EngineFiles
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.executors.interface import Executor

RUNNABLE = ("onnxruntime", "tensorrt", TENSORRT_LLM)


def load_executor(
    files: EngineFiles, threads: int | None = None, max_tokens_in_paged_kv_cache: int | None = None
) -> Executor:
    """Return the executor of a checked engine directory; `threads` is for engines that run on the CPU.

    `max_tokens_in_paged_kv_cache` sizes the pool of a TensorRT-LLM engine; RequestError where another one gets it.
    Raises EngineMismatchError for another backend's engine, BackendUnavailableError where its libraries are missing.
    """
    if max_tokens_in_paged_kv_cache is not None and files.backend != TENSORRT_LLM:
        raise RequestError(
            f"max_tokens_in_paged_kv_cache was given, but {files.path} was built for backend {files.backend!r}, whose "
            "caches are not paged: leave it out"
        )
    if files.backend == "onnxruntime":
        from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor

        executor = OnnxRuntimeExecutor(files.path, files.build["max_num_tokens"], files.settings, threads)
        for name, found in (("vocab_size", executor.vocab_size), ("num_hidden_layers", executor.num_layers)):
            if files.model[name] != found:
                raise EngineMismatchError(
                    f"{files.path}: config.json says {name} is {files.model[name]}, its graph has {found}; "
                    "build the engine again"
                )
        return executor
    if files.backend == "tensorrt":
        from chunkkv.executors.tensorrt.executor import TensorRTExecutor

        return TensorRTExecutor(files.path, files.versions, files.settings is not None)
    if files.backend == TENSORRT_LLM:
        from chunkkv.executors.tensorrt_llm.executor import load_tensorrt_llm

        return load_tensorrt_llm(files, max_tokens_in_paged_kv_cache)
    raise EngineMismatchError(
        f"{files.path} was built for backend {files.backend!r}; this session runs {' and '.join(map(repr, RUNNABLE))}"
    )
