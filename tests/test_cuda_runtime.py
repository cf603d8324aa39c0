"""The CUDA runtime layer: on a double, and the double against NVIDIA's cuda.bindings.runtime."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
from support import cuda_double
from support.cuda_double import CudartDouble
from support.messages import naming

from chunkkv.errors import BackendUnavailableError, EngineRunError
from chunkkv.gpu import cuda_runtime
from chunkkv.gpu.cuda_runtime import CudaRuntime, DeviceProperties, Gpu, RuntimeBindings


@pytest.fixture
def library() -> CudartDouble:
    return CudartDouble()


@pytest.fixture
def cuda(library: CudartDouble) -> CudaRuntime:
    return CudaRuntime(library)


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
    with pytest.raises(EngineRunError, match=naming("cudaMalloc cudaErrorMemoryAllocation")):
        cuda.device_memory(1 << 40)
    assert library.cudaGetLastError() == (library.cudaError_t.cudaSuccess,)


def test_no_gpu_is_no_error(library: CudartDouble, cuda: CudaRuntime) -> None:
    assert cuda.device_count() == 1
    library.devices = 0
    assert cuda.device_count() == 0


def test_a_gpu_is_named_with_its_compute_capability_and_memory(cuda: CudaRuntime, library: CudartDouble) -> None:
    library.gpu_name = b"NVIDIA Name\0\0"
    assert cuda.gpu(0) == cuda.gpu() == Gpu("NVIDIA Name", "8.9", 2 << 30)
    assert cuda.gpu().description == "NVIDIA Name, compute capability 8.9, 2.0 GiB"
    with pytest.raises(EngineRunError, match="cudaGetDeviceProperties"):
        cuda.gpu(1)


def test_properties_of_a_gpu_have_the_names_of_the_real_bindings(bindings: ModuleType) -> None:
    used = [name for name, item in vars(DeviceProperties).items() if isinstance(item, property)]
    assert len(used) == 4 and set(used) <= set(dir(bindings.cudaDeviceProp()))


def test_a_machine_without_cuda_bindings_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailableError, match=naming("cuda-bindings 'chunkkv-trt[tensorrt]'")):
        CudaRuntime.load.__wrapped__()


@pytest.fixture(scope="module")
def bindings() -> ModuleType:
    return pytest.importorskip("cuda.bindings.runtime", reason="this environment lacks cuda-bindings")


USED = {name: hint for name, hint in get_type_hints(RuntimeBindings).items() if get_origin(hint) is Callable}


@pytest.mark.parametrize("name", USED)
def test_functions_have_the_parameters_of_the_real_bindings(bindings: ModuleType, name: str) -> None:
    parameters = list(inspect.signature(getattr(bindings, name)).parameters)
    assert list(inspect.signature(getattr(CudartDouble(), name)).parameters) == parameters
    assert len(get_args(USED[name])[0]) == len(parameters)


def test_enums_and_constants_have_the_values_of_the_real_bindings(bindings: ModuleType) -> None:
    for double in (cuda_double.cudaError_t, cuda_double.cudaMemcpyKind, cuda_double.cudaStreamCaptureMode):
        real = getattr(bindings, double.__name__)
        assert {member.name: member.value for member in double} == {
            member.name: int(getattr(real, member.name)) for member in double
        }
    assert CudartDouble.cudaStreamNonBlocking == bindings.cudaStreamNonBlocking


def test_the_real_bindings_work_or_say_what_this_machine_lacks(bindings: ModuleType) -> None:
    cuda = CudaRuntime(bindings)
    if cuda.device_count() == 0:
        with pytest.raises(EngineRunError, match=r"cudaMalloc .*\bcudaError[A-Z]\w+"):
            cuda.device_memory(256)
        return
    test_copies_go_there_and_back(cuda)
    stream, pinned, buffer = cuda.stream(), cuda.pinned((4,), np.float32), cuda.device_memory(16)
    stream.upload(buffer.address, np.arange(4, dtype=np.float32))
    graph = stream.capture(lambda: stream.download(pinned.array, buffer.address))
    graph.launch(stream)
    stream.synchronize()
    assert pinned.array.tolist() == [0, 1, 2, 3]
