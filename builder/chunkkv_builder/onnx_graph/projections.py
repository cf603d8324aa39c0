"""Plan to ONNX: projections, with weights as the checkpoint has them or packed in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from onnx import numpy_helper

from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.quantize import BLOCK, LARGEST_CODE
from chunkkv_builder.onnx_graph.weights import WeightLocation

CONTRIB = "com.microsoft"
PACKED_SUFFIX = ".packed"
SCALES_SUFFIX = ".scales"
OFFSETS_SUFFIX = ".offsets"
CHANNELS_SUFFIX = ".channels"
CHANNEL_SCALES_SUFFIX = ".channel_scales"
ZERO_CODE = 128  # what stands for 0 in rounded inputs
SMALLEST_SCALE = 1e-30  # of a row of zeros
# accuracy_level of MatMulNBits: 1 multiplies in float32, 4 rounds the inputs to int8, too.
ACCURACY_LEVELS = {"float32": 1, "int8": 4}


class Projections:
    """Emits the projections of a model into a graph.

    Parameters
    ----------
    e : GraphEmitter
        The graph that gets the nodes.
    model : ModelConfig
        Sizes of the model.
    weights : mapping
        Where each tensor lies, by its name in the checkpoint.
    packed_activations : str or None
        Type in which inputs are multiplied with packed weights, one of ACCURACY_LEVELS; may be None where there are no
        packed weights.
    """

    def __init__(
        self,
        e: GraphEmitter,
        model: ModelConfig,
        weights: Mapping[str, WeightLocation],
        packed_activations: str | None,
    ) -> None:
        self._e, self._model, self._weights = e, model, weights
        self._packed_activations = packed_activations
        self._sums: dict[str, str] = {}
        self._rounded: dict[str, tuple[str, str]] = {}
        self._zeros: str | None = None

    def rows(self, name: str, numbers: str, node: str) -> str:
        """Return the rows [n,in] of the weight [out,in] with the `numbers` [n]; packed ones are unpacked on the way."""
        e, packed = self._e, self._weights.get(f"{name}.weight{PACKED_SUFFIX}")
        if packed is None:
            return e.op("Gather", [e.weight(self._weights[f"{name}.weight"]), numbers], name=node)
        count, blocks, block_bytes = packed.shape
        # The same bytes as a table: GatherBlockQuantized takes a row as one piece, MatMulNBits block by block.
        table = replace(packed, name=f"{packed.name}.rows", shape=(count, blocks * block_bytes))
        values = e.op(
            "GatherBlockQuantized",
            [e.weight(table), numbers, e.weight(self._weights[f"{name}.weight{SCALES_SUFFIX}"])],
            name=node,
            domain=CONTRIB,
            bits=_bits(packed),
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        offsets = self._weights.get(f"{name}.weight{OFFSETS_SUFFIX}")
        if offsets is not None:
            added = e.op("Unsqueeze", [e.op("Gather", [e.weight(offsets), numbers]), e.ints(2)])
            values = e.op("Add", [e.op("Reshape", [values, e.ints(-1, blocks, BLOCK)]), added])
            values = e.op("Reshape", [values, e.ints(-1, blocks * BLOCK)])
        if blocks * BLOCK == self._model.hidden_size:
            return values
        return e.op("Slice", [values, e.ints(0), e.ints(self._model.hidden_size), e.ints(1)])

    def head(self, name: str, value: str) -> str:
        """Return value [rows,in] times the weight of the vocabulary [out,in].

        A head of 8 bits beside projections of 4 rounds its inputs to 8 bits whatever projections do: ONNX Runtime has
        a kernel for 4-bit weights with float32 inputs, but with 8 bits it unpacks the whole weight at every step.
        """
        bits = {key: _bits(place) for key, place in self._weights.items() if key.endswith(PACKED_SUFFIX)}
        rounds = bits.get(f"{name}.weight{PACKED_SUFFIX}", 0) > min(bits.values(), default=0)
        return self.emit(name, value, "/lm_head", "int8" if rounds else None)

    def emit(self, name: str, value: str, node: str | None = None, activations: str | None = None) -> str:
        """Return value [rows,in] times the weight [out,in] as the checkpoint stores it, plus its bias, if any.

        `activations` is the type in which inputs are multiplied with a packed weight, by default packed_activations.
        """
        e = self._e
        bias = [e.weight(self._weights[f"{name}.bias"])] if f"{name}.bias" in self._weights else []
        packed = self._weights.get(f"{name}.weight{PACKED_SUFFIX}")
        node = node or "/" + name
        if f"{name}.weight{CHANNELS_SUFFIX}" in self._weights:
            result = e.op("Mul", [*self._by_channel(name, value, node)])
            return e.op("Add", [result, *bias]) if bias else result
        if packed is None:
            weight = e.weight(self._weights[f"{name}.weight"])
            return e.op("Gemm", [value, weight, *bias], name=node, transB=1)
        scales = self._weights[f"{name}.weight{SCALES_SUFFIX}"]
        activations = activations or self._packed_activations
        assert activations is not None
        result = e.op(
            "MatMulNBits",
            [value, e.weight(packed), e.weight(scales)],
            name=node,
            domain=CONTRIB,
            N=packed.shape[0],
            K=self._in_features(name),
            bits=_bits(packed),
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVELS[activations],
        )
        offsets = self._weights.get(f"{name}.weight{OFFSETS_SUFFIX}")
        if offsets is not None:
            # A block's offset is the same for its 32 inputs, so all it takes is their sum.
            inputs = [self._block_sums(value), e.weight(offsets), result]
            result = e.op("Gemm", inputs, name=f"{node}/offsets", transB=1)
        return e.op("Add", [result, *bias]) if bias else result

    def emit_of_product(self, name: str, factor: str, other: str, value: str) -> str:
        """Return what `emit` gives with `name` for `factor` [rows,in] times what it gives with `other` for `value`.

        Where both projections multiply whole numbers, one multiplication of all numbers between them is spared. `other`
        has a scale for each row, and a factor of a whole row does not change the row's codes. So `name` multiplies its
        own scale of the row with it instead.
        """
        e = self._e
        by_channel = all(f"{one}.weight{CHANNELS_SUFFIX}" in self._weights for one in (name, other))
        if not by_channel or f"{other}.bias" in self._weights:
            return self.emit(name, e.op("Mul", [factor, self.emit(other, value)]))
        product, scales = self._by_channel(other, value, "/" + other)
        between = e.op("Mul", [factor, product])
        codes, of_rows = self._round_rows(between)
        self._rounded[between] = codes, e.op("Mul", [of_rows, scales])
        return self.emit(name, between)

    def _by_channel(self, name: str, value: str, node: str) -> tuple[str, str]:
        """Return a product of whole numbers [rows,out], and a scale for each row [rows,1].

        Both multiplied are `value` [rows,in] times a weight that has a scale for each output.
        """
        e = self._e
        codes, scales = self._round_rows(value)
        weight, weight_scales = (
            e.weight(self._weights[f"{name}.weight{suffix}"]) for suffix in (CHANNELS_SUFFIX, CHANNEL_SCALES_SUFFIX)
        )
        inputs = [codes, weight, e.scalar(1.0), weight_scales, e.const(ZERO_CODE, "uint8")]
        return e.op("MatMulIntegerToFloat", inputs, name=node, domain=CONTRIB), scales

    def _round_rows(self, value: str) -> tuple[str, str]:
        """Return `value` [rows,in] as codes of 8 bits with a scale for each row [rows,1], once for each value.

        Codes are unsigned, because ONNX Runtime has no fast kernel of x86 for signed inputs.
        """
        if value not in self._rounded:
            e = self._e
            largest = e.op("ReduceMax", [e.op("Abs", [value]), e.ints(1)], keepdims=1)
            scales = e.op("Max", [e.op("Mul", [largest, e.scalar(1 / LARGEST_CODE)]), e.scalar(SMALLEST_SCALE)])
            of_rows = e.op("Squeeze", [scales, e.ints(1)])
            if self._zeros is None:  # all values that are projected have one row for each token
                zero = numpy_helper.from_array(np.array([ZERO_CODE], np.uint8))
                self._zeros = e.op("ConstantOfShape", [e.op("Shape", [of_rows])], value=zero)
            self._rounded[value] = e.op("QuantizeLinear", [value, of_rows, self._zeros], axis=0), scales
        return self._rounded[value]

    def _block_sums(self, value: str) -> str:
        """Return the sum of each block of 32 inputs of `value` [rows,in]: [rows,in/32], once for each value."""
        if value not in self._sums:
            blocks = self._e.op("Reshape", [value, self._e.ints(0, -1, BLOCK)])
            self._sums[value] = self._e.op("ReduceSum", [blocks, self._e.ints(2)], keepdims=0)
        return self._sums[value]

    def _in_features(self, name: str) -> int:
        if name.endswith("down_proj"):
            return self._model.intermediate_size
        if name.endswith("o_proj"):
            return self._model.num_heads * self._model.head_dim
        return self._model.hidden_size


def _bits(packed: WeightLocation) -> int:
    """Return the bits of one value of a packed weight [out,blocks,bytes]."""
    return packed.shape[2] * 8 // BLOCK
