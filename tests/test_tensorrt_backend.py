"""The TensorRT builder on a contract as read: graphs, profiles, timing cache, progress, and why a build is refused.

TensorRT is our own double (support/tensorrt_double.py); these tests prove nothing about the real one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import engines, tensorrt_graphs
from support.builds import CommandLine, Outcome
from support.messages import naming
from support.tensorrt_double import TIMINGS, Double, machine_of

from chunkkv.engine.directory import Manifest
from chunkkv.engine.tensorrt_contract import Contract
from chunkkv.errors import ConfigError
from chunkkv.gpu import tensorrt_plugins
from chunkkv_builder.backends.tensorrt.graphs import decode_capacities
from chunkkv_builder.onnx_graph import functions
from chunkkv_builder.progress import Progress, human_bytes

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


@pytest.mark.parametrize("chunkkv", [True, False])
def test_one_prefill_engine_and_one_decode_engine_per_capacity(machine: Double, build, chunkkv: bool) -> None:
    outcome, folder = build(chunkkv, chunkkv_layer_reuse=2) if chunkkv else build(chunkkv)
    assert (outcome.code, outcome.err) == (0, "")
    names = {path.name for path in folder.iterdir()}
    assert {"prefill.engine", "decode_128.engine", "decode_256.engine", "tensorrt.json", "weights.safetensors"} <= names
    assert not [name for name in names if name.endswith(".onnx")]
    contract = Contract.read(folder)
    assert (contract.capacities, contract.prefill_rows, contract.max_input_len) == ((128, 256), 2, 256)
    assert (contract.leaders, contract.group_layers) == (((1, 2), 2) if chunkkv else ((), 1))
    versions = json.loads((folder / "manifest.json").read_text())["versions"]
    assert versions["tensorrt"] == machine.version


def test_profiles_span_batch_length_and_capacity(machine: Double, build) -> None:
    build(chunkkv_layer_reuse=2, max_num_tokens=1000)
    prefill, small, large = (entry["profile"] for entry in machine.log)
    assert prefill.shapes["input_ids"] == [(1, 1), (3, 256), (3, 256)]
    for name in ("lengths", "keep_per_10k", "budget_tokens"):
        assert prefill.shapes[name] == [(1,), (3,), (3,)]
    assert prefill.values == {"capacity": [[128], [128], [256]]}
    for profile, capacity in ((small, 128), (large, 256)):
        assert profile.shapes["past_key.0"] == [(1, 2, capacity, 16), (4, 2, capacity, 16), (4, 2, capacity, 16)]
        assert profile.shapes["input_ids"] == [(1, 1), (4, 1), (4, 1)] and profile.values == {}


def test_long_prompts_are_timed_at_a_usual_length(machine: Double, build, tmp_path: Path) -> None:
    long = engines.checkpoint_dir("llama3", max_position_embeddings=20_000, rope_scaling=None)
    outcome, folder = build(checkpoint_dir=long, max_seq_len=20_000, max_batch_size=2)
    assert outcome.code == 0, outcome
    assert machine.log[0]["profile"].shapes["input_ids"] == [(1, 1), (1, 4096), (1, 20_000)]
    assert machine.log[0]["profile"].values == {"capacity": [[2560], [10_048], [20_032]]}
    assert Contract.read(folder).capacities == (2560, 5056, 10_048, 20_032)


def test_a_cache_beyond_tensorrts_tensors_is_refused(machine: Double, build) -> None:
    """Tensors have at most 2**31 - 1 elements; here a token of the cache has 2 heads of 16."""
    longest = (2**31 - 1) // 32 // 64 * 64
    long = engines.checkpoint_dir("llama3", max_position_embeddings=2**31 - 1, rope_scaling=None)
    assert build(checkpoint_dir=long, max_seq_len=longest, max_input_len=64)[0].code == 0
    refused, _ = build(checkpoint_dir=long, max_seq_len=longest + 1, max_input_len=64, overwrite=True)
    assert re.search(naming("--max_seq_len", longest + 1, longest, "2 KV heads of 16"), refused.error(2))


def test_matrices_are_inputs_of_every_engine_and_stored_once(machine: Double, build) -> None:
    _, folder = build()
    graphs = [entry["network"].model.graph for entry in machine.log]
    weights = Contract.read(folder).weights
    for graph in graphs:
        assert set(weights) <= {value.name for value in graph.input}
        assert all(len(tensor.dims) <= 1 or tensor.name == "rope.frequencies" for tensor in graph.initializer)
    size = sum(nbytes for _, nbytes in weights.values())
    assert size <= (folder / "weights.safetensors").stat().st_size < size * 1.1
    engine_bytes = sum(path.stat().st_size for path in folder.glob("*.engine"))
    assert engine_bytes < size


def test_the_parser_gets_typed_graphs_with_plugins_and_attention_that_may_be_taken_apart(machine, build) -> None:
    build(chunkkv_boundaries="delimiter", dtype="float16")
    for entry in machine.log:
        graph = entry["network"].model.graph
        attention = [node for node in graph.node if node.op_type == "Attention"]
        assert len(attention) == 3
        for node in attention:
            assert onnx.helper.get_node_attr_value(node, "TRT_decomposable") == 1
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        caches = {name: kind for name, kind in kinds.items() if name.split("_")[0] in ("past", "present", "kept")}
        halves = {name for name in caches if "key" in name or "value" in name}
        assert halves and {caches[name] for name in halves} == {onnx.TensorProto.FLOAT16}
        assert kinds["logits"] == onnx.TensorProto.FLOAT
        assert not any(a.i == onnx.TensorProto.DOUBLE for n in graph.node for a in n.attribute if a.name == "to")
        flags = [tensor for tensor in graph.initializer if tensor.name == "delimiter_tokens"]
        assert all(tensor.data_type == onnx.TensorProto.INT32 for tensor in flags)
    plugins = [node for node in machine.log[0]["network"].model.graph.node if node.domain == functions.DOMAIN]
    assert len(plugins) == 3 + 6 and len(machine.registry.loaded) == 1


@pytest.mark.parametrize(("version", "flag"), [("10.15.1.29", 2), ("10.16.1.11", 2), ("11.4.0.106", 1)])
def test_networks_are_strongly_typed_in_every_version(monkeypatch, tmp_path, build, version: str, flag: int) -> None:
    for machine in machine_of(monkeypatch, tmp_path, version):
        build()
        assert {entry["network"].flags for entry in machine.log} == {flag}
        assert machine.registry.loaded == [str(tmp_path / f"libchunkkv_tensorrt.so.{version[:2]}")]


@pytest.mark.parametrize(("dtype", "cleared"), [("float32", ["TF32"]), ("float16", []), ("auto", [])])
def test_float32_means_float32_and_auto_means_bfloat16(machine: Double, build, dtype: str, cleared: list[str]) -> None:
    outcome, folder = build(dtype=dtype)
    assert outcome.code == 0
    for entry in machine.log:
        assert [flag.name for flag in entry["config"].cleared] == cleared
    assert Contract.read(folder).dtype == ("bfloat16" if dtype == "auto" else dtype)


def test_bfloat16_graphs_are_valid_onnx(machine: Double, build) -> None:
    build(dtype="bfloat16", chunkkv_boundaries="delimiter")
    for entry in machine.log:
        model = tensorrt_graphs.as_plugins(entry["network"].model)
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_the_timing_cache_serves_the_next_engine_and_the_next_build(machine: Double, build, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    build(timing_cache=cache)
    assert cache.read_bytes() == TIMINGS + b"ttt"
    build(timing_cache=cache, overwrite=True)
    assert cache.read_bytes() == TIMINGS + b"tttttt"
    cache.write_bytes(b"of another kind")
    outcome, _ = build(timing_cache=cache, overwrite=True)
    assert outcome.code == 0 and "holds timings of another TensorRT or GPU" in outcome.err
    assert cache.read_bytes() == TIMINGS + b"ttt"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_timing_cache_is_refused_where_nothing_reads_it(build) -> None:
    assert "--timing_cache has no effect" in build(backend="onnxruntime", timing_cache="x")[0].error(2)


def test_every_error_of_the_parser_is_told(machine: Double, build, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_graphs, "OPERATORS", tensorrt_graphs.OPERATORS - {"Sigmoid", "Attention"})
    outcome, folder = build()
    message = outcome.error(1)
    assert message.startswith("TensorRT 11.4.0.106 does not take the prefill graph: ")
    assert message.count("No importer registered for op") == 2 * 3
    assert "/layers.0/attention Attention: No importer" in message and not folder.exists()


def test_nodes_that_were_not_taken_as_plugins_are_an_error(machine: Double, build, monkeypatch) -> None:
    """Without the plugin's name on the node TensorRT would inline the ONNX function, which it cannot run."""
    monkeypatch.setattr(functions, "plugin_attributes", dict)
    assert "the prefill graph has 9 ChunkKV nodes, TensorRT took 0 of them as plugins" in build()[0].error(1)


