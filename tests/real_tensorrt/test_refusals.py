"""What TensorRT for RTX or our plugins refuse: one line, an exit code, and nothing left behind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from support import engines
from support.builds import CommandLine, Outcome, python
from support.messages import naming

from chunkkv.engine.directory import EngineFiles
from chunkkv.gpu.tensorrt_library import RTX, TensorRT
from chunkkv.gpu.tensorrt_plugins import library_name
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt.graphs import Graphs
from chunkkv_builder.onnx_graph import functions

SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
LIMITS = {"max_batch_size": 1, "max_seq_len": 128, "log_level": "error"}
# Builds where only CHUNKKV_LIB says where plugins are, whatever this checkout holds.
ALONE = """
import sys
from chunkkv.gpu import tensorrt_plugins
from chunkkv_builder import build
tensorrt_plugins.PLUGIN_FOLDERS = ()
build.main(sys.argv[1:])
"""
Build = Callable[..., Outcome]


def words(output: Path, **flags: Any) -> list[str]:
    """Return a command line that builds for TensorRT for RTX with ChunkKV; a value of None takes a flag away."""
    named = {"checkpoint_dir": engines.checkpoint_dir("llama3", **SIZES), "output_dir": output, **LIMITS}
    named |= {"backend": "tensorrt", "tensorrt": "rtx", "chunkkv": True, "chunkkv_ops": "plugin", **flags}
    return engines.command_line({name: value for name, value in named.items() if value is not None})


def listed(folder: Path) -> list[Path]:
    """Return what lies in `folder`: engines, and what a build may leave beside them."""
    return sorted(folder.glob("engine*"))


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path, found_plugins: None) -> Build:
    """Run the command line in this process; nothing may be left where it fails."""
    cli = CommandLine(capsys)

    def run(**flags: Any) -> Outcome:
        before = listed(tmp_path)
        outcome = cli(*words(tmp_path / "engine", **flags))
        assert outcome.code == 0 or listed(tmp_path) == before
        return outcome

    return run


@pytest.fixture
def build_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Run the command line as a program that finds plugins in the folder `libraries` alone."""

    def run(**flags: Any) -> Outcome:
        monkeypatch.setenv("CHUNKKV_LIB", str(tmp_path / "libraries" / "libchunkkv.so"))
        before = listed(tmp_path)
        outcome = python("-c", ALONE, *words(tmp_path / "engine", **flags))
        assert outcome.code == 0 or listed(tmp_path) == before
        return outcome

    (tmp_path / "libraries").mkdir()
    return run


def assert_functions(outcome: Outcome, folder: Path) -> None:
    """Without plugins the engines hold functions."""
    assert (outcome.code, outcome.err) == (0, "")
    build = EngineFiles.load(folder / "engine").tensorrt
    assert build is not None and build.chunkkv_ops == "functions"


