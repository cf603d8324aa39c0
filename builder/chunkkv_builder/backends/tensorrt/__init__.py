"""TensorRT 10.15 and later: a prefill engine with the ChunkKV plugins inside, and decode engines.

All engines take the weight matrices as inputs, so that one copy on the GPU serves them all.
"""

from __future__ import annotations

from pathlib import Path

from chunkkv.engine.tensorrt_contract import PREFILL_FILE, WEIGHTS_FILE, decode_file
from chunkkv.gpu.tensorrt_library import check_head_sizes
from chunkkv.gpu.tensorrt_library import missing as missing
from chunkkv_builder.backends.tensorrt import graphs
from chunkkv_builder.backends.tensorrt.engines import EngineBuilder
from chunkkv_builder.checkpoint.hugging_face import Checkpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.plan import Plan
from chunkkv_builder.progress import Progress


def check(plan: Plan) -> None:
    """Raise ConfigError for a model that the ChunkKV plugins have no kernel for."""
    if plan.settings is not None:
        check_head_sizes(plan.model.head_dim, plan.model.num_heads, plan.model.num_kv_heads)


def build(
    checkpoint: Checkpoint,
    plan: Plan,
    build: BuildConfig,
    out_dir: Path,
    progress: Progress,
    timing_cache: Path | None = None,
) -> dict[str, str]:
    """Write engines, weights and their contract to `out_dir`; return the versions that made them.

    `timing_cache` is read where it exists and written when all engines are built. Raises BackendUnavailableError for a
    missing library or plugin before anything slow begins, BuildError for what TensorRT refuses.
    """
    builder = EngineBuilder(build.dtype, progress, timing_cache)
    if plan.settings is not None:
        builder.require_plugins(plan.settings)
    sources = graphs.weight_sources(checkpoint, build.dtype)
    progress.stage("weights", len(sources))
    locations = write_weights(out_dir / WEIGHTS_FILE, sources, progress.advance)
    network = graphs.Graphs(checkpoint, plan, build, locations)
    (out_dir / PREFILL_FILE).write_bytes(builder.build("prefill", network.prefill(), network.prefill_shapes()))
    for capacity in network.capacities:
        name = f"decode {capacity}"
        engine = builder.build(name, network.decode(capacity), network.decode_shapes())
        (out_dir / decode_file(capacity)).write_bytes(engine)
    builder.write_timing_cache()
    network.contract().write(out_dir)
    return builder.versions()
