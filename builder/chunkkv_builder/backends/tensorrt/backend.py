"""The TensorRT backend: which engines are built, and what lies beside them.

All engines take the weight matrices as inputs, so that one copy on the GPU serves them all.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from chunkkv.engine.directory import TENSORRT
from chunkkv.engine.tensorrt_contract import PREFILL_FILE, WEIGHTS_FILE, decode_file
from chunkkv.gpu import tensorrt_library
from chunkkv_builder.backends.graph_build import GraphBuild, plan_graphs
from chunkkv_builder.backends.tensorrt.engines import EngineBuilder
from chunkkv_builder.backends.tensorrt.graphs import Graphs, weight_sources
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.progress import Progress


class TensorRTBackend:
    """Builds for TensorRT; satisfies chunkkv_builder.backends.interface.Backend.

    Parameters
    ----------
    timing_cache : Path or None, default None
        A file of kernel timings: read where it exists, written when all engines are built. None keeps no timings.
    """

    name = TENSORRT

    def __init__(self, timing_cache: Path | None = None) -> None:
        self._timing_cache = timing_cache

    def missing(self, flags: Namespace) -> list[str]:
        """Return what this machine lacks of TensorRT, a GPU and, with --chunkkv, the plugin library."""
        return tensorrt_library.missing(flags.chunkkv)

    def plan(self, flags: Namespace, progress: Progress) -> GraphBuild:
        """Read the checkpoint and plan the graphs; raises as plan_graphs does."""
        # Its fast attention kernels need 16 bits.
        return plan_graphs(flags, self.name, auto_dtype="bfloat16", progress=progress)

    def check(self, planned: GraphBuild, progress: Progress) -> None:
        """Raise ConfigError for a model that the ChunkKV plugins have no kernel for."""
        model = planned.plan.model
        if planned.plan.settings is not None:
            tensorrt_library.check_head_sizes(model.head_dim, model.num_heads, model.num_kv_heads)

    def build(self, planned: GraphBuild, folder: Path, progress: Progress) -> dict[str, str]:
        """Write weights, engines, their contract and config.json to `folder`; return the versions of onnx and TensorRT.

        Raises BackendUnavailableError for a missing library or plugin before anything slow begins, BuildError for what
        TensorRT refuses.
        """
        builder = EngineBuilder(planned.limits.dtype, progress, self._timing_cache)
        if planned.plan.settings is not None:
            builder.require_plugins(planned.plan.settings)
        sources = weight_sources(planned.checkpoint, planned.limits.dtype)
        progress.stage("weights", len(sources))
        locations = write_weights(folder / WEIGHTS_FILE, sources, progress.advance)
        graphs = Graphs(planned.checkpoint, planned.plan, planned.limits, locations)
        (folder / PREFILL_FILE).write_bytes(builder.build("prefill", graphs.prefill(), graphs.prefill_profile()))
        for capacity in graphs.capacities:
            engine = builder.build(f"decode {capacity}", graphs.decode(capacity), graphs.decode_profile())
            (folder / decode_file(capacity)).write_bytes(engine)
        builder.write_timing_cache()
        graphs.contract().write(folder)
        planned.write_config(folder)
        return builder.versions()
