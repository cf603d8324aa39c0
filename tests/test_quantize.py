"""Weight-only quantisation: the packed layout, its error, and that ONNX Runtime reads it as we mean it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import engines

from chunkkv.executors.onnxruntime.graphs import load_graph
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph import quantize as rounding
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.projections import CONTRIB, Projections
from chunkkv_builder.onnx_graph.quantize import (
    BITS,
    BLOCK,
    dequantize,
    plain_scales,
    quantize,
    quantize_channels,
    search_scales,
)
from chunkkv_builder.onnx_graph.weights import WeightSource, write_weights


@pytest.mark.parametrize("shape", [(3, 32), (5, 64), (4, 40)])
def test_error_of_int8_is_at_most_one_step(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed, scales = quantize(weight, 8)
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


def squared_errors(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the sum of each block's squared errors with codes from -8 to 7."""
    codes = np.clip(np.rint(blocks / scales[..., None]), -8, 7)
    return ((codes * scales[..., None] - blocks) ** 2).sum(axis=2)


def test_searched_scales_lower_the_error_of_every_block():
    blocks = np.random.default_rng(2).standard_normal((64, 9, BLOCK)).astype(np.float32)
    plain, searched = (squared_errors(blocks, scales) for scales in (plain_scales(blocks, 4), search_scales(blocks)))
    assert (searched <= plain * 1.0001).all()
    assert searched.sum() < 0.9 * plain.sum()


def test_quantize_searches_for_int4_and_not_for_int8():
    weight = np.random.default_rng(3).standard_normal((8, 96)).astype(np.float32)
    blocks = weight.reshape(8, 3, BLOCK)
    assert np.array_equal(quantize(weight, 4)[1], search_scales(blocks))
    assert np.array_equal(quantize(weight, 8)[1], plain_scales(blocks, 8))


@pytest.mark.parametrize("shape", [(3, 32), (4, 40)])
def test_packed_int4_is_as_close_as_its_scales_allow(shape):
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    packed, scales = quantize(weight, 4)
    blocks = np.zeros((*scales.shape, BLOCK), np.float32).reshape(shape[0], -1)
    blocks[:, : shape[1]] = weight
    error = ((dequantize(packed, scales, shape[1]) - weight) ** 2).sum()
    assert error == pytest.approx(squared_errors(blocks.reshape(*scales.shape, BLOCK), scales).sum(), rel=1e-5)


def test_the_search_gives_the_same_in_parts(monkeypatch):
    blocks = np.random.default_rng(4).standard_normal((10, 3, BLOCK)).astype(np.float32)
    whole = search_scales(blocks)
    monkeypatch.setattr(rounding, "_VALUES_AT_ONCE", 4 * 3 * BLOCK)
    assert np.array_equal(search_scales(blocks), whole)


def test_blocks_of_zeros_and_of_tiny_values_stay_finite():
    weight = np.zeros((3, BLOCK), np.float32)
    weight[1], weight[2] = 1e-30, 1e18
    packed, scales = quantize(weight, 4)
    assert np.isfinite(scales).all()
    values = dequantize(packed, scales, BLOCK)
    assert np.allclose(values, weight, rtol=1e-6, atol=0)


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


def test_channels_have_their_largest_value_exactly_and_zeros_stay_zero() -> None:
    weight = np.random.default_rng(7).standard_normal((5, 40)).astype(np.float32)
    weight[2] = 0
    codes, scales = quantize_channels(weight)
    assert codes.dtype == np.int8 and codes.shape == (40, 5) and scales.shape == (5,)
    values = codes.T * scales[:, None]
    assert (np.abs(values - weight) <= 0.501 * scales[:, None]).all()
    assert np.allclose(np.abs(values).max(axis=1), np.abs(weight).max(axis=1), rtol=1e-6)


