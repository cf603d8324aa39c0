"""Finds the scales that even out the inputs of projections, from how large their channels become on the calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from chunkkv_builder.backends.calibration import run_prompts
from chunkkv_builder.onnx_graph.observed_step import OBSERVED_SUFFIX, ObservedStepGraph
from chunkkv_builder.onnx_graph.smoothing import shared_inputs, smoothing_scales
from chunkkv_builder.onnx_graph.weights import WeightLocation
from chunkkv_builder.plan import GraphPlan


def calibrated_scales(
    plan: GraphPlan,
    locations: Mapping[str, WeightLocation],
    packed_activations: str | None,
    folder: Path,
    prompts: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the scales [in] float32 of every input that can be scaled, by SharedInput.projection.

    Parameters
    ----------
    plan : GraphPlan
        What the graph is made from.
    locations : mapping
        Where the tensors of a FusedStepGraph lie. Those that are rounded without scales do: they make little
        difference to the size of a channel.
    packed_activations : str or None
        As FusedStepGraph takes it.
    folder : Path
        Where the weights lie.
    prompts : sequence of numpy.ndarray
        Token ids [L] int64.
    """
    names = [shared.projection for shared in shared_inputs(plan.model)]
    graph = ObservedStepGraph(plan, locations, packed_activations, set(names)).build()
    outputs = [name + OBSERVED_SUFFIX for name in names]
    sums = dict.fromkeys(outputs, np.float64(0))
    for found in run_prompts(graph, folder, plan, prompts, outputs):
        sums = {output: total + found[output] for output, total in sums.items()}
    tokens = sum(len(ids) for ids in prompts)
    return {name: smoothing_scales(sums[output] / tokens) for name, output in zip(names, outputs, strict=True)}
