"""chunkkv doctor without an engine: what a machine has, and what that allows each backend."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.messages import naming
from support.tensorrt_double import Double, machine_of
from support.tensorrt_rtx_double import VERSION, RtxMachine

from chunkkv.cli.main import main
from chunkkv.errors import BackendUnavailableError
from chunkkv.executors import machine_report
from chunkkv.executors.machine_report import describe_machine
from chunkkv.findings import ABSENT, OK, WARNING, Finding
from chunkkv.gpu import cuda_compiler, tensorrt_plugins
from chunkkv.gpu.cuda_compiler import CudaCompiler, find_nvcc
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.gpu.plugin_architectures import ARCHITECTURES_FILE

machine = pytest.fixture(machine_of)
PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.fixture
def rtx(machine: Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RtxMachine:
    """A machine with TensorRT for RTX alone."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    double = RtxMachine(machine)
    double.install(monkeypatch, tmp_path)
    return double


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with none of NVIDIA's software."""
    for package in (*PACKAGES, "cuda.bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(CudaRuntime, "load", CudaRuntime.load.__wrapped__)
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", ())
    monkeypatch.delenv("CHUNKKV_LIB", raising=False)
    monkeypatch.setattr(machine_report, "find_nvcc", lambda: None)
    monkeypatch.setattr(machine_report, "installed_version", lambda package: None)


def named(check: str) -> Finding:
    (finding,) = [finding for finding in describe_machine() if finding.check == check]
    return finding


def test_a_machine_with_nothing_is_described_and_nothing_breaks(bare: None, capsys) -> None:
    main(["doctor", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert (values["would_break"], values["warnings"], values["absent"]) == (0, 0, len(values["findings"]))
    assert all(finding["found"] and finding["change"] for finding in values["findings"])
    assert not any("\n" in finding["found"] + finding["change"] for finding in values["findings"])
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 checks: 0 would break, 0 to note, 8 absent"
    for backend in ("onnxruntime", "tensorrt", "tensorrt_llm"):
        assert any(f"backend {backend} " in line and "neither build nor run" in line for line in lines)


def test_everything_is_named_with_its_version(rtx: RtxMachine) -> None:
    assert named("TensorRT for RTX") == Finding.ok("TensorRT for RTX", VERSION)
    assert named("TensorRT").state == ABSENT and "chunkkv-trt[tensorrt]" in named("TensorRT").change
    assert named("GPU 0").found == "NVIDIA Double, compute capability 8.9, 2.0 GiB"
    assert "libchunkkv_tensorrt_rtx.so.1" in named("plugin libraries").found


@pytest.mark.parametrize(("built_for", "state"), [("89-real", OK), ("80-real", OK), ("90a-real", WARNING)])
def test_plugins_for_other_gpus_are_noticed(rtx: RtxMachine, tmp_path: Path, built_for: str, state: str) -> None:
    (tmp_path / ARCHITECTURES_FILE).write_text(built_for)
    plugins = named("plugin libraries")
    assert plugins.state == state and built_for in plugins.found and ("8.9" in plugins.found) == (state == WARNING)


def test_without_cuda_bindings_a_gpu_is_unknown(rtx: RtxMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bindings() -> CudaRuntime:
        raise BackendUnavailableError("the Python package 'cuda-bindings'")

    monkeypatch.setattr(CudaRuntime, "load", staticmethod(without_bindings))
    gpu = named("GPU")
    assert gpu.state == ABSENT and gpu.found.startswith("unknown") and "'cuda-bindings'" in gpu.found
    assert gpu.change == "pip install 'chunkkv-trt[rtx]'"


def test_with_a_gpu_engines_are_built_and_run(rtx: RtxMachine) -> None:
    backend = named("backend tensorrt")
    assert backend.state == OK and "run what they built" in backend.found
    assert f"TensorRT for RTX {VERSION} (ChunkKV as plugins)" in backend.found


def test_without_a_gpu_tensorrt_for_rtx_builds_and_does_not_run(rtx: RtxMachine, tmp_path: Path) -> None:
    rtx.plain.cuda.devices = 0
    for library in tmp_path.glob("libchunkkv_tensorrt*"):
        library.unlink()
    backend = named("backend tensorrt")
    assert backend.state == WARNING and "not run, which needs a GPU" in backend.found
    assert "ChunkKV as functions" in backend.found
    assert "cudaErrorNoDevice" in named("GPU").found


def test_without_a_gpu_the_standard_tensorrt_does_neither(machine: Double) -> None:
    machine.cuda.devices = 0
    backend = named("backend tensorrt")
    assert backend.state == ABSENT and f"neither build nor run: TensorRT {machine.version}" in backend.found


def test_tensorrt_llm_needs_its_package_a_gpu_and_the_plugins(machine: Double, tmp_path, monkeypatch) -> None:
    installed = {"tensorrt_llm": "1.2.1", "tensorrt": machine.version}
    monkeypatch.setattr(machine_report, "installed_version", installed.get)
    assert named("backend tensorrt_llm").state == OK
    (tmp_path / "libchunkkv_tensorrt.so.11").unlink()
    assert "libchunkkv_tensorrt.so.11" in named("backend tensorrt_llm").found
    machine.cuda.devices = 0
    assert "needs a GPU" in named("backend tensorrt_llm").found
    installed.clear()
    assert "tensorrt_llm is not installed" in named("backend tensorrt_llm").found


def test_a_package_that_cannot_be_loaded_says_why(rtx: RtxMachine, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.11: cannot open shared object file")\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert "libnvinfer.so.11" in named("TensorRT").found


def nvcc(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_found_on_the_path_then_among_nvidias_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_compiler, "_TOOLKIT", tmp_path / "no" / "nvcc")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    in_wheel = nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", "exit 1")
    assert find_nvcc() == CudaCompiler(in_wheel, None)
    on_path = nvcc(tmp_path / "nvcc", 'echo "Cuda compilation tools, release 12.9, V12.9.86"')
    monkeypatch.setattr(shutil, "which", lambda name: str(on_path))
    assert find_nvcc() == CudaCompiler(on_path, "12.9")
    monkeypatch.setattr(machine_report, "find_nvcc", find_nvcc)
    assert named("nvcc").found == f"{on_path}, CUDA 12.9"


def test_a_repository_is_checked_for_one_engine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--triton_repo", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(naming("--triton_repo --engine_dir"), capsys.readouterr().err)
