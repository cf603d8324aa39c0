"""The step graph with outputs that say how large the channels of projections' inputs are."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.fused_step import FusedStepGraph
from chunkkv_builder.onnx_graph.projections import SMALLEST_SCALE, Projections
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan

OBSERVED_SUFFIX = ".input_squares"


class ObservedStepGraph(FusedStepGraph):
    """Emits FusedStepGraph with an output NAME.input_squares float32 [in] for each observed projection NAME.

    It is the sum over the block's tokens of an input's squares, divided by their mean in that token: tokens that are
    large in all channels do not count for more than others.

    Parameters
    ----------
    plan : GraphPlan
        As FusedStepGraph takes it.
    weights : mapping
        As FusedStepGraph takes it.
    packed_activations : str or None
        As FusedStepGraph takes it.
    observed : collection of str
        Names of the projections.
    """

    def __init__(
        self,
        plan: GraphPlan,
        weights: Mapping[str, WeightLocation],
        packed_activations: str | None,
        observed: Collection[str],
    ) -> None:
        super().__init__(plan, weights, packed_activations)
        self._project = _ObservedProjections(self.e, self.model, weights, packed_activations, observed)


class _ObservedProjections(Projections):
    """Projections that emit what ObservedStepGraph gives beside them."""

    def __init__(
        self,
        e: GraphEmitter,
        model: ModelConfig,
        weights: Mapping[str, WeightLocation],
        packed_activations: str | None,
        observed: Collection[str],
    ) -> None:
        super().__init__(e, model, weights, packed_activations)
        self._observed = observed

    def emit(self, name: str, value: str, node: str | None = None, activations: str | None = None) -> str:
        """As Projections.emit, which says what it takes and returns."""
        if name in self._observed:
            self._observe(name + OBSERVED_SUFFIX, value)
        return super().emit(name, value, node, activations)

    def _observe(self, output: str, value: str) -> None:
        e = self._e
        squares = e.op("Mul", [value, value])
        means = e.op("Max", [e.op("ReduceMean", [squares, e.ints(1)], keepdims=1), e.scalar(SMALLEST_SCALE)])
        e.op("ReduceSum", [e.op("Div", [squares, means]), e.ints(0)], [output], keepdims=0)
        e.output(output, "float32", ["channels"])
