"""One ONNX graph to one serialized TensorRT engine: network, parser, profile, timing cache, progress."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from chunkkv.errors import BackendUnavailableError, BuildError
from chunkkv.files import write_whole
from chunkkv.gpu.tensorrt_library import ErrorLog, import_tensorrt, load_plugins, start
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt.graphs import ShapeProfile, for_parser
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.progress import Progress


class EngineBuilder:
    """A tensorrt.Builder with all engines of one build; raises BackendUnavailableError where it cannot be made.

    Parameters
    ----------
    dtype : str
        Type that the engines compute in: "float32", "float16" or "bfloat16".
    progress : Progress
        Shows one stage for each engine.
    timing_cache : Path or None, default None
        A file of kernel timings that is read where it exists; see write_timing_cache.
    """

    def __init__(self, dtype: str, progress: Progress, timing_cache: Path | None = None) -> None:
        self._dtype, self._progress, self._cache_path = dtype, progress, timing_cache
        self.trt = import_tensorrt()
        self._messages = ErrorLog()
        self._logger = self._messages.logger(self.trt)
        self._builder = start(self.trt, self.trt.Builder, self._logger, self._messages)
        self._timings = timing_cache.read_bytes() if timing_cache is not None and timing_cache.is_file() else b""

    def require_plugins(self, settings: ChunkKVSettings) -> None:
        """Register the ChunkKV plugins; raises BackendUnavailableError where one is missing or of another version."""
        creators = load_plugins(self.trt, self.trt.get_plugin_registry(), self._messages)
        fields = {field.name for field in creators[functions.SELECT].field_names}
        needed = set(functions.select_attributes(settings)) - set(functions.plugin_attributes())
        if unknown := sorted(needed - fields):
            raise BackendUnavailableError(
                f"the plugin {functions.SELECT} knows no {unknown[0]!r}, so the library and this builder are of "
                "different versions: build the plugins again"
            )

    def build(self, name: str, model: onnx.ModelProto, profile: ShapeProfile) -> bytes:
        """Return the serialized engine of `model`; raises BuildError with everything TensorRT said."""
        self._messages.errors.clear()
        network = self._parse(name, model)
        config = self._builder.create_builder_config()
        if self._dtype == "float32":
            config.clear_flag(self.trt.BuilderFlag.TF32)  # float32 means float32
        config.add_optimization_profile(self._profile(name, network, profile))
        self._use_timings(config)
        # The monitor must outlive everything in TensorRT that uses it.
        self._monitor = monitor = progress_monitor(self.trt, name, self._progress)
        config.progress_monitor = monitor
        engine = self._builder.build_serialized_network(network, config)
        self._timings = bytes(config.get_timing_cache().serialize())
        if monitor.interrupted is not None:
            raise monitor.interrupted
        if engine is None:
            raise BuildError(
                f"TensorRT {self.trt.__version__} cannot build the {name} engine{self._messages.explanation()}"
            )
        return bytes(engine)

    def write_timing_cache(self) -> None:
        """Write the timings of all engines built so far, for the next build."""
        if self._cache_path is not None:
            write_whole(self._cache_path, self._timings)

    def versions(self) -> dict[str, str]:
        """Return what made the engines, which run with this version of TensorRT only."""
        return {"onnx": onnx.__version__, "tensorrt": self.trt.__version__}

    def _use_timings(self, config: Any) -> None:
        """Give `config` the timings so far; those of another TensorRT or GPU are dropped with a warning."""
        cache = config.create_timing_cache(self._timings)
        if not cache or not config.set_timing_cache(cache, False):
            self._progress.warning(f"{self._cache_path} holds timings of another TensorRT or GPU; it will be replaced")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _parse(self, name: str, model: onnx.ModelProto) -> Any:
        typed = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # Where the flag is gone every network is strongly typed.
        network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self.trt.OnnxParser(network, self._logger)
        if not parser.parse(for_parser(model)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            listed = "; ".join(_described(error) for error in errors) or "no reason given"
            raise BuildError(f"TensorRT {self.trt.__version__} does not take the {name} graph: {listed}")
        self._check_plugins_taken(name, network, model)
        return network

    def _check_plugins_taken(self, name: str, network: Any, model: onnx.ModelProto) -> None:
        """Raise BuildError where the parser inlined an ONNX function instead of taking the plugin."""
        expected = sum(node.domain == functions.DOMAIN for node in model.graph.node)
        kind = self.trt.LayerType.PLUGIN_V3
        taken = sum(network.get_layer(index).type == kind for index in range(network.num_layers))
        if taken < expected:
            raise BuildError(f"the {name} graph has {expected} ChunkKV nodes, TensorRT took {taken} of them as plugins")

    def _profile(self, name: str, network: Any, profile: ShapeProfile) -> Any:
        trt_profile = self._builder.create_optimization_profile()
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        input_shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
        if absent := sorted((set(profile.shapes) | set(profile.values)) - set(input_shapes)):
            present = ", ".join(sorted(input_shapes))
            raise BuildError(f"the {name} network has no input {absent[0]!r}; it has {present}")
        for tensor, triple in profile.shapes.items():
            sizes = input_shapes[tensor]
            trt_profile.set_shape(
                tensor,
                *(tuple(s if s >= 0 else size for s, size in zip(shape, sizes, strict=True)) for shape in triple),
            )
        for tensor, values in profile.values.items():
            trt_profile.set_shape_input(tensor, *([value] for value in values))
        return trt_profile


def _described(error: Any) -> str:
    """Return one parser error as text; what a version does not tell is left out."""
    place = [str(call()) for name in ("node_name", "node_operator") if (call := getattr(error, name, None))]
    return f"{' '.join(part for part in place if part) or 'model'}: {error.desc()}"


def progress_monitor(trt: Any, name: str, progress: Progress) -> Any:
    """Return a tensorrt.IProgressMonitor that shows a build as one stage, steps of all its phases counted together."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted: BaseException | None = None
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._open: dict[str, int] = {}
            progress.stage(name, 0)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            def start() -> None:
                self._open[phase_name] = num_steps
                progress.extend(num_steps)

            self._safely(start)

        def step_complete(self, phase_name: str, step: int) -> bool:
            def count() -> None:
                if self._open.get(phase_name, 0) > 0:
                    self._open[phase_name] -= 1
                    progress.advance()

            self._safely(count)
            return self.interrupted is None

        def phase_finish(self, phase_name: str) -> None:
            self._safely(lambda: progress.advance(self._open.pop(phase_name, 0)))  # with the steps that were skipped

        def _safely(self, action: Callable[[], None]) -> None:
            try:
                with self._lock:
                    action()
            except BaseException as error:  # Ctrl-C must not cross TensorRT's frames: it is raised after the build
                self.interrupted = error

    return Monitor()
