"""What this project calls of TensorRT exists, with these parameters, in NVIDIA's own Python bindings.

The bindings come as a package of their own and load on empty libraries, so no GPU and no TensorRT is needed: `make
test-tensorrt-api` fetches several versions. A plain run of pytest leaves these tests out.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import tensorrt_double as double
from support import tensorrt_rtx_double as rtx_double

from chunkkv.gpu.tensorrt_library import TensorRT

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(ROOT / "builder" / "chunkkv_builder" / "backends" / "tensorrt").glob("*.py"),
    *(ROOT / "python" / "chunkkv" / "executors" / "tensorrt").glob("*.py"),
    *(ROOT / "python" / "chunkkv" / "gpu").glob("tensorrt*.py"),
]
pytestmark = pytest.mark.tensorrt_api
# Names that are asked of TensorRT for RTX alone; real_tensorrt/test_runtime_api.py looks for them there.
RTX_ONLY = {item.__name__ for item in rtx_double.ENUMS} - {"ExecutionContextAllocationStrategy"}
STUBS = {
    "nvinfer": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getPluginRegistry "
    "getBuilderPluginRegistry",
    "nvinfer_plugin": "initLibNvInferPlugins",
    "nvonnxparser": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
}


class ParserError:
    """Not played by the double, whose parser takes every graph; its members are called all the same."""


# Per class of the double: its name in TensorRT and the members that the project uses.
CLASSES: dict[type, tuple[str, str]] = {
    double.ILogger: ("ILogger", "log Severity"),
    double.IProgressMonitor: ("IProgressMonitor", "phase_start step_complete phase_finish"),
    double.Builder: (
        "Builder",
        "create_network create_builder_config create_optimization_profile build_serialized_network",
    ),
    double.Network: ("INetworkDefinition", "num_inputs get_input num_layers get_layer"),
    double.Tensor: ("ITensor", "name shape"),
    double.OnnxParser: ("OnnxParser", "parse num_errors get_error"),
    ParserError: ("ParserError", "desc node_name node_operator"),
    double.OptimizationProfile: ("IOptimizationProfile", "set_shape set_shape_input"),
    double.BuilderConfig: (
        "IBuilderConfig",
        "add_optimization_profile create_timing_cache set_timing_cache get_timing_cache clear_flag progress_monitor",
    ),
    double.TimingCache: ("ITimingCache", "serialize"),
    double.Registry: ("IPluginRegistry", "load_library get_creator"),
    double.Runtime: ("Runtime", "deserialize_cuda_engine"),
    double.Engine: (
        "ICudaEngine",
        "num_io_tensors get_tensor_name get_aliased_input_tensor create_execution_context",
    ),
    double.Context: ("IExecutionContext", "set_tensor_address set_input_shape execute_async_v3"),
}
PROGRAM = """
import json, sys, tensorrt_bindings as trt
found = {"version": trt.__version__, "names": sorted(dir(trt)), "classes": {}}
for name in json.loads(sys.argv[1]):
    item = getattr(trt, name, None)
    found["classes"][name] = {m: getattr(item, m).__doc__ or "" for m in dir(item) if m[0] != "_" or m == "__init__"}
enums = {n: sorted(e.__members__) for n in found["names"] for e in [getattr(trt, n)] if hasattr(e, "__members__")}
print(json.dumps({**found, "enums": enums}))
"""
OWN_CLASSES = """
from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_errors import ErrorLog
from chunkkv.engine.tensorrt_build import NO_OPS
from chunkkv.gpu.tensorrt_library import find_tensorrt
from chunkkv_builder.backends.tensorrt.engines import EngineBuilder
from chunkkv_builder.backends.tensorrt.monitor import progress_monitor
from chunkkv_builder.backends.tensorrt.target import Target
from chunkkv_builder.progress import Progress

library, messages = find_tensorrt("standard"), ErrorLog()
trt = library.module
logger = messages.logger(trt)
logger.log(trt.ILogger.Severity.ERROR, "first")
logger.log(trt.ILogger.Severity.INFO, "not this")
assert isinstance(logger, trt.ILogger) and messages.explanation() == ": first"
monitor = progress_monitor(trt, "prefill", Progress("error"))
monitor.phase_start("build", None, 3)
assert isinstance(monitor, trt.IProgressMonitor) and monitor.step_complete("build", 0) is True
monitor.phase_finish("build")
try:
    EngineBuilder(library, Target(library, (), NO_OPS, "", ()), "float32", Progress("error"))
