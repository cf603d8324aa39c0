"""Checks whether an engine can run on this machine, before anything is loaded; see `chunkkv doctor`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from chunkkv.engine.backends import TENSORRT_LLM
from chunkkv.engine.directory import EngineFiles, hash_file
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, broken, build_values, shown
from chunkkv.engine.tensorrt_build import MACHINE_GPU, NO_OPS, PACKAGES, PLUGIN, RTX, STANDARD, TensorRTBuild
from chunkkv.engine.tensorrt_llm_side_file import SideFile, engine_file
from chunkkv.errors import BackendUnavailableError, ChunkKVError
from chunkkv.findings import Finding
from chunkkv.native_files import HOW_TO_GET

_WHEELS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "tensorrt_llm": ("tensorrt-llm",),
}
# Layers that show what an engine does, under TensorRT's names and ours; the rest is arithmetic, counted together.
_TELLING_LAYERS = {
    "PLUGIN_V3": "ChunkKV plugins",
    "KV_CACHE_UPDATE": "KV cache updates",
    "ATTENTION_INPUT": "attention",  # each has one layer for its inputs and one for its outputs
    "ROTARY_EMBEDDING": "rotary embedding",
    "MATRIX_MULTIPLY": "matrix multiplication",
}


def check_engine(files: EngineFiles) -> list[Finding]:
    """Return what was checked: the files of the engine directory, its settings, packages, GPU, plugins and ranks."""
    findings = [Finding.ok("engine directory", f"{files.path}: every file is as it was built"), _settings(files)]
    if precision := files.build.get("weight_only_precision"):
        activations = files.build.get("weight_only_activations", "int8")  # the only one before the flag
        findings.append(Finding.ok("weights", f"{precision}, multiplied with activations in {activations}"))
    if precision := files.build.get("prefill_precision"):
        findings.append(Finding.ok("prompts", f"all blocks but the last are multiplied in {precision}"))
    if cache_dtype := files.build.get("kv_cache_dtype"):
        findings.append(Finding.ok("KV cache", f"in {cache_dtype}"))
    findings += _versions(files)
    if files.traits.needs_gpu:
        findings.append(_gpu(files))
    if files.tensorrt is not None:
        findings += _layers(files.tensorrt)
        findings += _validity(files.path, files.tensorrt)
    if files.backend == TENSORRT_LLM or (files.tensorrt is not None and files.tensorrt.chunkkv_ops == PLUGIN):
        findings += _plugins(files)
    if files.backend == TENSORRT_LLM:
        findings += check_tensorrt_llm_build(files)
    return findings


def _settings(files: EngineFiles) -> Finding:
    limits = f"prompts of at most {files.build['max_input_len']} tokens, {files.build['max_seq_len']} with the answer"
    if files.settings is None:
        return Finding.warning(
            "ChunkKV", f"built without ChunkKV; {limits}", "build with --chunkkv to compress prompts"
        )
    settings = files.settings
    share = f"{settings.budget_tokens} tokens" if settings.budget_tokens else f"{settings.keep_ratio:.4g} of a prompt"
    fixed = ", fixed in the engine" if files.traits.budget_is_fixed else ""
    return Finding.ok(
        "ChunkKV", f"keeps {share}{fixed}, prompts of at most {settings.min_tokens} tokens whole; {limits}"
    )


def _versions(files: EngineFiles) -> list[Finding]:
    findings = []
    packages = files.traits.packages if files.tensorrt is None else (PACKAGES[files.tensorrt.flavour],)
    for package in packages:
        built_with, installed = files.versions.get(package), installed_version(package)
        check = f"package {package}"
        advice = f"install {package} {built_with}" if built_with else f"install {package}"
        if installed is None:
            findings.append(Finding.breaks(check, "is not installed here", advice))
        elif built_with not in (None, installed) and files.traits.is_compiled:
            findings.append(
                Finding.breaks(check, f"{installed} is installed, the engine was built with {built_with}", advice)
            )
        else:
            findings.append(Finding.ok(check, installed))
    return findings


def installed_version(package: str) -> str | None:
    """Return the version of a package, whichever of its wheels brought it; None where it is not installed."""
    for name in _WHEELS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu(files: EngineFiles) -> Finding:
    from chunkkv.gpu.cuda_runtime import CudaRuntime
    from chunkkv.gpu.tensorrt_library import INSTALL

    try:
        cuda = CudaRuntime.load()
    except BackendUnavailableError as error:
        flavour = STANDARD if files.tensorrt is None else files.tensorrt.flavour
        return Finding.breaks("GPU", f"unknown, needs {error}", INSTALL[flavour])
    if reason := cuda.why_no_device():
        return Finding.breaks("GPU", f"none found ({reason})", "run it on a machine with one")
    gpus = [cuda.gpu(number).description for number in range(cuda.device_count())]
    return Finding.ok("GPU", "; ".join(gpus))


def _layers(build: TensorRTBuild) -> list[Finding]:
    """Say of each engine what TensorRT's parser made of its graph, telling layers first."""
    fixed = f"for compute capability {', '.join(build.compute_capabilities)}"
    targets = fixed if build.compute_capabilities else "portable" if build.flavour == RTX else f"for {MACHINE_GPU}"
    ops = "no ChunkKV" if build.chunkkv_ops == NO_OPS else f"ChunkKV as {build.chunkkv_ops}"
    findings = [Finding.ok("built with", f"{build.title}: {targets}, {ops}")]
    for file, counts in build.layers.items():
        telling = [f"{counts[name]} {shown}" for name, shown in _TELLING_LAYERS.items() if name in counts]
        others = sum(count for name, count in counts.items() if name not in _TELLING_LAYERS)
        text = f"{sum(counts.values())} parsed: {', '.join([*telling, f'{others} others'])}"
        findings.append(Finding.ok(f"layers of {file}", text))
    return findings


