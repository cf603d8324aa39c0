"""The standard TensorRT's own on a contract as read: versions, timing cache, what is missing; flags of both TensorRTs.

TensorRT is our own double (support/tensorrt_double.py); these tests prove nothing about the real one. Which engines are
built, with which graphs and profiles, and what is refused on the way: tests/real_tensorrt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support import engines
from support.builds import CommandLine, Outcome
from support.messages import naming
from support.tensorrt_double import TIMINGS, Double, machine_of

from chunkkv.engine.directory import Manifest
from chunkkv.errors import ConfigError
from chunkkv.gpu import tensorrt_plugins
from chunkkv_builder.backends.tensorrt.graphs import decode_capacities
from chunkkv_builder.onnx_graph import functions

pytestmark = pytest.mark.contract_as_read

machine = pytest.fixture(machine_of)
ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"max_batch_size": 4, "max_seq_len": 256, "log_level": "warning", "dtype": "float32"}


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the command line; returns the outcome and the engine's folder."""
    cli = CommandLine(capsys)

    def run(chunkkv: bool = True, **flags: object) -> tuple[Outcome, Path]:
        settings = {**engines.SMALL_CHUNKKV, "chunkkv": True} if chunkkv else {}
        named = {"checkpoint_dir": engines.checkpoint_dir("llama3"), "output_dir": tmp_path / "engine"}
        words = engines.command_line({**named, "backend": "tensorrt", **LIMITS, **settings, **flags})
        return cli(*words), tmp_path / "engine"

    return run


@pytest.mark.parametrize(
    ("longest", "sizes"),
    [
        (1, (64,)),
        (64, (64,)),
        (65, (128,)),
        (256, (128, 256)),
        (1000, (128, 256, 512, 1024)),
        (8192, (1024, 2048, 4096, 8192)),
    ],
)
def test_capacities_halve_from_the_longest_sequence(longest: int, sizes: tuple[int, ...]) -> None:
    assert decode_capacities(longest) == sizes
    assert all(size % 64 == 0 for size in sizes) and sizes[-1] >= longest


def test_a_cache_beyond_tensorrts_tensors_is_refused(machine: Double, build) -> None:
    """Tensors have at most 2**31 - 1 elements; here a token of the cache has 2 heads of 16."""
    longest = (2**31 - 1) // 32 // 64 * 64
    long = engines.checkpoint_dir("llama3", max_position_embeddings=2**31 - 1, rope_scaling=None)
    assert build(checkpoint_dir=long, max_seq_len=longest, max_input_len=64)[0].code == 0
    refused, _ = build(checkpoint_dir=long, max_seq_len=longest + 1, max_input_len=64, overwrite=True)
    assert re.search(naming("--max_seq_len", longest + 1, longest, "2 KV heads of 16"), refused.error(2))


@pytest.mark.parametrize(("version", "flag"), [("10.15.1.29", 2), ("10.16.1.11", 2), ("11.4.0.106", 1)])
def test_networks_are_strongly_typed_in_every_version(monkeypatch, tmp_path, build, version: str, flag: int) -> None:
    for machine in machine_of(monkeypatch, tmp_path, version):
        build()
        assert {entry["network"].flags for entry in machine.log} == {flag}
        assert machine.registry.loaded == [str(tmp_path / f"libchunkkv_tensorrt.so.{version[:2]}")]


def test_engines_are_for_the_gpu_that_they_were_built_on(machine: Double, build) -> None:
    outcome, folder = build(log_level="info")
    (target,) = re.findall(r"^TensorRT .*", outcome.err, re.MULTILINE)
    assert machine.version in target and "this machine's GPU" in target and "libchunkkv_tensorrt.so.11" in target
    manifest = Manifest.read(folder / "manifest.json")
    assert manifest.versions["tensorrt"] == machine.version and manifest.tensorrt is not None
    assert (manifest.tensorrt.flavour, manifest.tensorrt.version) == ("standard", machine.version)
    assert (manifest.tensorrt.compute_capabilities, manifest.tensorrt.chunkkv_ops) == ((), "plugin")


def test_a_library_that_lacks_a_plugin_is_refused(machine: Double, build) -> None:
    machine.registry.names = (functions.SELECT,)
    outcome, folder = build()
    assert re.search(naming("ChunkKVCompact version 1"), outcome.error(1)) and not folder.exists() and not machine.log


def test_the_timing_cache_serves_the_next_engine_and_the_next_build(machine: Double, build, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    build(timing_cache=cache)
    assert cache.read_bytes() == TIMINGS + 5 * b"t"
    build(timing_cache=cache, overwrite=True)
    assert cache.read_bytes() == TIMINGS + 10 * b"t"
    cache.write_bytes(b"of another kind")
    outcome, _ = build(timing_cache=cache, overwrite=True)
    assert outcome.code == 0 and "holds timings of another TensorRT or GPU" in outcome.err
    assert cache.read_bytes() == TIMINGS + 5 * b"t"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_timing_cache_is_refused_where_nothing_reads_it(build) -> None:
    assert "--timing_cache has no effect" in build(backend="onnxruntime", timing_cache="x")[0].error(2)


def test_what_is_missing_is_said_in_one_line(machine: Double, build, monkeypatch) -> None:
    needs = "--backend tensorrt needs "
    monkeypatch.delattr(machine.module, "IKVCacheUpdateLayer")
    message = build()[0].error(1)
    assert message.startswith(f"{needs}TensorRT 10.15 or later; 11.4.0.106 has no IKVCacheUpdateLayer")
    monkeypatch.undo()
    assert message.endswith("give --backend onnxruntime")


def test_a_missing_gpu_and_missing_packages_are_told_apart(machine: Double, build, monkeypatch) -> None:
    machine.cuda.devices = 0
    message = build(chunkkv_ops="plugin")[0].error(1)
    assert re.search("needs an NVIDIA GPU, which was not found", message)
    for package in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    message = build()[0].error(1)
    assert re.search("'tensorrt' .* or 'tensorrt_rtx' .*not installed", message) and "GPU" not in message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 4, 2), "head_dim 16 64 80"),
        ((64, 34, 2), "34 heads 2"),
    ],
)
def test_models_that_the_plugins_have_no_kernel_for_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=naming(message)):
        tensorrt_plugins.check_head_sizes(*sizes, advice="")
    tensorrt_plugins.check_head_sizes(128, 32, 8, advice="")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ({"compute_capability": "8.9"}, 2, "--compute_capability 8.9 --tensorrt rtx"),
        ({"compute_capability": "sm89"}, 2, "--compute_capability sm89 8.9"),
        ({"chunkkv": False, "chunkkv_ops": "plugin"}, 2, "--chunkkv_ops --chunkkv"),
        ({"backend": "onnxruntime", "tensorrt": "rtx"}, 2, "--tensorrt --backend tensorrt"),
        ({"backend": "onnxruntime", "chunkkv_ops": "plugin"}, 2, "--chunkkv_ops --backend tensorrt"),
        ({"backend": "onnxruntime", "compute_capability": "8.9"}, 2, "--compute_capability --backend tensorrt"),
    ],
)
def test_flags_that_fit_nothing_are_refused_by_name(machine: Double, build, flags: dict, code: int, words: str) -> None:
    assert re.search(naming(words), build(**flags)[0].error(code))


def test_quantised_weights_are_refused(machine: Double, build) -> None:
    message = build(use_weight_only=True)[0].error(2)
    assert "backend tensorrt has no quantised weights" in message and np.size(machine.log) == 0
