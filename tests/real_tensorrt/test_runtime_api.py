"""What this project calls of TensorRT for RTX at run time exists, with these parameters, in NVIDIA's own bindings.

They load on any machine, so these are the real ones, their library included; only deserialising needs a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from support import tensorrt_double as plain
from support import tensorrt_rtx_double as double
from test_tensorrt_api import used_names

from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.gpu.tensorrt_library import TensorRT, missing_gpu
from chunkkv.gpu.tensorrt_validity import why_not_valid

# Per class of the doubles the members that run an engine; what builds one is tested by building.
CLASSES: dict[type, str] = {
    double.IRuntimeCache: "serialize deserialize",
    double.IRuntimeConfig: "create_runtime_cache set_runtime_cache set_execution_context_allocation_strategy "
    "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
    double.Context: "set_tensor_address set_input_shape execute_async_v3 set_device_memory is_stream_capturable",
    double.Engine: "num_io_tensors get_tensor_name get_aliased_input_tensor create_runtime_config "
    "create_execution_context device_memory_size_v2",
    double.Runtime: "deserialize_cuda_engine get_engine_validity engine_header_size",
    plain.Registry: "load_library get_creator",
}
REAL_NAMES = {double.Context: "IExecutionContext", double.Engine: "ICudaEngine", plain.Registry: "IPluginRegistry"}


@pytest.mark.parametrize("item", CLASSES, ids=lambda item: item.__name__)
def test_the_double_has_the_members_and_parameters_of_the_real_class(rtx: TensorRT, item: type) -> None:
    real = getattr(rtx.module, REAL_NAMES.get(item, item.__name__))
    for member in CLASSES[item].split():
        offered = getattr(real, member)
        played = inspect.getattr_static(item, member, None)
        if not inspect.isfunction(played):
            assert isinstance(offered, property), f"{real.__name__}.{member} is no property"
            continue
        expected = list(inspect.signature(played).parameters)[1:]
        signatures = re.findall(rf"^(?:\d+\. )?{member}\(self: [\w.]+(.*)\) ->", offered.__doc__, re.MULTILINE)
        names = [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]
        assert expected in names, f"{real.__name__}.{member} takes {names}, the double {expected}"


@pytest.mark.parametrize("item", double.ENUMS, ids=lambda item: item.__name__)
def test_enums_have_the_values_of_the_real_ones(rtx: TensorRT, item: Any) -> None:
    real = getattr(rtx.module, item.__name__).__members__
    if item is double.ComputeCapability:
        assert {member.name for member in item} <= set(real)
    else:
        assert {member.name: member.value for member in item} == {name: int(value) for name, value in real.items()}


def test_every_name_in_the_sources_exists(rtx: TensorRT) -> None:
    chains = used_names()
    assert ("CudaGraphStrategy", "DISABLED") in chains and ("Runtime",) in chains
    for chain in chains:
        item = getattr(rtx.module, chain[0])
        assert len(chain) == 1 or hasattr(item, chain[1]), chain


def test_a_context_is_made_from_a_config_as_well_as_from_a_strategy(rtx: TensorRT) -> None:
    described = rtx.module.ICudaEngine.create_execution_context.__doc__
    assert "runtime_config: " in described and "IRuntimeConfig" in described


def test_a_file_that_is_no_engine_is_told_from_one_without_loading_it(rtx: TensorRT, tmp_path: Path) -> None:
    file = tmp_path / "prefill.engine"
    file.write_bytes(b"no engine" * 100)
    assert "MALFORMED_ENGINE" in (why_not_valid(rtx, file) or "")
    file.write_bytes(small_engine(rtx.module))
    reason = why_not_valid(rtx, file)
    assert "MALFORMED_ENGINE" not in (reason or "")
    if missing_gpu():
        assert reason is not None and "cudaError" in reason


def small_engine(trt: Any) -> bytes:
    """Build a network of one layer."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    layer = network.add_activation(network.add_input("x", trt.float32, (1, 8)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))


def test_what_needs_a_gpu_and_was_not_run_here_is_known(rtx: TensorRT) -> None:
    """Without a GPU no engine deserialises, so the executor's use of these classes has met the double alone."""
    if not missing_gpu():
        pytest.skip("this machine has a GPU: run benchmarks/tensorrt_end_to_end.py")
    importlib.import_module(rtx.module.__name__)
    logger = rtx.module.Logger(rtx.module.Logger.INTERNAL_ERROR)
    assert rtx.module.Runtime(logger).deserialize_cuda_engine(small_engine(rtx.module)) is None
    assert CudaRuntime.load().device_count() == 0