def _validity(path: Path, build: TensorRTBuild) -> list[Finding]:
    """Ask TensorRT for RTX about each engine; where it or a GPU is missing, other findings tell that."""
    from chunkkv.gpu.tensorrt_library import missing_gpu, tensorrt_of_engine
    from chunkkv.gpu.tensorrt_validity import why_not_valid

    if build.flavour != RTX or missing_gpu():
        return []
    findings = []
    try:
        trt = tensorrt_of_engine(path, build)
        for file in build.layers:
            if reason := why_not_valid(trt, path / file):
                change = "build it for this GPU: --compute_capability"
                findings.append(Finding.breaks(file, f"{trt.title} does not take it on this GPU: {reason}", change))
    except ChunkKVError:
        return []
    return findings


def _plugins(files: EngineFiles) -> list[Finding]:
    from chunkkv.gpu.cuda_runtime import gpu_capabilities
    from chunkkv.gpu.plugin_architectures import NO_KERNELS_ADVICE, described, no_kernels
    from chunkkv.gpu.tensorrt_plugins import find_plugin_library

    check, change = "plugin library", f"{HOW_TO_GET}, or let CHUNKKV_LIB name the libchunkkv.so there"
    try:
        flavour = STANDARD if files.tensorrt is None else files.tensorrt.flavour
        path = find_plugin_library(flavour, files.versions.get(PACKAGES[flavour], "10"))
    except BackendUnavailableError as error:
        return [Finding.breaks(check, f"needs {error}", change)]
    if files.backend == TENSORRT_LLM:
        expected = SideFile.read(files.path).plugin_library.get("sha256")
        if expected and hash_file(path).sha256 != expected:
            return [
                Finding.warning(
                    check, f"{path} is another build than the engine's", "use the library it was built with"
                )
            ]
    if sentence := no_kernels(path, gpu_capabilities()):
        return [Finding.breaks(check, sentence, NO_KERNELS_ADVICE)]
    if sentence := no_kernels(path, _targets(files)):
        return [Finding.warning(check, f"{sentence}, where the engine may run, too", NO_KERNELS_ADVICE)]
    return [Finding.ok(check, described(path))]


def _targets(files: EngineFiles) -> Sequence[str]:
    """Return the compute capabilities that TensorRT for RTX built an engine for, none where that cannot be told."""
    from chunkkv.gpu.tensorrt_library import find_tensorrt

    if files.tensorrt is None:
        return ()
    try:
        return files.tensorrt.compute_capabilities or find_tensorrt(files.tensorrt.flavour).compute_capabilities
    except BackendUnavailableError:
        return ()


def check_tensorrt_llm_build(files: EngineFiles) -> list[Finding]:
    """Return whether what TensorRT-LLM wrote of the build is what ChunkKV needs, and whether every rank is there."""
    side_file = SideFile.read(files.path)
    section = files.build.get("plugin_config")
    plugin_config = section if isinstance(section, dict) else {}
    values = build_values(SimpleNamespace(**files.build), SimpleNamespace(**plugin_config))
    findings = []
    for precondition in broken(BUILD_PRECONDITIONS, values):
        needed = f"{shown(values[precondition.name])}; ChunkKV needs {precondition.allowed}"
        findings.append(Finding.breaks(precondition.name, needed, f"build it again: {precondition.remedy}"))
    block = plugin_config.get("tokens_per_block", side_file.tokens_per_block)
    if block != side_file.tokens_per_block:
        differs = f"config.json says {block}, the plugins were built for {side_file.tokens_per_block}"
        findings.append(Finding.breaks("tokens_per_block", differs, "build it again"))
    if not findings:
        findings.append(Finding.ok("build settings", "paged cache, packed input, one beam, no speculative decoding"))
    return [*findings, _ranks(files, len(side_file.ranks))]


def _ranks(files: EngineFiles, count: int) -> Finding:
    missing = [engine_file(rank) for rank in range(count) if not (files.path / engine_file(rank)).is_file()]
    if missing:
        return Finding.breaks("ranks", f"{', '.join(missing)} is missing of {count}", "build every rank")
    if count > 1:
        remedy = f"use mpirun -n {count} with chunkkv.executors.tensorrt_llm.runner, or the C++ runtime"
        return Finding.warning("ranks", f"{count}; ChunkKVSession and chunkkv generate drive one", remedy)
    return Finding.ok("ranks", "1")
