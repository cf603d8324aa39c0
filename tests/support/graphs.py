"""Graphs that no engine directory ships, built from the plan of a test engine and run beside its weights."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from chunkkv.engine.directory import COMPRESS_FILE, STEP_FILE
from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor
from chunkkv.session import ChunkKVSession
from chunkkv_builder.backends.onnxruntime import WEIGHTS_FILE
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.onnx_graph.compress import compress_graph
from chunkkv_builder.onnx_graph.emitter import GraphEmitter
from chunkkv_builder.onnx_graph.packed_weights import weight_sources
from chunkkv_builder.onnx_graph.prefill import PrefillGraph
from chunkkv_builder.onnx_graph.transformer import STANDARD_OPSET, StepGraph
from chunkkv_builder.onnx_graph.weights import WeightLocation, write_weights
from chunkkv_builder.plan import GraphPlan, make_plan
from support import engines

_FOLDER = tempfile.TemporaryDirectory(prefix="chunkkv-test-graphs-")  # kept until the process ends
PREFILL_FILE = "prefill.onnx"
BLOCK = 16  # of prefill, as engines.engine_dir builds by default


@cache
def weights_of(variant: str, precision: str | None = None) -> tuple[Path, dict[str, WeightLocation]]:
    """Return a folder with the weights file of `variant`, and where each tensor lies in it."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    checkpoint = HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant))
    return folder, write_weights(folder / WEIGHTS_FILE, weight_sources(checkpoint, precision))


def delimiter_table(session: ChunkKVSession) -> np.ndarray | None:
    """Return the delimiter tokens [vocab] of the engine behind `session`, None for fixed boundaries."""
    if session.settings is None or session.settings.boundaries == "fixed":
        return None
    assert session.tokenizer is not None
    return session.tokenizer.delimiter_token_table(session.limits.vocab_size)


def plan_of(variant: str, session: ChunkKVSession) -> GraphPlan:
    """Return the plan that the engine behind `session` was built from."""
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir(variant)).config
    return make_plan(model, session.settings, delimiter_table(session))


def prefill_path(variant: str, session: ChunkKVSession, precision: str | None = None, sorting: bool = True) -> Path:
    """Write the one-shot prefill graph of the engine behind `session` and return its file."""
    skip_without_standard_attention()
    folder, locations = weights_of(variant, precision)
    graph = PrefillGraph(plan_of(variant, session), locations, sorting=sorting)
    onnx.save_model(graph.build(), folder / PREFILL_FILE)
    return folder / PREFILL_FILE


@cache
def knows_standard_attention() -> bool:
    """Whether this ONNX Runtime runs the opset of graphs for other engines; the product's own graphs need less."""
    e = GraphEmitter()
    e.op("Identity", [e.input("x", "float32", [1])], ["y"])
    e.output("y", "float32", [1])
    try:
        ort.InferenceSession(e.model("probe", opset=STANDARD_OPSET).SerializeToString())
    except Exception:
        return False
    return True


def skip_without_standard_attention() -> None:
    """Skip the test where ONNX Runtime is too old for graphs that only TensorRT needs."""
    if not knows_standard_attention():
        pytest.skip(f"ONNX Runtime {ort.__version__} ends before opset {STANDARD_OPSET}")


def standard_executor(variant: str, session: ChunkKVSession, precision: str | None = None) -> OnnxRuntimeExecutor:
    """Return an executor of the same engine whose step graph has standard operators only."""
    skip_without_standard_attention()
    folder, locations = weights_of(variant, precision)
    plan = plan_of(variant, session)
    onnx.save_model(StepGraph(plan, locations).build(), folder / STEP_FILE)
    onnx.save_model(compress_graph(plan), folder / COMPRESS_FILE)
    return OnnxRuntimeExecutor(folder, BLOCK, plan.settings, threads=1)


def load(path: Path) -> ort.InferenceSession:
    """Return the graph in `path` on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