def add_to_select(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Let the select nodes of a build have these attributes, too."""
    select_attributes = functions.select_attributes

    def with_more(settings: ChunkKVSettings, *arguments: Any, **named: Any) -> dict[str, Any]:
        return {**select_attributes(settings, *arguments, **named), **attributes}

    monkeypatch.setattr(functions, "select_attributes", with_more)


def test_a_field_that_the_plugin_does_not_know(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_select(monkeypatch, widow=1)
    assert re.search(naming("ChunkKVSelect 'widow'"), build().error(1))


def test_a_value_that_the_plugin_does_not_take(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_select(monkeypatch, window=129)
    assert re.search(naming("prefill ChunkKVSelect window 129 1 128"), build().error(1))


def test_functions_that_sort_are_not_what_the_parser_takes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plugins' name on the nodes the parser inlines the functions; those for ONNX Runtime it refuses."""
    monkeypatch.setattr(functions, "plugin_attributes", dict)
    assert re.search(naming("prefill graph Unsupported reduction type"), build().error(1))


def test_functions_in_place_of_plugins_are_an_error(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Graphs.prefill
    monkeypatch.setattr(Graphs, "prefill", lambda self, sorting: prefill(self, sorting=False))
    assert re.search(naming("prefill 3 0 plugins"), build().error(1))


def test_a_type_that_the_plugin_does_not_take(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Graphs.prefill

    def with_wide_lengths(self: Graphs, **options: Any) -> onnx.ModelProto:
        model = prefill(self, **options)
        for value in model.graph.input:
            if value.name == "budget_tokens":
                value.type.tensor_type.elem_type = onnx.TensorProto.INT64
        return model

    monkeypatch.setattr(Graphs, "prefill", with_wide_lengths)
    assert re.search(naming("prefill plugin format"), build().error(1))


def test_a_head_size_without_a_kernel_needs_functions(build: Build, tmp_path: Path) -> None:
    small = engines.checkpoint_dir("llama3", **{**SIZES, "hidden_size": 32})
    refused = build(checkpoint_dir=small).error(1)
    assert re.search(naming("head_dim 16 64 80 96 128 256", "--chunkkv_ops functions"), refused)
    for ops in ("auto", "functions"):
        outcome = build(checkpoint_dir=small, chunkkv_ops=ops, overwrite=True)
        assert_functions(outcome, tmp_path)


def test_without_a_plugin_library_functions_are_built(build_alone: Build, rtx: TensorRT, tmp_path: Path) -> None:
    message = build_alone().error(1)
    assert re.search(naming(library_name(RTX, rtx.version), "--chunkkv_ops functions"), message)
    assert_functions(build_alone(chunkkv_ops="auto"), tmp_path)


def test_without_the_name_by_which_the_parser_finds_the_registry(
    build_alone: Build, rtx: TensorRT, library_folder: Path, tmp_path: Path
) -> None:
    """TensorRT's parser ends the process where it does not find it: here that is refused before."""
    name = library_name(RTX, rtx.version)
    (tmp_path / "libraries" / name).symlink_to(library_folder / name)
    assert re.search(naming("libtensorrt_rtx.so", "--chunkkv_ops functions"), build_alone().error(1))
    assert_functions(build_alone(chunkkv_ops="auto"), tmp_path)


@pytest.mark.parametrize("damaged", ["library", "name"])
def test_a_damaged_library_is_named(
    build_alone: Build, rtx: TensorRT, library_folder: Path, tmp_path: Path, damaged: str
) -> None:
    libraries = tmp_path / "libraries"
    shutil.rmtree(libraries)
    shutil.copytree(library_folder, libraries, ignore=shutil.ignore_patterns("CMakeFiles", "plugins", "*.cc", "*.o"))
    file = library_name(RTX, rtx.version) if damaged == "library" else "libtensorrt_rtx.so"
    (path,) = libraries.rglob(file)
    path.unlink()
    path.write_bytes(b"not a library")
    assert re.search(naming(path), build_alone().error(1))


def test_prompts_that_are_too_long(build: Build) -> None:
    """The plugins take 2**22 tokens; a cache of TensorRT has at most 2**31 - 1 numbers, here 64 of a token."""
    endless = engines.checkpoint_dir("llama3", **SIZES, max_position_embeddings=2**31 - 1, rope_scaling=None)
    limits = {"checkpoint_dir": endless, "max_seq_len": 2**22 + 1, "overwrite": True}
    assert re.search(naming("--max_input_len 4194305 4194304 --chunkkv_ops functions"), build(**limits).error(2))
    assert build(**limits, max_input_len=2**22).code == 0
    assert build(**limits, chunkkv_ops="functions").code == 0
    longest = (2**31 - 1) // 64 // 64 * 64
    refused = build(**{**limits, "max_seq_len": longest + 1}, max_input_len=64)
    assert re.search(naming("--max_seq_len", longest + 1, longest), refused.error(2))


def test_flags_that_this_tensorrt_has_no_use_for(build: Build, tmp_path: Path) -> None:
    assert "--timing_cache" in build(timing_cache=tmp_path / "timings").error(2)
    refused = build(compute_capability="9.9").error(2)
    assert re.search(naming("--compute_capability 9.9 8.6 8.9 12.0"), refused)


def test_engines_for_one_kind_of_gpu(build: Build, tmp_path: Path) -> None:
    assert build(compute_capability="8.9").code == 0
    made = EngineFiles.load(tmp_path / "engine").tensorrt
    assert made is not None and made.compute_capabilities == ("8.9",)


def test_a_folder_that_is_not_an_engine_is_not_replaced(tmp_path: Path, capsys, found_plugins: None) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "notes").write_text("mine")
    refused = CommandLine(capsys)(*words(tmp_path / "engine", overwrite=True)).error(2)
    assert str(tmp_path / "engine") in refused
    assert (tmp_path / "engine" / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
