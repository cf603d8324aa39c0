"""Engines of TensorRT for RTX on a contract as read: compiled kernels and their cache, CUDA graphs, memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from support import engines, tensorrt_rtx_double
from support import tensorrt_double as double
from support.messages import naming
from support.tensorrt_double import Double, machine_of
from support.tensorrt_rtx_double import CONTEXT_BYTES, FOREIGN_CACHE, VERSION, CudaGraphStrategy, RtxMachine
from test_tensorrt_executor import PARAMS, PROMPTS, RATIOS, assert_same_answers, build

from chunkkv import ChunkKVSession
from chunkkv.cli import doctor
from chunkkv.errors import BackendUnavailableError, EngineMismatchError
from chunkkv.executors import machine_check
from chunkkv.executors.tensorrt import jit_cache
from chunkkv.findings import BREAKS, OK, WARNING
from chunkkv.gpu import tensorrt_plugins
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.gpu.plugin_architectures import ARCHITECTURES_FILE

pytestmark = pytest.mark.contract_as_read

machine = pytest.fixture(machine_of)
DISABLED, OWN_GRAPH = CudaGraphStrategy.DISABLED, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


@pytest.fixture
def rtx(machine: Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RtxMachine:
    double = RtxMachine(machine)
    double.install(monkeypatch, tmp_path)
    return double


@pytest.fixture
def engine_dir(rtx: RtxMachine, tmp_path: Path) -> Path:
    return rtx.mark(build(tmp_path / "engines" / "small", chunkkv_layer_reuse=2))


def answers(engine_dir: Path) -> list:
    """Answer in a session of its own, which is gone afterwards, as at the end of a process."""
    results = ChunkKVSession.from_dir(engine_dir).generate(PROMPTS, PARAMS, keep_ratio=RATIOS)
    gc.collect()
    return results


def cache_files(engine_dir: Path) -> list[Path]:
    return sorted(path for path in engine_dir.parent.iterdir() if path != engine_dir)


def test_answers_equal_those_of_onnx_runtime_and_decode_replays_our_graph(rtx: RtxMachine, engine_dir: Path) -> None:
    expected = engines.session("llama3", chunkkv_layer_reuse=2).generate(PROMPTS, PARAMS, keep_ratio=RATIOS)
    assert_same_answers(answers(engine_dir), expected)
    assert rtx.plain.cuda.launches == PARAMS.max_new_tokens - 2
    assert {context.config.cuda_graph_strategy for context in rtx.contexts} == {DISABLED}


def test_decode_compiles_for_its_shapes_at_once_and_prefill_in_the_background(rtx, engine_dir: Path) -> None:
    answers(engine_dir)
    strategies = [context.config.dynamic_shapes_kernel_specialization_strategy.name for context in rtx.contexts]
    assert strategies == ["LAZY", "EAGER"]


def test_a_decode_engine_that_cannot_be_captured_gets_a_graph_of_its_own(rtx: RtxMachine, engine_dir: Path) -> None:
    expected = answers(engine_dir)
    launches = rtx.plain.cuda.launches
    rtx.contexts.clear()
    rtx.stream_capturable = False
    assert_same_answers(answers(engine_dir), expected, 0.0)
    assert rtx.plain.cuda.launches == launches
    assert [context.config.cuda_graph_strategy for context in rtx.contexts] == [DISABLED, DISABLED, OWN_GRAPH]


def test_the_next_process_compiles_nothing(rtx: RtxMachine, engine_dir: Path) -> None:
    expected = answers(engine_dir)
    (cache,) = cache_files(engine_dir)
    assert cache.name.startswith("small.jit-cache-") and cache.is_file()
    assert len(rtx.compiled) > 1
    content, written = cache.read_bytes(), cache.stat().st_mtime_ns
    rtx.compiled.clear()
    assert_same_answers(answers(engine_dir), expected, 0.0)
    assert not rtx.compiled and cache.read_bytes() == content and cache.stat().st_mtime_ns == written


def test_kernels_are_kept_after_the_first_decode_step_of_each_shape(rtx: RtxMachine, engine_dir: Path) -> None:
    session = ChunkKVSession.from_dir(engine_dir)
    assert not cache_files(engine_dir)
    session.generate(PROMPTS[0], PARAMS)
    (cache,) = cache_files(engine_dir)
    sizes = [cache.stat().st_size]
    for prompts in (PROMPTS[0], PROMPTS[:2]):
        session.generate(prompts, PARAMS)
        sizes.append(cache.stat().st_size)
    assert sizes[0] == sizes[1] < sizes[2]


def test_another_build_and_another_gpu_have_caches_of_their_own(rtx: RtxMachine, engine_dir: Path, tmp_path) -> None:
    answers(engine_dir)
    rtx.plain.cuda.gpu_name = b"NVIDIA Other"
    answers(engine_dir)
    assert len(cache_files(engine_dir)) == 2
    build(engine_dir, chunkkv_layer_reuse=3, overwrite=True)
    answers(rtx.mark(engine_dir))
    assert len(cache_files(engine_dir)) == 3


def test_a_cache_that_is_not_taken_is_replaced(rtx: RtxMachine, engine_dir: Path) -> None:
    answers(engine_dir)
    (cache,) = cache_files(engine_dir)
    content = cache.read_bytes()
    cache.write_bytes(FOREIGN_CACHE)
    answers(engine_dir)
    assert cache.read_bytes() == content


def test_a_place_that_cannot_be_written_costs_the_cache_alone(rtx, engine_dir: Path, monkeypatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    expected = answers(engine_dir)
    for cache in cache_files(engine_dir):
        cache.unlink()
    monkeypatch.setattr(jit_cache, "write_whole", refuse)
    with pytest.warns(RuntimeWarning, match=naming("small.jit-cache Permission denied")) as warned:
        assert_same_answers(answers(engine_dir), expected, 0.0)
    assert len(warned) == 1 and not cache_files(engine_dir)


def test_a_cache_that_cannot_be_read_is_left_alone(rtx: RtxMachine, engine_dir: Path) -> None:
    expected = answers(engine_dir)
    (cache,) = cache_files(engine_dir)
    cache.unlink()
    cache.mkdir()
    with pytest.warns(RuntimeWarning, match=naming(f"{cache} Is a directory")):
        assert_same_answers(answers(engine_dir), expected, 0.0)
    assert cache.is_dir()


def test_memory_of_contexts_is_given_back(rtx: RtxMachine, engine_dir: Path) -> None:
    session = ChunkKVSession.from_dir(engine_dir)
    before = dict(rtx.plain.cuda.memory)
    assert CONTEXT_BYTES in [size for _, size in before.values()]
    session.generate(PROMPTS, PARAMS)
    rtx.contexts.clear()
    gc.collect()
    assert set(rtx.plain.cuda.memory) == set(before)


def test_engines_of_another_version_or_of_no_installed_tensorrt_are_refused(rtx, engine_dir, monkeypatch) -> None:
    rtx.module.__version__ = "1.8.0.1"
    with pytest.raises(EngineMismatchError, match=naming("1.7.1.116 1.8.0.1")):
        ChunkKVSession.from_dir(engine_dir)
    monkeypatch.setitem(__import__("sys").modules, tensorrt_rtx_double.MODULE, None)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(BackendUnavailableError, match=naming("RTX 1.7.1.116 tensorrt_rtx")):
        ChunkKVSession.from_dir(engine_dir)


def test_doctor_names_the_layers_and_asks_about_each_engine(rtx: RtxMachine, engine_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine_check, "installed_version", {"tensorrt_rtx": VERSION}.get)
    findings = {finding.check: finding for finding in doctor.diagnose(engine_dir)}
    assert not doctor.would_break(list(findings.values()))
    assert findings["built with"].found == f"TensorRT for RTX {VERSION}: portable, ChunkKV as plugin"
    assert "8 ChunkKV plugins" in findings["layers of prefill.engine"].found
    assert findings["layers of decode_128.engine"].found.endswith("others")
    library = tensorrt_plugins.find_plugin_library("rtx", VERSION)
    for built_for, state, lacking in (("89-real", WARNING, "8.0"), ("90a-real", BREAKS, "8.9"), ("80", OK, "80")):
        (library.parent / ARCHITECTURES_FILE).write_text(built_for)
        (plugins,) = [finding for finding in doctor.diagnose(engine_dir) if finding.check == "plugin library"]
        assert plugins.state == state and built_for in plugins.found and lacking in plugins.found
    monkeypatch.setattr(double, "MAGIC", b"another magic")
    findings = {finding.check: finding for finding in doctor.diagnose(engine_dir)}
    assert findings["prefill.engine"].state == BREAKS and "MALFORMED_ENGINE" in findings["prefill.engine"].found

    def without_bindings() -> CudaRuntime:
        raise BackendUnavailableError("the Python package 'cuda-bindings'")

    monkeypatch.setattr(CudaRuntime, "load", staticmethod(without_bindings))
    (gpu,) = [finding for finding in doctor.diagnose(engine_dir) if finding.check == "GPU"]
    assert gpu.state == BREAKS and gpu.change == "pip install 'chunkkv-trt[rtx]'"
