"""One ONNX graph to one serialized TensorRT engine: network, parser, profile, timing cache, progress."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from chunkkv.cache_layout import ALL_HEADS, READING
from chunkkv.engine.tensorrt_build import FUNCTIONS, PACKAGES, PLUGIN, TensorRTBuild
from chunkkv.errors import BackendUnavailableError, BuildError
from chunkkv.files import write_whole
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT, capability_member
from chunkkv.gpu.tensorrt_plugins import load_plugins, prepare_parser
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt.graphs import ShapeProfile, for_parser
from chunkkv_builder.backends.tensorrt.memory import peak_memory
from chunkkv_builder.backends.tensorrt.monitor import progress_monitor, run_interruptibly
from chunkkv_builder.backends.tensorrt.target import Target
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.progress import Progress, human_bytes

_PARSER = "ModelImporter.cpp"  # how the ONNX parser's lines in the log begin
_PLACES = ("node_name", "node_operator", "local_function_stack", "func")


class EngineBuilder:
    """A tensorrt.Builder with all engines of one build; raises BackendUnavailableError where it cannot be made.

    Parameters
    ----------
    trt : TensorRT
        The TensorRT that builds.
    target : Target
        Which GPUs to build for, and how ChunkKV gets into the engines.
    dtype : str
        Type that the engines compute in: "float32", "float16" or "bfloat16".
    progress : Progress
        Shows one stage for each engine, and a line on it.
    timing_cache : Path or None, default None
        A file of kernel timings that is read where it exists; see write_timing_cache.
    """

    def __init__(
        self, trt: TensorRT, target: Target, dtype: str, progress: Progress, timing_cache: Path | None = None
    ) -> None:
        self._library, self._target = trt, target
        self._dtype, self._progress, self._cache_path = dtype, progress, timing_cache
        self._trt = trt.module
        self._messages = ErrorLog()
        self._logger = self._messages.logger(self._trt)
        self._builder = start(trt, self._trt.Builder, self._logger, self._messages)
        self._timings = timing_cache.read_bytes() if timing_cache is not None and timing_cache.is_file() else b""
        self._seconds: dict[str, float] = {}
        self._layers: dict[str, Counter[str]] = {}

    def require_plugins(self, settings: ChunkKVSettings) -> None:
        """Register the ChunkKV plugins; raises BackendUnavailableError where one is missing or of another version."""
        prepare_parser(self._library)
        creators = load_plugins(self._library, self._trt.get_plugin_registry(), self._messages)
        fields = {field.name for field in creators[functions.SELECT].field_names}
        head_class = READING if settings.budget_split == "classes" else ALL_HEADS
        needed = set(functions.select_attributes(settings, request_window=True, head_class=head_class))
        needed -= set(functions.plugin_attributes())
        if unknown := sorted(needed - fields):
            raise BackendUnavailableError(
                f"the plugin {functions.SELECT} knows no {unknown[0]!r}, so the library and this builder are of "
                "different versions: build the plugins again"
            )

    def build(
        self, name: str, model: onnx.ModelProto, profile: ShapeProfile, path: Path, capturable: bool = False
    ) -> None:
        """Write the serialized engine of `model` to `path`; raises BuildError with everything TensorRT said.

        Parameters
        ----------
        name : str
            What the engine is called in messages.
        model : onnx.ModelProto
            Its graph, weights as inputs.
        profile : ShapeProfile
            The shapes it is built for.
        path : Path
            The file to write.
        capturable : bool, default False
            Whether the engine is to become part of a CUDA graph. Then it may not allocate memory while it runs, where
            this TensorRT lets us forbid that.
        """
        began = time.perf_counter()
        self._messages.errors.clear()
        # The monitor must outlive everything in TensorRT that uses it.
        self._monitor = progress_monitor(self._trt, name, self._progress)
        network = run_interruptibly(lambda: self._parse(name, model), self._monitor.interrupt)
        config = self._config()
        if capturable and (flag := getattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
            config.set_flag(flag)
        config.add_optimization_profile(self._profile(name, network, profile))
        config.progress_monitor = self._monitor
        engine = run_interruptibly(
            lambda: self._builder.build_serialized_network(network, config), self._monitor.interrupt
        )
        if not self._library.builds_ahead:
            self._timings = bytes(config.get_timing_cache().serialize())
        if self._monitor.interrupted is not None:
            raise self._monitor.interrupted
        if engine is None:
            raise BuildError(f"{self._library.title} cannot build the {name} engine{self._messages.explanation()}")
        size = path.write_bytes(engine)
        self._seconds[path.name] = time.perf_counter() - began
        self._layers[path.name] = self._layer_types(network)
        self._report(name, self._layers[path.name], model, self._seconds[path.name], size)

    def write_timing_cache(self) -> None:
        """Write the timings of all engines built so far, for the next build."""
        if self._cache_path is not None:
            write_whole(self._cache_path, self._timings)

    def versions(self) -> dict[str, str]:
        """Return what made the engines, which run with this version of TensorRT only."""
        return {"onnx": onnx.__version__, PACKAGES[self._library.flavour]: self._library.version}

    def record(self) -> TensorRTBuild:
        """Return what the manifest says of the engines built so far."""
        return TensorRTBuild(
            self._library.flavour,
            self._library.version,
            self._target.compute_capabilities,
            self._target.chunkkv_ops,
            dict(self._seconds),
            {file: dict(counts.most_common()) for file, counts in self._layers.items()},
        )

    def _config(self) -> Any:
        """Return a tensorrt.IBuilderConfig with everything that all engines have in common."""
        config = self._builder.create_builder_config()
        if self._dtype == "float32":
            config.clear_flag(self._trt.BuilderFlag.TF32)  # float32 means float32
        if capabilities := self._target.compute_capabilities:
            config.num_compute_capabilities = len(capabilities)
            for place, capability in enumerate(capabilities):
                if not config.set_compute_capability(capability_member(self._library, capability), place):
                    raise BuildError(
                        f"{self._library.title} refuses compute capability {capability}{self._messages.explanation()}"
                    )
        if not self._library.builds_ahead:
            self._use_timings(config)
        return config

    def _use_timings(self, config: Any) -> None:
        """Give `config` the timings so far; those of another TensorRT or GPU are dropped with a warning."""
        cache = config.create_timing_cache(self._timings)
        if not cache or not config.set_timing_cache(cache, False):
            self._progress.warning(f"{self._cache_path} holds timings of another TensorRT or GPU; it will be replaced")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _parse(self, name: str, model: onnx.ModelProto) -> Any:
        typed = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # Where the flag is gone every network is strongly typed.
        network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self._trt.OnnxParser(network, self._logger)
        if not parser.parse(for_parser(model)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            listed = "; ".join(_described(error) for error in errors) or "no reason given"
            # Why a plugin refuses a node is said to the log alone; the parser says its own errors there as well.
            reason = self._messages.explanation(without=_PARSER)
            raise BuildError(f"{self._library.title} does not take the {name} graph: {listed}{reason}")
        if self._target.chunkkv_ops == PLUGIN:
            self._check_plugins_taken(name, network, model)
        return network

    def _check_plugins_taken(self, name: str, network: Any, model: onnx.ModelProto) -> None:
        """Raise BuildError where the parser inlined an ONNX function instead of taking the plugin."""
        expected, taken = chunkkv_nodes(model), self._layer_types(network)[self._trt.LayerType.PLUGIN_V3.name]
        if taken < expected:
            raise BuildError(f"the {name} graph has {expected} ChunkKV nodes, TensorRT took {taken} of them as plugins")

    def _layer_types(self, network: Any) -> Counter[str]:
        """Return how many layers of each type the network has."""
        return Counter(network.get_layer(index).type.name for index in range(network.num_layers))

    def _report(self, name: str, layers: Counter[str], model: onnx.ModelProto, seconds: float, size: int) -> None:
        """Say what was built, and what that took."""
        chunkkv = ""
        if self._target.chunkkv_ops == PLUGIN and (count := layers[self._trt.LayerType.PLUGIN_V3.name]):
            chunkkv = f", {count} of them ChunkKV plugins"
        elif self._target.chunkkv_ops == FUNCTIONS and (count := chunkkv_nodes(model)):
            chunkkv = f", {count} ChunkKV functions among them"
        memory = peak_memory()
        peak = "" if memory is None else f", peak memory of the build {human_bytes(memory)}"
        self._progress.info(
            f"{name} engine: {layers.total()} layers{chunkkv}, {human_bytes(size)}, {seconds:.1f} s{peak}"
        )

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
            trt_profile.set_shape_input(tensor, *(list(value) for value in values))
        return trt_profile


def chunkkv_nodes(model: onnx.ModelProto) -> int:
    """Return how many ChunkKV operators `model` has."""
    return sum(node.domain == functions.DOMAIN for node in model.graph.node)


def _described(error: Any) -> str:
    """Return one parser error as a line that names node and operator.

    Inside an ONNX function the parser tells neither: then the function's node and the parser's own function stand for
    them. What a version of TensorRT does not tell is left out.
    """
    told = {name: call() for name in _PLACES if (call := getattr(error, name, None)) is not None}
    calling_nodes = told.get("local_function_stack") or [""]
    place = [told.get("node_name") or calling_nodes[-1], told.get("node_operator") or told.get("func")]
    return f"{' '.join(part for part in place if part) or 'model'}: {' '.join(error.desc().split())}"
