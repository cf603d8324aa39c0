"""Whether this processor multiplies whole numbers of 8 bits exactly, as ONNX Runtime uses it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnxruntime as ort

# Enough inputs that every kernel takes its widest instruction, each with the largest products that there are.
_INPUTS, _OUTPUTS = 64, 16
_INPUT, _WEIGHT = 255, 127
_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})  # as Linux calls it


@functools.cache
def products_overflow() -> bool:
    """Return whether unsigned inputs times signed weights come out wrong, which large values show at once.

    Processors of x86 without VNNI add two products in 16 bits, which overflow. ONNX Runtime has an exact kernel for
    them, which takes more than twice as long as VNNI. No interface of it tells which processor needs that, so one
    product is tried where the system does not say that there is VNNI.
    """
    return not has_vnni() and one_product_overflows()


def has_vnni() -> bool:
    """Return whether the system says that the processor has VNNI; only Linux says so."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _VNNI.isdisjoint(flags)


def one_product_overflows() -> bool:
    """Return whether ONNX Runtime multiplies unsigned inputs with signed weights wrongly, by trying it."""
    from onnx import TensorProto, helper, numpy_helper  # no other part of a generation needs that package

    weight = np.full((_INPUTS, _OUTPUTS), _WEIGHT, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["inputs", "weight"], ["outputs"])],
        "products",
        [helper.make_tensor_value_info("inputs", TensorProto.UINT8, [1, _INPUTS])],
        [helper.make_tensor_value_info("outputs", TensorProto.INT32, [1, _OUTPUTS])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"inputs": np.full((1, _INPUTS), _INPUT, np.uint8)})
    return bool((outputs != _INPUTS * _INPUT * _WEIGHT).any())
