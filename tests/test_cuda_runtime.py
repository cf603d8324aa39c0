"""The CUDA runtime wrapper: on a double, and its names against a real libcudart where one is installed."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from support.cuda_double import CudartDouble

from chunkkv.errors import BackendUnavailableError, EngineRunError
from chunkkv.gpu import cuda_runtime
from chunkkv.gpu.cuda_runtime import FUNCTIONS, CudaRuntime


@pytest.fixture
def library() -> CudartDouble:
    return CudartDouble()


@pytest.fixture
def cuda(library: CudartDouble) -> CudaRuntime:
    return CudaRuntime(library)  # type: ignore[arg-type]


def test_copies_go_there_and_back(cuda: CudaRuntime) -> None:
    stream, data = cuda.stream(), np.arange(1000, dtype=np.int64)
    buffer = cuda.device_memory(data.nbytes)
    stream.upload(buffer.address, data)
    back = np.zeros_like(data)
    stream.download(back, buffer.address)
    stream.synchronize()
    assert np.array_equal(back, data)


def test_memory_is_freed_with_its_owner(cuda: CudaRuntime, library: CudartDouble) -> None:
    buffer, pinned = cuda.device_memory(100), cuda.pinned((3, 2), np.float32)
    assert pinned.array.shape == (3, 2) and not pinned.array.any()
    assert buffer.address % cuda_runtime.ALIGNMENT == 0 and (len(library.memory), len(library.pinned)) == (1, 1)
    view = pinned.array[1:]
    del buffer, pinned
    gc.collect()
    assert not library.memory and library.pinned, "a view keeps pinned memory alive"
    del view
    gc.collect()
    assert not library.pinned


def test_a_captured_graph_runs_when_launched_and_as_often(cuda: CudaRuntime, library: CudartDouble) -> None:
    stream, source, target = cuda.stream(), cuda.pinned((4,), np.float32), cuda.pinned((4,), np.float32)
    buffer = cuda.device_memory(16)

    def work() -> None:
        stream.upload(buffer.address, source.array)
        stream.download(target.array, buffer.address)

    graph = stream.capture(work)
    stream.synchronize()
    assert not target.array.any()
    for value in (1, 2):
        source.array[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (target.array == value).all()
    del graph
    gc.collect()
    assert not library.live_graphs


def test_a_failed_capture_ends_and_passes_the_error_on(cuda: CudaRuntime, library: CudartDouble) -> None:
    stream = cuda.stream()
    with pytest.raises(ZeroDivisionError):
        stream.capture(lambda: 1 / 0)
    assert not library.live_graphs
    stream.synchronize()  # the stream is usable again


def test_a_failing_call_is_told_in_cudas_words_and_not_blamed_on_the_next(cuda: CudaRuntime, library) -> None:
    with pytest.raises(EngineRunError, match="cudaFree failed with CUDA error 1: text of 1"):
        cuda.call("cudaFree", 12345)
    assert library.calls[-1] == "cudaGetLastError"


def test_no_gpu_is_no_error(library: CudartDouble, cuda: CudaRuntime) -> None:
    assert cuda.device_count() == 1
    library.devices = 0
    assert cuda.device_count() == 0


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runtime, "_candidates", lambda: ["/nowhere/libcudart.so.13"])
    with pytest.raises(
        BackendUnavailableError, match=r"the CUDA runtime libcudart\.so\.13 or \.12, which was not found"
    ):
        CudaRuntime.load.__wrapped__()


def test_a_real_runtime_has_every_function() -> None:
    try:
        found = CudaRuntime.load()
    except BackendUnavailableError as error:
        pytest.skip(f"this machine lacks {error}")
    assert all(getattr(found._library, name) for name in FUNCTIONS)
    assert found.device_count() >= 0