def test_a_failed_build_says_why(machine: Double, build, monkeypatch) -> None:
    monkeypatch.setattr("support.tensorrt_double._uncovered", lambda network, profile: "no tactic for /layers.0")
    message = build()[0].error(1)
    assert message == "TensorRT 11.4.0.106 cannot build the prefill engine: no tactic for /layers.0"


def test_ctrl_c_during_a_build_leaves_nothing(machine: Double, build, monkeypatch) -> None:
    calls = []

    def advance(self: Progress, steps: int = 1) -> None:
        calls.append(steps)
        if self._name == "decode 128":
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", advance)
    outcome, folder = build()
    assert outcome.code == 130 and not folder.exists() and calls
    assert [entry["finished"] for entry in machine.log] == [True, False]  # told to stop, not only unheard


def test_progress_counts_the_steps_of_all_phases(machine: Double, build) -> None:
    outcome, _ = build(log_level="info")
    stages = re.findall(r"^(\S.*?) +\d+\.\d s$", outcome.err, re.MULTILINE)
    assert stages == ["checkpoint", "weights", "prefill", "decode 128", "decode 256", "tokenizer", "checksums"]


def test_every_engine_is_reported_on(machine: Double, build) -> None:
    outcome, folder = build(log_level="info")
    (target,) = re.findall(r"^TensorRT .*", outcome.err, re.MULTILINE)
    assert machine.version in target and "this machine's GPU" in target and "libchunkkv_tensorrt.so.11" in target
    engines_told = re.findall(
        r"^(.*) engine: (\d+) layers(.*), (\S+ \S+), \d+\.\d s, peak memory", outcome.err, re.MULTILINE
    )
    layers = [len(entry["network"].model.graph.node) for entry in machine.log]
    plugins = [", 9 of them ChunkKV plugins", "", ""]
    sizes = [
        human_bytes((folder / file).stat().st_size)
        for file in ("prefill.engine", "decode_128.engine", "decode_256.engine")
    ]
    names = ["prefill", "decode 128", "decode 256"]
    assert engines_told == list(zip(names, map(str, layers), plugins, sizes, strict=True))
    built_with = Manifest.read(folder / "manifest.json").tensorrt
    assert (built_with.flavour, built_with.version) == ("standard", machine.version)
    assert (built_with.compute_capabilities, built_with.chunkkv_ops) == ((), "plugin")
    assert set(built_with.seconds) == {path.name for path in folder.glob("*.engine")}