except BackendUnavailableError as error:
    print(error)
"""


def bindings() -> list[Path]:
    """Return the folders that hold a package tensorrt_bindings: what is installed, and what make has fetched."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    installed = [Path(spec.origin).parent.parent] if spec is not None and spec.origin else []
    return installed + sorted(
        path.parent for path in (ROOT / "build" / "tensorrt-bindings").glob("*/tensorrt_bindings")
    )


@cache
def described(folder: Path, work: Path) -> dict[str, Any]:
    """Import the bindings of `folder` on empty libraries in a process of its own and return what they offer.

    `work` then holds them as the package tensorrt too.
    """
    package = work / "tensorrt_bindings"
    shutil.copytree(folder / "tensorrt_bindings", package)
    (metadata,) = folder.glob("tensorrt_*bindings-*.dist-info")
    major = re.search(r"bindings-(\d+)\.", metadata.name)[1]
    for library, symbols in STUBS.items():
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols.split())
        file = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{file}", "-o", str(package / file)]
        subprocess.run(command, input=source, text=True, check=True)
    names = json.dumps([name for name, _ in CLASSES.values()])
    done = subprocess.run([sys.executable, "-c", PROGRAM, names], cwd=work, capture_output=True, text=True, check=True)
    (work / "tensorrt").mkdir()
    (work / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    return {**json.loads(done.stdout), "folder": work}


@pytest.fixture(scope="module", params=bindings() or [None], ids=lambda path: path.name if path else "none")
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if request.param is None:
        pytest.skip("no package tensorrt_bindings here: make test-tensorrt-api fetches it")
    if shutil.which("cc") is None:
        pytest.skip("the bindings need three empty libraries, and there is no C compiler to make them")
    return described(request.param, tmp_path_factory.mktemp("bindings"))


@pytest.mark.parametrize("item", CLASSES, ids=lambda item: item.__name__)
def test_the_double_has_the_members_and_parameters_of_the_real_class(api: dict[str, Any], item: type) -> None:
    name, members = CLASSES[item]
    real = api["classes"][name]
    for member in members.split():
        assert member in real, f"{name}.{member} is not in TensorRT {api['version']}"
        played = inspect.getattr_static(item, member, None)
        if not inspect.isfunction(played):
            continue
        wanted = list(inspect.signature(played).parameters)[1:]
        signatures = re.findall(rf"^(?:\d+\. )?{member}\(self: [\w.]+(.*)\) ->", real[member], re.MULTILINE)
        offered = [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]
        assert any(
            wanted == names or (not wanted and "=" in text) for names, text in zip(offered, signatures, strict=True)
        ), f"{name}.{member} takes {offered} in TensorRT {api['version']}, the double {wanted}"


def used_names() -> set[tuple[str, ...]]:
    """Return every chain of attributes of TensorRT's package in the sources, where it is `trt`, `_trt` or `module`.

    `trt` is also the name of our record of a TensorRT; what that has itself is left out.
    """
    chains = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                if isinstance(node.value, ast.Attribute) and node.value.attr in ("trt", "_trt", "module"):
                    chains.add(tuple(parts))
                node = node.value
            if isinstance(node, ast.Name) and node.id in ("trt", "module") and parts:
                chains.add(tuple(parts))
    own = {*dir(TensorRT), *(field.name for field in dataclasses.fields(TensorRT))}
    return {chain for chain in chains if chain[0] not in own}


def test_every_name_in_the_sources_exists(api: dict[str, Any]) -> None:
    chains = used_names()
    assert ("Builder",) in chains and ("LayerType", "PLUGIN_V3") in chains and len(chains) >= 10
    for chain in chains:
        if chain[0] in RTX_ONLY:
            continue
        assert chain[0] in api["names"], chain
        if chain[0] in api["enums"] and len(chain) > 1:
            assert chain[1] in api["enums"][chain[0]], chain


def test_what_is_looked_for_is_there(api: dict[str, Any]) -> None:
    from chunkkv.gpu import tensorrt_library

    assert set(tensorrt_library._NEEDED) <= set(api["names"])
    assert "STRONGLY_TYPED" in api["enums"]["NetworkDefinitionCreationFlag"]
    assert {"PLUGIN_V3", "KV_CACHE_UPDATE"} <= set(api["enums"]["LayerType"])


def test_own_classes_live_on_the_real_ones_and_a_builder_that_cannot_start_says_so(api: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLASSES], cwd=api["folder"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"TensorRT {api['version']} cannot start: is there an NVIDIA GPU?\n"
