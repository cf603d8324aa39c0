"""Finds a TensorRT, or says what is missing; used when building and when running.

There are two: the standard TensorRT (package tensorrt), and TensorRT for RTX (package tensorrt_rtx), which builds
engines ahead of time and without a GPU. Their interfaces are the same where this project uses them. Features are
looked for, not version numbers: names move between versions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from chunkkv.engine.tensorrt_build import PACKAGES, RTX, STANDARD, TITLES, TensorRTBuild
from chunkkv.errors import BackendUnavailableError, EngineMismatchError
from chunkkv.gpu.cuda_runtime import CudaRuntime

AUTO = "auto"
CHOICES = (AUTO, STANDARD, RTX)
FIRST_CAPABILITY = "8.0"  # the first GPUs with bfloat16, which the engines use; the plugins have kernels from there on
FIRST_VERSION = "10.15"  # of the standard TensorRT: the first with everything in _NEEDED
INSTALL = {
    STANDARD: "pip install 'chunkkv-trt[tensorrt]'",
    RTX: "pip install 'chunkkv-trt[rtx]'",
}
# The package tensorrt_rtx is a thin one over the bindings; the wheels of the bindings can be installed without it.
_MODULES = {STANDARD: ("tensorrt",), RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_NEEDED = ("IKVCacheUpdateLayer", "IRotaryEmbeddingLayer", "IAttention", "OnnxParser", "IProgressMonitor")
_CAPABILITY_NAME = re.compile(r"SM(\d+)(\d)")


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT that is installed here, and what it can do.

    Parameters
    ----------
    module : the Python package; `Any`, because it has no types.
    flavour : "standard" or "rtx".
    version : its version, as in "11.4.0.106".
    compute_capabilities : those from FIRST_CAPABILITY on that engines can be built for without that GPU, ascending, as
        in "8.9". Empty for a TensorRT that builds for the GPU of the machine only.
    """

    module: Any
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]

    @classmethod
    def of(cls, module: Any, flavour: str = STANDARD) -> TensorRT:
        """Return what the imported package `module` is."""
        return cls(module, flavour, str(module.__version__), _offered_capabilities(module))

    @property
    def title(self) -> str:
        """Its name and version for people, as in "TensorRT for RTX 1.7.1.116"."""
        return f"{TITLES[self.flavour]} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for GPUs that this machine does not have.

        Then it times no kernels, and has no use for a timing cache.
        """
        return bool(self.compute_capabilities)


def find_tensorrt(choice: str = AUTO) -> TensorRT:
    """Return the TensorRT to use.

    Parameters
    ----------
    choice : str, default "auto"
        "standard" or "rtx"; "auto" takes the standard one where it is installed, else TensorRT for RTX.

    Raises
    ------
    BackendUnavailableError
        Where it is not installed, cannot be loaded, or lacks something that the engines need.
    """
    flavours = (STANDARD, RTX) if choice == AUTO else (choice,)
    for flavour in flavours:
        if (module := _import_flavour(flavour)) is not None:
            _require_names(module, TITLES[flavour], _NEEDED)
            return TensorRT.of(module, flavour)
    packages = " or ".join(f"{PACKAGES[flavour]!r} ({INSTALL[flavour]})" for flavour in flavours)
    raise BackendUnavailableError(f"the Python package {packages}: not installed")


def import_tensorrt() -> Any:
    """Return the package tensorrt, whatever its version; raises BackendUnavailableError where it is missing or broken.

    TensorRT-LLM brings a version of its own, which may lack what the graphs for TensorRT need.
    """
    module = _import_flavour(STANDARD)
    if module is None:
        raise BackendUnavailableError("'tensorrt' is not installed")
    return module


def tensorrt_of_engine(source: object, built_with: TensorRTBuild) -> TensorRT:
    """Return the TensorRT that engines of `source` run with.

    Parameters
    ----------
    source : object
        The engine directory, for messages.
    built_with : TensorRTBuild
        What its manifest says of the TensorRT that built it.

    Raises
    ------
    BackendUnavailableError
        Where no TensorRT of that kind is installed; the message names both.
    EngineMismatchError
        Where another version is installed.
    """
    try:
        trt = find_tensorrt(built_with.flavour)
    except BackendUnavailableError as error:
        other = next((f"; installed is {trt.title}" for trt in installed() if trt.flavour != built_with.flavour), "")
        raise BackendUnavailableError(f"{source} was built with {built_with.title} and needs {error}{other}") from None
    if trt.version != built_with.version:
        raise EngineMismatchError(
            f"{source} was built with {built_with.title}, installed is {trt.title}: install that version or build "
            "the engine again"
        )
    return trt


def installed() -> list[TensorRT]:
    """Return every TensorRT that can be used here, the standard one first."""
    available = []
    for flavour in (STANDARD, RTX):
        try:
            available.append(find_tensorrt(flavour))
        except BackendUnavailableError:
            continue
    return available


def missing(choice: str = AUTO) -> list[str]:
    """Return what this machine lacks to build engines with the TensorRT of `choice`; empty if nothing."""
    try:
        trt = find_tensorrt(choice)
    except BackendUnavailableError as error:
        return [str(error)]
    return [] if trt.builds_ahead else missing_gpu()


def missing_gpu() -> list[str]:
    """Return what this machine lacks to use a GPU; empty if nothing."""
    try:
        if reason := CudaRuntime.load().why_no_device():
            return [f"an NVIDIA GPU, which was not found ({reason})"]
    except BackendUnavailableError as error:
        return [str(error)]
    return []


def _import_flavour(flavour: str) -> ModuleType | None:
    """Return the package of a TensorRT, None where it is not installed."""
    for name in _MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise BackendUnavailableError(f"the Python package {name!r}, which lacks {error.name!r}") from None
        except ImportError as error:
            raise BackendUnavailableError(f"the Python package {name!r}, which cannot be loaded ({error})") from None
    return None


def _require_names(module: Any, title: str, needed: Sequence[str]) -> None:
    if absent := [name for name in needed if not hasattr(module, name)]:
        version = getattr(module, "__version__", "the one installed")
        least = f" {FIRST_VERSION} or later" if title == TITLES[STANDARD] else ""
        raise BackendUnavailableError(f"{title}{least}; {version} has no {absent[0]}")


def _offered_capabilities(module: Any) -> tuple[str, ...]:
    """Return the compute capabilities that engines can be built for, none where the builder takes no target."""
    config, kinds = getattr(module, "IBuilderConfig", None), getattr(module, "ComputeCapability", None)
    if kinds is None or not hasattr(config, "set_compute_capability"):
        return ()
    matches = (_CAPABILITY_NAME.fullmatch(name) for name in kinds.__members__)
    offered = [f"{match[1]}.{match[2]}" for match in matches if match]
    return tuple(sorted((capability for capability in offered if is_new_enough(capability)), key=_numbers))


def is_new_enough(capability: str) -> bool:
    """Return whether engines can run on GPUs of a compute capability, as in "8.9"."""
    return _numbers(capability) >= _numbers(FIRST_CAPABILITY)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def capability_member(trt: TensorRT, capability: str) -> Any:
    """Return the member of ComputeCapability for one of `trt.compute_capabilities`."""
    return getattr(trt.module.ComputeCapability, "SM" + capability.replace(".", ""))