def test_products_of_whole_numbers_round_inputs_by_row_and_add_exactly(tmp_path: Path) -> None:
    """Extreme codes would overflow sums of 16 bits."""
    random = np.random.default_rng(8)
    weight = random.choice(np.float32([-3, 3]), (12, 256))
    weight[:4] = random.standard_normal((4, 256))
    codes, scales = quantize_channels(weight)
    arrays = {"model.a.weight.channels": codes, "model.a.weight.channel_scales": scales}
    sources = [WeightSource(name, array.shape, str(array.dtype), array.copy) for name, array in arrays.items()]
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama3")).config
    e = GraphEmitter()
    project = Projections(e, model, write_weights(tmp_path / "weights", sources), "int8")
    e.op("Identity", [project.emit("model.a", e.input("x", "float32", ["rows", 256]))], ["y"])
    e.output("y", "float32", ["rows", 12])
    onnx.save_model(e.model("product", opset=23, domains=[(CONTRIB, 1)]), tmp_path / "product.onnx")
    x = random.standard_normal((9, 256)).astype(np.float32)
    x[3], x[4], x[5] = 0, 1e-20, np.sign(x[5]) * 50
    step = np.maximum(np.abs(x).max(axis=1, keepdims=True) / 127, 1e-30)
    expected = (np.rint(x / step) * step).astype(np.float64) @ (codes * scales.astype(np.float64))
    y = load_graph(tmp_path / "product.onnx", 1).run(None, {"x": x})[0]
    # A value halfway between two codes may be rounded to either of them.
    tolerance = 3 * step * np.abs(codes * scales).max()
    assert (np.abs(y - expected) <= np.where(np.abs(x).max(axis=1, keepdims=True) == 0, 0, tolerance)).all()
    assert (y[3] == 0).all()


@pytest.mark.parametrize("has_bias", [False, True])
def test_two_products_of_whole_numbers_leave_out_the_rows_scales_between_them(tmp_path: Path, has_bias: bool) -> None:
    random = np.random.default_rng(9)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in (("up", (96, 64)), ("down", (64, 96))):
        codes, scales = quantize_channels(random.standard_normal(shape).astype(np.float32))
        arrays |= {f"{name}.weight.channels": codes, f"{name}.weight.channel_scales": scales}
    if has_bias:
        arrays["up.bias"] = random.standard_normal(96).astype(np.float32)
    sources = [WeightSource(name, array.shape, str(array.dtype), array.copy) for name, array in arrays.items()]
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama3")).config
    locations = write_weights(tmp_path / "weights", sources)
    given = {"value": random.standard_normal((50, 64)), "gate": random.standard_normal((50, 96))}
    given["value"] *= 10.0 ** np.arange(-25, 25)[:, None]  # rows of all sizes
    given["value"][7], given["gate"][8] = 0, 0
    found = []
    for is_short in (True, False):
        e = GraphEmitter()
        project = Projections(e, model, locations, "int8")
        value, gate = e.input("value", "float32", ["rows", 64]), e.input("gate", "float32", ["rows", 96])
        if is_short:
            output = project.emit_of_product("down", gate, "up", value)
        else:
            output = project.emit("down", e.op("Mul", [gate, project.emit("up", value)]))
        e.output(output, "float32", ["rows", 64])
        onnx.save_model(e.model("product", opset=23, domains=[(CONTRIB, 1)]), tmp_path / "product.onnx")
        arrays = {name: array.astype(np.float32) for name, array in given.items()}
        found += load_graph(tmp_path / "product.onnx", 1).run(None, arrays)
    short, long = found
    assert (np.abs(short - long).max(axis=1) <= 0.02 * np.abs(long).max(axis=1)).all(), "a code may be its neighbour"
    assert np.array_equal(short, long) == has_bias, "a bias is added to what the scales were multiplied with"


@pytest.mark.parametrize("hidden", [64, 80])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", BITS.values())
def test_rows_of_a_packed_table_are_the_dequantised_rows(
    tmp_path: Path, hidden: int, has_offsets: bool, bits: int
) -> None:
    random = np.random.default_rng(6)
    packed, scales = quantize(random.standard_normal((9, hidden)).astype(np.float32), bits)
    arrays = {"table.weight.packed": packed, "table.weight.scales": scales}
    if has_offsets:
        arrays["table.weight.offsets"] = random.standard_normal(scales.shape).astype(np.float32)
    sources = [WeightSource(name, array.shape, str(array.dtype), array.copy) for name, array in arrays.items()]
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama3")).config
    e = GraphEmitter()
    table = Projections(e, replace(model, hidden_size=hidden), write_weights(tmp_path / "weights", sources), "int8")
    e.op("Identity", [table.rows("table", e.input("numbers", "int64", ["n"]), "/rows")], ["y"])
    e.output("y", "float32", ["n", hidden])
    onnx.save_model(e.model("rows", opset=23, domains=[(CONTRIB, 1)]), tmp_path / "rows.onnx")
    numbers = np.array([8, 0, 3, 3])
    rows = ort.InferenceSession(str(tmp_path / "rows.onnx")).run(None, {"numbers": numbers})[0]
    expected = dequantize(packed, scales, hidden, arrays.get("table.weight.offsets"))[numbers]
    assert np.abs(rows - expected).max() <= 1e-6 * np.abs(expected).max()
