"""The TensorRT backend: which engines are built, and what lies beside them.

All engines take the weight matrices as inputs, so that one copy on the GPU serves them all.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from chunkkv.cache_layout import shown_slots
from chunkkv.command_line import UsageError
from chunkkv.engine.backends import TENSORRT
from chunkkv.engine.tensorrt_build import FUNCTIONS, PLUGIN
from chunkkv.engine.tensorrt_contract import PREFILL_FILE, WEIGHTS_FILE, block_file, decode_file
from chunkkv.limits import KERNEL_MAX_LENGTH
from chunkkv_builder.backends.graph_build import GraphBuild, plan_graphs
from chunkkv_builder.backends.interface import Built
from chunkkv_builder.backends.tensorrt.engines import EngineBuilder
from chunkkv_builder.backends.tensorrt.graphs import (
    Graphs,
    ShapeProfile,
    decode_capacities,
    largest_capacity,
    weight_sources,
)
from chunkkv_builder.backends.tensorrt.target import Options, Target
from chunkkv_builder.dry_run import plan_console
from chunkkv_builder.onnx_graph.weights import write_weights
from chunkkv_builder.progress import Progress


@dataclass(frozen=True)
class TensorRTPlan:
    """A planned build of TensorRT engines.

    Parameters
    ----------
    graphs : GraphBuild
        Checkpoint, limits and plan.
    target : Target
        Which TensorRT builds, for which GPUs, and how ChunkKV gets in.
    """

    graphs: GraphBuild
    target: Target

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory of the checkpoint's tokenizer, if it has one."""
        return self.graphs.tokenizer_dir

    def show(self) -> None:
        """Print the plan, which TensorRT would build it, and the engines with their profiles."""
        self.graphs.show()
        console = plan_console()
        warnings = [f"warning: {sentence}" for sentence in self.target.warnings()]
        for line in [*self.target.lines(), *warnings, *_engine_lines(self._engines())]:
            console.print(line, markup=False, soft_wrap=True)

    def _engines(self) -> dict[str, ShapeProfile]:
        graphs = Graphs(self.graphs.checkpoint, self.graphs.plan, self.graphs.limits, {})
        decode = {decode_file(capacity): graphs.decode_profile() for capacity in graphs.capacities}
        blocks = {block_file(capacity): graphs.block_profile() for capacity in graphs.capacities}
        return {PREFILL_FILE: graphs.prefill_profile(), **decode, **blocks}


class TensorRTBackend:
    """Builds for TensorRT and TensorRT for RTX; satisfies chunkkv_builder.backends.interface.Backend.

    Parameters
    ----------
    options : Options
        The flags that only this backend has; default: those of a command line without them.
    """

    name = TENSORRT

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    def missing(self, flags: Namespace) -> list[str]:
        """Return what this machine lacks of TensorRT, a GPU and the plugins; a dry run shows that with its plan."""
        return [] if flags.dry_run else self._options.missing(flags.chunkkv)

    def plan(self, flags: Namespace, progress: Progress) -> TensorRTPlan:
        """Read the checkpoint and plan the graphs.

        Raises as plan_graphs does, and UsageError for flags that do not fit the TensorRT at hand.
        """
        planned = plan_graphs(flags, self.name, progress)
        settings = planned.plan.settings
        target = Target.decide(self._options, planned.plan.model, settings is not None, settings)
        return TensorRTPlan(planned, target)

    def check(self, planned: TensorRTPlan, progress: Progress) -> None:
        """Raise UsageError for sequences that are too long for the plugins, or for the tensors of TensorRT."""
        limits, model = planned.graphs.limits, planned.graphs.plan.model
        if planned.target.chunkkv_ops == PLUGIN and limits.max_input_len > KERNEL_MAX_LENGTH:
            raise UsageError(
                f"--max_input_len is {limits.max_input_len}; the ChunkKV plugins take prompts of up to "
                f"{KERNEL_MAX_LENGTH} tokens: give that or less, or --chunkkv_ops {FUNCTIONS}"
            )
        longest = largest_capacity(model.num_kv_heads * model.head_dim)
        if decode_capacities(limits.max_seq_len)[-1] > longest:
            raise UsageError(
                f"--max_seq_len is {limits.max_seq_len}; with {model.num_kv_heads} KV heads of {model.head_dim} a "
                f"cache in TensorRT holds at most {longest} tokens: give that or less"
            )

    def build(self, planned: TensorRTPlan, folder: Path, progress: Progress) -> Built:
        """Write weights, engines, their contract and config.json to `folder`; return what the manifest says of them.

        Raises BackendUnavailableError for a missing library or plugin before anything slow begins, BuildError for what
        TensorRT refuses.
        """
        target, build = planned.target, planned.graphs
        assert target.trt is not None  # `missing` saw to that
        builder = EngineBuilder(target.trt, target, build.limits.dtype, progress, self._options.timing_cache)
        progress.info("; ".join(target.lines()))
        for sentence in target.warnings():
            progress.warning(sentence)
        if target.chunkkv_ops == PLUGIN:
            assert build.plan.settings is not None
            builder.require_plugins(build.plan.settings)
        sources = weight_sources(build.checkpoint, build.limits.dtype)
        progress.stage("weights", len(sources))
        locations = write_weights(folder / WEIGHTS_FILE, sources, progress.advance)
        graphs = Graphs(build.checkpoint, build.plan, build.limits, locations)
        prefill = graphs.prefill(sorting=target.chunkkv_ops != FUNCTIONS)
        builder.build("prefill", prefill, graphs.prefill_profile(), folder / PREFILL_FILE)
        for capacity in graphs.capacities:
            path = folder / decode_file(capacity)
            name, profile = f"decode {shown_slots(capacity)}", graphs.decode_profile()
            builder.build(name, graphs.decode(capacity), profile, path, capturable=True)
        for capacity in graphs.capacities:
            path = folder / block_file(capacity)
            builder.build(f"block {shown_slots(capacity)}", graphs.block(capacity), graphs.block_profile(), path)
        builder.write_timing_cache()
        graphs.contract().write(folder)
        build.write_config(folder)
        return Built(builder.versions(), builder.record())


def _engine_lines(engines: dict[str, ShapeProfile]) -> list[str]:
    """Return one line for each engine: its file, and the least and most of what varies in its profile."""
    lines = []
    for file, profile in engines.items():
        (least, _, most), values = profile.shapes["input_ids"], profile.values.get("capacity")
        rows = f"{least[0]} to {most[0]} rows of {least[1]} to {most[1]} tokens"
        slots = "" if values is None else f", caches of {shown_slots(values[0])} to {shown_slots(values[-1])} slots"
        lines.append(f"{file}: {rows}{slots}")
    return lines
