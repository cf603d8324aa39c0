"""Says what of NVIDIA's software this machine has, and what that allows each backend; see `chunkkv doctor`.

Nothing is required: every package may be missing, and is then reported as missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.engine.backends import ONNXRUNTIME, TENSORRT, TENSORRT_LLM
from chunkkv.engine.tensorrt_build import FLAVOURS, TITLES
from chunkkv.errors import BackendUnavailableError, EngineRunError
from chunkkv.executors.machine_check import installed_version
from chunkkv.findings import Finding
from chunkkv.gpu.cuda_compiler import find_nvcc
from chunkkv.gpu.cuda_runtime import CudaRuntime, Gpu
from chunkkv.gpu.plugin_architectures import NO_KERNELS_ADVICE, described, no_kernels
from chunkkv.gpu.tensorrt_library import INSTALL, TensorRT, find_tensorrt
from chunkkv.gpu.tensorrt_plugins import find_plugin_library, plugin_libraries

_NO_GPU = "run it on a machine with an NVIDIA GPU"
_NO_PLUGINS = "run make plugins, or let CHUNKKV_LIB name the libchunkkv.so beside them"


@dataclass(frozen=True)
class Machine:
    """What was found here.

    Parameters
    ----------
    libraries : dict of str to TensorRT or str
        Per flavour the TensorRT, or why there is none.
    gpus : list of Gpu
        The GPUs that CUDA can use.
    no_gpu : str
        Why none was found; empty where there is one.
    gpu_is_unknown : bool, default False
        CUDA could not be asked, so there may be one.
    """

    libraries: dict[str, TensorRT | str]
    gpus: list[Gpu]
    no_gpu: str
    gpu_is_unknown: bool = False

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine."""
        libraries: dict[str, TensorRT | str] = {}
        for flavour in FLAVOURS:
            try:
                libraries[flavour] = find_tensorrt(flavour)
            except BackendUnavailableError as error:
                libraries[flavour] = str(error)
        try:
            cuda = CudaRuntime.load()
        except BackendUnavailableError as error:
            return cls(libraries, [], f"cannot be asked for without {error}", gpu_is_unknown=True)
        try:
            reason = cuda.why_no_device() or ""
            gpus = [] if reason else [cuda.gpu(number) for number in range(cuda.device_count())]
        except EngineRunError as error:
            return cls(libraries, [], str(error))
        return cls(libraries, gpus, reason)

    @property
    def tensorrts(self) -> list[TensorRT]:
        """Every TensorRT that can be used, the one that --tensorrt auto takes first."""
        return [library for library in self.libraries.values() if isinstance(library, TensorRT)]


def describe_machine() -> list[Finding]:
    """Return what there is and what is missing, then one finding for each backend: build, run, both or neither."""
    machine = Machine.here()
    findings = [_tensorrt(flavour, library) for flavour, library in machine.libraries.items()]
    findings += [_plugins(machine), *_gpus(machine), _nvcc()]
    return [*findings, _onnxruntime_backend(), _tensorrt_backend(machine), _tensorrt_llm_backend(machine)]


def _tensorrt(flavour: str, library: TensorRT | str) -> Finding:
    if isinstance(library, TensorRT):
        return Finding.ok(TITLES[flavour], library.version)
    return Finding.absent(TITLES[flavour], f"needs {library}", INSTALL[flavour])


def _plugins(machine: Machine) -> Finding:
    capabilities = [gpu.compute_capability for gpu in machine.gpus]
    if libraries := plugin_libraries():
        if sentences := [sentence for library in libraries if (sentence := no_kernels(library, capabilities))]:
            return Finding.warning("plugin libraries", sentences[0], NO_KERNELS_ADVICE)
        return Finding.ok("plugin libraries", ", ".join(map(described, libraries)))
    return Finding.absent("plugin libraries", "none", _NO_PLUGINS)


def _gpus(machine: Machine) -> list[Finding]:
    if machine.gpu_is_unknown:
        return [Finding.absent("GPU", f"unknown: {machine.no_gpu}", _how_to_ask(machine))]
    if machine.no_gpu:
        return [Finding.absent("GPU", f"none: {machine.no_gpu}", _NO_GPU)]
    return [Finding.ok(f"GPU {number}", gpu.description) for number, gpu in enumerate(machine.gpus)]


def _how_to_ask(machine: Machine) -> str:
    """Say how to install what CUDA is asked with: it comes with the extra of the TensorRT that is there."""
    flavours = [trt.flavour for trt in machine.tensorrts] or FLAVOURS
    return " or ".join(INSTALL[flavour] for flavour in flavours)


def _nvcc() -> Finding:
    compiler = find_nvcc()
    if compiler is None:
        return Finding.absent("nvcc", "none; only building the plugins needs it", "make plugins fetches one")
    return Finding.ok("nvcc", f"{compiler.path}, CUDA {compiler.release or 'of unknown release'}")


def _onnxruntime_backend() -> Finding:
    check, version = _backend(ONNXRUNTIME), installed_version("onnxruntime")
    if version is None:
        return Finding.absent(check, "neither build nor run: the package onnxruntime is not installed", "install it")
    return Finding.ok(check, f"build and run, with onnxruntime {version}")


def _tensorrt_backend(machine: Machine) -> Finding:
    """Say what the TensorRT that --tensorrt auto takes can do; another one may be asked for by name."""
    check, tensorrts = _backend(TENSORRT), machine.tensorrts
    if not tensorrts:
        remedy = f"{INSTALL[FLAVOURS[-1]]} builds on any machine"
        return Finding.absent(check, "neither build nor run: no TensorRT is installed", remedy)
    able = [trt for trt in tensorrts if machine.gpus or trt.builds_ahead]
    if not able:
        return Finding.absent(check, f"neither build nor run: {tensorrts[0].title} needs a GPU for both", _NO_GPU)
    build = f"build, with {', '.join(f'{trt.title} ({_ops(trt)})' for trt in able)}"
    if machine.gpus:
        return Finding.ok(check, f"{build}; and run what they built")
    return Finding.warning(check, f"{build}; not run, which needs a GPU", _NO_GPU)


def _ops(trt: TensorRT) -> str:
    try:
        find_plugin_library(trt.flavour, trt.version)
    except BackendUnavailableError:
        return "ChunkKV as functions"
    return "ChunkKV as plugins"


def _tensorrt_llm_backend(machine: Machine) -> Finding:
    check, version = _backend(TENSORRT_LLM), installed_version("tensorrt_llm")
    if version is None:
        remedy = "use one of NVIDIA's containers with TensorRT-LLM"
        return Finding.absent(check, "neither build nor run: the package tensorrt_llm is not installed", remedy)
    if not machine.gpus:
        return Finding.absent(check, f"neither build nor run: tensorrt_llm {version} needs a GPU for both", _NO_GPU)
    tensorrt = installed_version("tensorrt")
    try:
        find_plugin_library(FLAVOURS[0], tensorrt or "")
    except BackendUnavailableError as error:
        return Finding.absent(check, f"neither build nor run with ChunkKV: needs {error}", _NO_PLUGINS)
    return Finding.ok(check, f"build and run, with tensorrt_llm {version} and TensorRT {tensorrt}")


def _backend(name: str) -> str:
    return f"backend {name}"
