"""Imports TensorRT-LLM from a source tree, over NVIDIA's bindings of TensorRT on empty libraries."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from tensorrt_llm_source import recording, stand_ins

SYMBOLS = {
    "nvinfer": "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getPluginRegistry "
    "getBuilderPluginRegistry",
    "nvinfer_plugin": "initLibNvInferPlugins",
    "nvonnxparser": "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getNvOnnxParserVersion",
}
_GPU = "NVIDIA H100 80GB HBM3"


def bindings_on_empty_libraries(folder: Path, work: Path) -> Path:
    """Copy NVIDIA's bindings from `folder` to `work`, with empty libraries beside them; return where to import from."""
    package = work / "tensorrt_bindings"
    shutil.copytree(folder / "tensorrt_bindings", package)
    for library, symbols in SYMBOLS.items():
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols.split())
        file = f"lib{library}.so.10"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{file}", "-o", str(package / file)]
        subprocess.run(command, input=source, text=True, check=True)
    return work


def import_tensorrt(folder: Path) -> Any:
    """Return the bindings as the package tensorrt, with what needs a real library replaced by recorders."""
    sys.path.insert(0, str(folder))
    bindings = importlib.import_module("tensorrt_bindings")
    # Beside the bindings there is a module of the same names, the compiled one.
    trt: Any = types.ModuleType("tensorrt")
    vars(trt).update({name: value for name, value in vars(bindings).items() if not name.startswith("__")})
    trt.__version__ = bindings.__version__
    trt.tensorrt = trt
    layers = [name for name in vars(bindings) if re.fullmatch("I[A-Z][A-Za-z]*Layer|ILayer|IPluginV[23]Layer", name)]
    for name in layers:
        setattr(trt, name, recording.RecordedLayer)
    trt.ITensor, trt.INetworkDefinition = recording.RecordedTensor, recording.RecordedNetwork
    trt.Builder, trt.ITimingCache = recording.RecordedBuilder, recording.TimingCache
    trt.PluginField, trt.PluginFieldCollection = recording.recorded_fields(bindings)
    recording.RecordedBuilder.trt = trt
    registry = recording.RecordedRegistry()
    trt.IHostMemory = memoryview
    trt.get_plugin_registry = lambda: registry
    trt.Logger = _logger_class(bindings)
    trt.Runtime = lambda logger: object()
    sys.modules["tensorrt"] = trt
    return trt


def _logger_class(bindings: Any) -> type:
    class Logger(bindings.ILogger):
        """Logger whose messages go nowhere."""

        INTERNAL_ERROR, ERROR = bindings.ILogger.INTERNAL_ERROR, bindings.ILogger.ERROR
        WARNING, INFO, VERBOSE = bindings.ILogger.WARNING, bindings.ILogger.INFO, bindings.ILogger.VERBOSE

        def __init__(self, severity: Any = None) -> None:
            super().__init__()
            self.min_severity = severity

        def log(self, severity: Any, message: str) -> None:
            pass

    return Logger


def import_tensorrt_llm(source: Path, bindings: Path) -> tuple[Any, Any]:
    """Return the packages tensorrt and tensorrt_llm; the source tree is only read."""
    os.environ["TRT_LLM_NO_LIB_INIT"] = "1"
    trt = import_tensorrt(bindings)
    stand_ins.install(_imported(source / "tensorrt_llm"))
    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    _pretend_one_gpu()
    package = importlib.import_module("tensorrt_llm")
    # Weights that no checkpoint gives would be drawn on the GPU.
    importlib.import_module("tensorrt_llm.parameter").Parameter.xavier_init = staticmethod(lambda weights: None)
    return trt, package


def _pretend_one_gpu() -> None:
    """Answer what trtllm-build asks of torch.cuda before it makes a network."""
    import torch

    properties = types.SimpleNamespace(major=9, minor=0, name=_GPU, total_memory=1 << 36)
    answers = {"current_device": 0, "device_count": 1, "is_available": False, "set_device": None}
    answers |= {"get_device_properties": properties, "get_device_name": _GPU, "get_device_capability": (9, 0)}
    answers |= {"mem_get_info": (1 << 36, 1 << 36), "empty_cache": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)


def _imported(package: Path) -> set[str]:
    """Return the top-level packages that any module of the package imports."""
    names = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - {"tensorrt", "tensorrt_llm", "torch", "numpy"}
