"""Weight-only quantisation: the packed layout, its error, and that ONNX Runtime reads it as we mean it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from chunkkv_builder.onnx_graph.quantize import BITS, BLOCK, dequantize, quantize


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("shape", [(3, 32), (5, 64), (4, 40)])
def test_error_is_at_most_one_step(bits, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed, scales = quantize(weight, bits)
    step = np.repeat(np.abs(scales), BLOCK, axis=1)[:, : shape[1]]
    error = np.abs(dequantize(packed, scales, shape[1]) - weight)
    assert (error <= step * 1.001).all()
    assert (error <= step * 0.501).mean() > 0.9  # only values opposite to the largest may be clipped


@pytest.mark.parametrize("bits", BITS.values())
def test_the_largest_of_a_block_is_exact_and_zeros_stay_zero(bits):
    weight = np.zeros((2, BLOCK), np.float32)
    weight[1, 3] = -2.5
    packed, scales = quantize(weight, bits)
    assert np.array_equal(dequantize(packed, scales, BLOCK), weight)


@pytest.mark.parametrize("bits", BITS.values())
def test_onnxruntime_multiplies_with_the_dequantised_weight(bits):
    random = np.random.default_rng(1)
    weight = random.standard_normal((6, 96)).astype(np.float32)
    packed, scales = quantize(weight, bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        N=6,
        K=96,
        bits=bits,
        block_size=BLOCK,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 6])],
        [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = random.standard_normal((4, 96)).astype(np.float32)
    got = session.run(None, {"x": x})[0]
    expected = x @ dequantize(packed, scales, 96).T
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
