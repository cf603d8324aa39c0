"""What a build with TensorRT is for: which TensorRT, which GPUs, and how ChunkKV gets into the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkkv.command_line import UsageError
from chunkkv.engine.tensorrt_build import FUNCTIONS, MACHINE_GPU, NO_OPS, PLUGIN, TITLES
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.gpu import tensorrt_plugins
from chunkkv.gpu.cuda_runtime import gpu_capabilities
from chunkkv.gpu.plugin_architectures import no_kernels
from chunkkv.gpu.tensorrt_library import (
    AUTO,
    FIRST_CAPABILITY,
    RTX,
    TensorRT,
    find_tensorrt,
    installed,
    is_new_enough,
    missing,
)
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.model_config import ModelConfig

OPS = (AUTO, PLUGIN, FUNCTIONS)
_UNDECIDED = "undecided"
_ANY_GPU = f"every GPU of compute capability {FIRST_CAPABILITY} and later that it supports"


@dataclass(frozen=True)
class Options:
    """The flags of --backend tensorrt.

    Parameters
    ----------
    tensorrt : str, default "auto"
        "standard", "rtx", or "auto" for the standard TensorRT where it is installed, else TensorRT for RTX.
    compute_capabilities : sequence of str, default ()
        GPUs to build for, as in "8.9"; none builds portable engines. TensorRT for RTX only.
    chunkkv_ops : str, default "auto"
        "plugin", "functions", or "auto" for plugins where they are found and have a kernel for the model.
    timing_cache : Path or None, default None
        A file of kernel timings: read where it exists, written when all engines are built. Standard TensorRT only.
    """

    tensorrt: str = AUTO
    compute_capabilities: Sequence[str] = ()
    chunkkv_ops: str = AUTO
    timing_cache: Path | None = None

    def missing(self, with_chunkkv: bool) -> list[str]:
        """Return what this machine lacks for these flags, each to be read after "needs"; empty if nothing."""
        lacking = missing(self.tensorrt)
        try:
            trt = find_tensorrt(self.tensorrt)
        except BackendUnavailableError:
            return lacking
        if lacking and any(other.builds_ahead for other in installed()):
            lacking[-1] += "; or give --tensorrt rtx, which builds without a GPU"
        if with_chunkkv and self.chunkkv_ops == PLUGIN and (reason := _missing_plugins(trt)):
            advice = f"give --chunkkv_ops {FUNCTIONS}"
            lacking.append(reason if advice in reason else f"{reason}. Or {advice}, which needs no library")
        return lacking


@dataclass(frozen=True)
class Target:
    """What a build is for, decided from the flags, this machine and the model.

    Parameters
    ----------
    trt : TensorRT or None
        The TensorRT that builds; None in a dry run without one.
    compute_capabilities : tuple of str
        GPUs that are built for; empty for portable engines, or those of this machine's GPU.
    chunkkv_ops : str
        "plugin", "functions", "none" without ChunkKV, or "undecided" without a TensorRT.
    reason : str
        Why ChunkKV gets in that way.
    lacking : tuple of str
        What this machine lacks for the build.
    """

    trt: TensorRT | None
    compute_capabilities: tuple[str, ...]
    chunkkv_ops: str
    reason: str
    lacking: tuple[str, ...]

    @classmethod
    def decide(
        cls, options: Options, model: ModelConfig, with_chunkkv: bool, settings: ChunkKVSettings | None = None
    ) -> Target:
        """Return what to build for; raises UsageError for flags that the TensorRT at hand does not have.

        `settings` are ChunkKV's, where they are known.
        """
        for capability in options.compute_capabilities:
            if not is_new_enough(capability):
                raise UsageError(
                    f"--compute_capability is {capability}; engines run on GPUs of {FIRST_CAPABILITY} and later: give "
                    "one of those, or leave it away"
                )
        try:
            trt = find_tensorrt(options.tensorrt)
            _check_flags(options, trt)
        except BackendUnavailableError:
            trt = None
        ops, reason = _decide_ops(options, trt, model, settings) if with_chunkkv else (NO_OPS, "without --chunkkv")
        lacking = tuple(options.missing(with_chunkkv))
        return cls(trt, tuple(options.compute_capabilities), ops, reason, lacking)

    def warnings(self) -> list[str]:
        """Return what may go wrong where the engines run, a sentence each: GPUs that the plugins have no kernel for."""
        if self.trt is None or self.chunkkv_ops != PLUGIN or self.lacking:
            return []
        library = tensorrt_plugins.find_plugin_library(self.trt.flavour, self.trt.version)
        targets = self.compute_capabilities or self.trt.compute_capabilities or gpu_capabilities()
        sentence = no_kernels(library, targets)
        return [f"{sentence}; build the plugins for them, too, or give --chunkkv_ops {FUNCTIONS}"] if sentence else []

    def lines(self) -> list[str]:
        """Return what --dry_run says of it, a line each."""
        ops = f"ChunkKV operators: {self.chunkkv_ops} ({self.reason})"
        lacking = [f"missing here: {lack}" for lack in self.lacking]
        if self.trt is None:
            unchecked = [
                f"compute capability {capability}: not checked, only a TensorRT knows which GPUs it builds for"
                for capability in self.compute_capabilities
            ]
            return [*unchecked, ops, *lacking]
        gpus = ", ".join(self.compute_capabilities) or (_ANY_GPU if self.trt.builds_ahead else MACHINE_GPU)
        kind = "compute capability " if self.compute_capabilities else ""
        return [f"{self.trt.title}, engines for {kind}{gpus}", ops, *lacking]


def _check_flags(options: Options, trt: TensorRT) -> None:
    """Raise UsageError for a flag that `trt` has no use for, or a GPU that it cannot build for."""
    if options.timing_cache is not None and trt.builds_ahead:
        raise UsageError(
            f"--timing_cache has no effect with {trt.title}, which times no kernels while it builds: leave it away"
        )
    offered = ", ".join(trt.compute_capabilities)
    for capability in options.compute_capabilities:
        if not trt.builds_ahead:
            raise UsageError(
                f"--compute_capability {capability} has no effect with {trt.title}, which builds for the GPU of this "
                f"machine: leave it away, or give --tensorrt {RTX} ({TITLES[RTX]})"
            )
        if capability not in trt.compute_capabilities:
            raise UsageError(f"--compute_capability is {capability}; {trt.title} offers {offered}")


def _decide_ops(
    options: Options, trt: TensorRT | None, model: ModelConfig, settings: ChunkKVSettings | None
) -> tuple[str, str]:
    """Return how ChunkKV gets into the engines, and why."""
    if settings is not None and options.chunkkv_ops != FUNCTIONS:
        try:
            settings.check_kernels()
        except ConfigError as error:
            if options.chunkkv_ops == PLUGIN:
                raise UsageError(f"--chunkkv_ops is {PLUGIN}, but {error}; or give --chunkkv_ops {FUNCTIONS}") from None
            return FUNCTIONS, str(error)
    sizes = model.head_dim, model.num_heads, model.num_kv_heads
    if options.chunkkv_ops != AUTO:
        if options.chunkkv_ops == PLUGIN:
            tensorrt_plugins.check_head_sizes(*sizes, advice=f"give --chunkkv_ops {FUNCTIONS}")
        return options.chunkkv_ops, "as --chunkkv_ops says"
    if trt is None:
        return _UNDECIDED, "plugins where they are found for the TensorRT that builds, else functions"
    if reason := _missing_plugins(trt):
        return FUNCTIONS, f"plugins need {reason}"
    try:
        tensorrt_plugins.check_head_sizes(*sizes, advice="functions have no such limit")
    except ConfigError as error:
        return FUNCTIONS, str(error)
    return PLUGIN, f"found {tensorrt_plugins.find_plugin_library(trt.flavour, trt.version)}"


def _missing_plugins(trt: TensorRT) -> str | None:
    """Return what is missing of the plugins for `trt`, None where all is there."""
    try:
        tensorrt_plugins.find_plugin_library(trt.flavour, trt.version)
        if trt.flavour == RTX:
            tensorrt_plugins.find_registry_alias()
    except BackendUnavailableError as error:
        return str(error)
    return None
