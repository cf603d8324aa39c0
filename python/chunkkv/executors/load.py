"""Picks the executor that an engine directory was built for; no engine is imported before it is needed."""

from __future__ import annotations

from typing import Any

from chunkkv.engine.backends import ONNXRUNTIME, TENSORRT, TENSORRT_LLM
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.executors.interface import Executor


def load_executor(
    files: EngineFiles, threads: int | None = None, max_tokens_in_paged_kv_cache: int | None = None
) -> Executor[Any]:
    """Return the executor of a checked engine directory.

    Raises EngineMismatchError for another backend's engine, BackendUnavailableError where its libraries are missing,
    RequestError for a pool size that the engine has no use for.

    Parameters
    ----------
    files : EngineFiles
        The checked directory.
    threads : int or None, default None
        Threads of an engine that runs on the CPU; None leaves the number to it.
    max_tokens_in_paged_kv_cache : int or None, default None
        Tokens in the pool of a TensorRT-LLM engine; None takes what the GPU has free.
    """
    if max_tokens_in_paged_kv_cache is not None and files.backend != TENSORRT_LLM:
        raise RequestError(
            f"max_tokens_in_paged_kv_cache was given, but {files.path} was built for backend {files.backend!r}, whose "
            "caches are not paged: leave it out"
        )
    # Each executor takes caches of its own class only. Callers hand back what new_cache() gave them, so they need not
    # know that class; Python has no type that says so, hence Any.
    if files.backend == ONNXRUNTIME:
        return _load_onnxruntime(files, threads)
    if files.backend == TENSORRT:
        from chunkkv.executors.tensorrt.executor import TensorRTExecutor

        assert files.tensorrt is not None  # the manifest of this backend has it
        return TensorRTExecutor(files.path, files.tensorrt)
    if files.backend == TENSORRT_LLM:
        from chunkkv.executors.tensorrt_llm.executor import load_tensorrt_llm

        return load_tensorrt_llm(files, max_tokens_in_paged_kv_cache)
    raise EngineMismatchError(f"{files.path}: no executor is known for backend {files.backend!r}")


def _load_onnxruntime(files: EngineFiles, threads: int | None) -> Executor[Any]:
    from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
    from chunkkv.executors.onnxruntime.graphs import check_eight_bit_cache

    if files.build.get("kv_cache_dtype") == "int8":
        check_eight_bit_cache(files.path)
    executor = OnnxRuntimeExecutor(files.path, files.build["max_num_tokens"], files.settings, threads)
    for name, in_graph in (("vocab_size", executor.step.vocab_size), ("num_hidden_layers", executor.step.num_layers)):
        if files.model[name] != in_graph:
            raise EngineMismatchError(
                f"{files.path}: config.json says {name} is {files.model[name]}, its graph has {in_graph}; "
                "build the engine again"
            )
    return executor
