"""Loading graphs into ONNX Runtime and binding NumPy arrays to them by address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from chunkkv.errors import EngineError
from chunkkv.executors.host_cache import HostKVCache

CPU = ["CPUExecutionProvider"]


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of every graph; `threads` are intra-op threads, 0 leaves the number to ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # a plan per prompt length would be made, kept, and hardly met again
    return options


def load_graph(path: Path, threads: int) -> ort.InferenceSession:
    """Return the graph in `path`, ready to run on the CPU; raises EngineError for one that does not load."""
    try:
        return ort.InferenceSession(str(path), session_options(threads), providers=CPU)
    except Exception as error:  # ONNX Runtime's own classes share no base but this one
        raise EngineError(
            f"{path} does not load in ONNX Runtime {ort.__version__} ({str(error).splitlines()[0]}); "
            "build the engine again"
        ) from None


def bind_arrays(binding: ort.IOBinding, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Bind arrays by address; the caller keeps them alive until the run is over."""
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_cache(session: ort.InferenceSession, cache: HostKVCache) -> ort.IOBinding:
    """Return a binding with past and present on the same memory, so that the graph writes the cache in place."""
    binding = session.io_binding()
    for kind, arrays in (("key", cache.keys), ("value", cache.values)):
        for layer, array in enumerate(arrays):
            bind_arrays(binding, {f"past_{kind}.{layer}": array}, {f"present_{kind}.{layer}": array})
    return binding
