"""chunkkv doctor: looks at an engine directory, this machine and a Triton repository, and says what would break."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from chunkkv.engine.directory import TENSORRT_LLM, EngineFiles, hash_file
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, broken, build_values, shown
from chunkkv.engine.tensorrt_llm_side_file import SideFile, engine_file
from chunkkv.errors import BackendUnavailableError, EngineError
from chunkkv.findings import BREAKS, WARNING, Finding, breaks, ok, warning
from chunkkv.triton.repository.check import check_repository

_PACKAGES = {"onnxruntime": ("onnxruntime",), "tensorrt": ("tensorrt",), TENSORRT_LLM: ("tensorrt", "tensorrt_llm")}
_WHEELS = {"tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt_llm": ("tensorrt-llm",)}


def diagnose(
    engine_dir: Path, triton_repo: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    """Return what was checked; `environment` None is that of this process."""
    try:
        files = EngineFiles.load(engine_dir)
    except EngineError as error:
        return [breaks("engine directory", str(error), "build it again, or give another --engine_dir")]
    found = [ok("engine directory", f"{engine_dir}: every file is as it was built"), _settings(files)]
    found += _versions(files)
    if files.backend in ("tensorrt", TENSORRT_LLM):
        found.append(_gpu())
        if files.settings is not None:
            found += _plugins(files)
    if files.backend == TENSORRT_LLM:
        found += _tensorrt_llm(files)
    if triton_repo is not None:
        found += check_repository(triton_repo, files, os.environ if environment is None else environment)
    return found


def would_break(findings: list[Finding]) -> bool:
    """Return whether anything would."""
    return any(finding.state == BREAKS for finding in findings)


def report(findings: list[Finding], as_json: bool) -> str:
    """Return the findings as a table with a summary, or as one JSON object."""
    counts = {state: sum(one.state == state for one in findings) for state in (BREAKS, WARNING)}
    if as_json:
        values = [dataclasses.asdict(finding) for finding in findings]
        return json.dumps({"findings": values, "would_break": counts[BREAKS], "warnings": counts[WARNING]}, indent=1)
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<11}  {finding.check:<{width}}  {finding.found}")
        if finding.change:
            lines.append(f"{'':<11}  {'':<{width}}  -> {finding.change}")
    lines.append(f"{len(findings)} checks: {counts[BREAKS]} would break, {counts[WARNING]} to note")
    return "\n".join(lines)


def _settings(files: EngineFiles) -> Finding:
    limits = f"prompts of at most {files.build['max_input_len']} tokens, {files.build['max_seq_len']} with the answer"
    if files.settings is None:
        return warning("ChunkKV", f"built without ChunkKV; {limits}", "build with --chunkkv to compress prompts")
    settings = files.settings
    share = f"{settings.budget_tokens} tokens" if settings.budget_tokens else f"{settings.keep_ratio:.4g} of a prompt"
    fixed = ", fixed in the engine" if files.budget_is_fixed else ""
    what = f"keeps {share}{fixed}, prompts of at most {settings.min_tokens} tokens whole; {limits}"
    return ok("ChunkKV", what)


def _versions(files: EngineFiles) -> list[Finding]:
    found = []
    for package in _PACKAGES.get(files.backend, ()):
        built, here = files.versions.get(package), _installed(package)
        check, advice = f"package {package}", f"install {package} {built}" if built else f"install {package}"
        if here is None:
            found.append(breaks(check, "is not installed here", advice))
        elif built is not None and built != here and files.backend != "onnxruntime":
            found.append(breaks(check, f"{here} is installed, the engine was built with {built}", advice))
        else:
            found.append(ok(check, here))
    return found


def _installed(package: str) -> str | None:
    for name in _WHEELS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu() -> Finding:
    from chunkkv.gpu.cuda_runtime import CudaRuntime

    try:
        count = CudaRuntime.load().device_count()
    except BackendUnavailableError as error:
        return breaks("GPU", f"needs {error}", "install it")
    return ok("GPU", f"{count} found") if count else breaks("GPU", "none found", "run it on a machine with one")


def _plugins(files: EngineFiles) -> list[Finding]:
    from chunkkv.gpu.tensorrt_library import find_plugin_library

    check, change = "plugin library", "build the plugins with CMake, or let CHUNKKV_LIB name the libchunkkv.so there"
    try:
        path = find_plugin_library(SimpleNamespace(__version__=files.versions.get("tensorrt", "10")))
    except BackendUnavailableError as error:
        return [breaks(check, f"needs {error}", change)]
    if files.backend == TENSORRT_LLM:
        expected = SideFile.read(files.path).plugin_library.get("sha256")
        if expected and hash_file(path).sha256 != expected:
            return [warning(check, f"{path} is another build than the engine's", "use the library it was built with")]
    return [ok(check, str(path))]


def _tensorrt_llm(files: EngineFiles) -> list[Finding]:
    """Check what TensorRT-LLM wrote of the build against what ChunkKV needs."""
    side, found = SideFile.read(files.path), []
    plugin = files.build.get("plugin_config")
    plugin_config = plugin if isinstance(plugin, dict) else {}
    values = build_values(SimpleNamespace(**files.build), SimpleNamespace(**plugin_config))
    for each in broken(BUILD_PRECONDITIONS, values):
        needed = f"{shown(values[each.name])}; ChunkKV needs {each.allowed}"
        found.append(breaks(each.name, needed, f"build it again: {each.remedy}"))
    block = plugin_config.get("tokens_per_block", side.tokens_per_block)
    if block != side.tokens_per_block:
        what = f"config.json says {block}, the plugins were built for {side.tokens_per_block}"
        found.append(breaks("tokens_per_block", what, "build it again"))
    if not found:
        found.append(ok("build settings", "paged cache, packed input, one beam, no speculative decoding"))
    ranks = len(side.ranks)
    absent = [engine_file(rank) for rank in range(ranks) if not (files.path / engine_file(rank)).is_file()]
    if absent:
        found.append(breaks("ranks", f"{', '.join(absent)} is missing of {ranks}", "build every rank"))
    elif ranks > 1:
        how = f"mpirun -n {ranks} with chunkkv.executors.tensorrt_llm.runner, or the C++ runtime"
        found.append(warning("ranks", f"{ranks}; ChunkKVSession and chunkkv generate drive one", f"use {how}"))
    else:
        found.append(ok("ranks", "1"))
    return found