def test_plugins_are_checked_before_anything_is_written(machine: Double, build, tmp_path: Path) -> None:
    (tmp_path / "libchunkkv_tensorrt.so.11").unlink()
    message = build(chunkkv_ops="plugin")[0].error(1)
    assert message.startswith(
        "--backend tensorrt needs the ChunkKV plugins libchunkkv_tensorrt.so.11, which are in none of"
    )
    assert build(chunkkv=False)[0].code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": ("window",)}, "the plugin ChunkKVSelect knows no 'boundaries'"),
        ({"names": (functions.SELECT,)}, "has no plugin ChunkKVCompact version 1"),
    ],
)
def test_plugins_of_another_version_are_refused(machine: Double, build, change: dict, message: str) -> None:
    vars(machine.registry).update(change)
    outcome, folder = build()
    assert message in outcome.error(1) and not folder.exists() and not machine.log


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


def test_a_model_without_kernels_is_built_with_functions(machine: Double, build, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_plugins, "KERNEL_HEAD_SIZES", (64,))
    outcome, folder = build(chunkkv_ops="plugin")
    assert re.search("head_dim is 16.*--chunkkv_ops functions", outcome.error(1)) and not folder.exists()
    outcome, folder = build(log_level="info")
    assert outcome.code == 0 and "functions (head_dim is 16" in outcome.err and not machine.registry.loaded
    assert Manifest.read(folder / "manifest.json").tensorrt.chunkkv_ops == "functions"


def test_functions_are_taken_where_there_is_no_plugin_library(machine: Double, build, tmp_path: Path) -> None:
    (tmp_path / "libchunkkv_tensorrt.so.11").unlink()
    outcome, folder = build(log_level="info")
    assert outcome.code == 0 and "functions (plugins need the ChunkKV plugins libchunkkv_tensorrt.so.11" in outcome.err
    assert "9 ChunkKV functions among them" in outcome.err
    nodes = [node for node in machine.log[0]["network"].model.graph.node if node.domain == functions.DOMAIN]
    assert len(nodes) == 9 and not any(node.attribute for node in nodes)
    assert Manifest.read(folder / "manifest.json").tensorrt.chunkkv_ops == "functions"


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


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_the_entropy_gate_is_an_option_of_onnx_runtime_alone(machine: Double, build, backend: str) -> None:
    done = build(backend=backend, chunkkv=True, chunkkv_gate="entropy")[0]
    if backend == "onnxruntime":
        assert done.code == 0
    else:
        assert re.search(naming("--chunkkv_gate 'entropy' none onnxruntime"), done.error(2))
