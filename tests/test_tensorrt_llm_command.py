"""chunkkv-build --backend tensorrt_llm as a user runs it: flags, plan, directory, what an ended build leaves.

TensorRT-LLM is a contract as read (support/tensorrt_llm_double); these tests prove nothing about the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.builds import CommandLine
from support.messages import naming
from support.tensorrt_llm_builds import LlmBuild, doubles
from support.tensorrt_llm_double import Machine

import chunkkv
from chunkkv.command_line import UsageError
from chunkkv.engine.directory import EngineFiles, Manifest
from chunkkv.engine.tensorrt_llm_side_file import SIDE_FILE, SideFile
from chunkkv.errors import EngineError, EngineMismatchError
from chunkkv_builder.flags import parse

pytestmark = pytest.mark.contract_as_read


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with doubles(tmp_path, monkeypatch) as machine:
        yield machine


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> LlmBuild:
    return LlmBuild(capsys, tmp_path / "engine")


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        parse(["--backend", "tensorrt_llm", "--checkpoint_dir", "x", *words])
    return str(error.value)


def test_our_flags_are_taken_and_all_others_passed_on_in_order() -> None:
    words = "--gemm_plugin auto --chunkkv --max_batch_size=8 --chunkkv-layer-reuse 2 --use_paged_context_fmha enable"
    flags = parse(["--backend", "tensorrt_llm", "--checkpoint_dir", "llm", "--dry_run", *words.split()])
    assert flags.passed_on == [
        *("--gemm_plugin", "auto", "--max_batch_size=8", "--use_paged_context_fmha", "enable"),
        *("--log_level", "info", "--checkpoint_dir", "llm", "--dry_run"),
    ]
    assert flags.chunkkv and flags.chunkkv_layer_reuse == "2" and flags.output_dir == "engine_outputs"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "add --chunkkv, or call trtllm-build"),
        (("--chunkkv", "disable"), "add --chunkkv, or call trtllm-build"),
        (("--chunkkv", "--dtype", "float16"), "use convert_checkpoint.py --dtype"),
        (("--chunkkv", "--use_weight_only"), "use convert_checkpoint.py --use_weight_only"),
        (("--chunkkv", "--timing_cache", "f"), "use --input_timing_cache and --output_timing_cache"),
        (("--chunkkv", "--chunkkv_max_keep_ratio", "1"), "no request can ask for more"),
        (("--chunkkv", "--chunkkv_chnk_size", "3"), "did you mean --chunkkv_chunk_size?"),
        (("--chunkkv", "--chunkkv_budget_tokens", "0"), "give at least 1"),
    ],
)
def test_flags_that_mean_nothing_here(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)


@pytest.mark.parametrize("flag", ["--tokenizer_dir", "--chunkkv_tp_agree"])
def test_flags_that_mean_nothing_elsewhere(flag: str) -> None:
    with pytest.raises(UsageError, match=naming(flag, "--backend tensorrt_llm")):
        parse(["--checkpoint_dir", "x", "--chunkkv", flag, "y"])


def test_help_shows_our_flags_and_where_the_others_are(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = CommandLine(capsys)("--backend", "tensorrt_llm", "--help")
    assert outcome.code == 0 and "--chunkkv_tp_agree" in outcome.out and "trtllm-build --help" in outcome.out
    assert "--chunkkv_max_keep_ratio" not in outcome.out


def test_the_directory_is_trtllm_builds_with_the_side_file_a_key_and_a_manifest(
    machine: Machine, build: LlmBuild
) -> None:
    outcome = build(chunkkv_layer_reuse=2)
    assert outcome.code == 0, outcome
    names = {path.name for path in build.output.iterdir()}
    assert names == {"config.json", "rank0.engine", SIDE_FILE, "manifest.json"}
    config = json.loads((build.output / "config.json").read_text())
    side = SideFile.read(build.output)
    assert config["chunkkv"] == side.settings.to_dict() and config["version"] == "1.2.1"
    assert set(config) == {"version", "pretrained_config", "build_config", "chunkkv"}
    assert side.settings.layer_groups == ((0, 1), (2, 3)) and side.settings.max_keep_per_10k == 4000
    assert (side.tokens_per_block, side.mapping_rank) == (32, 2)
    assert (side.num_heads, side.num_kv_heads, side.head_size, side.kv_dtype) == (4, 2, 64, "float16")
    assert side.plugin_library["name"] == "libchunkkv_tensorrt.so.10" and len(side.plugin_library["sha256"]) == 64
    assert side.versions["chunkkv"] == chunkkv.__version__ and side.versions["tensorrt_llm"] == config["version"]
    files = EngineFiles.load(build.output)
    assert (files.backend, files.settings, files.model["eos_token_ids"]) == ("tensorrt_llm", side.settings, [])
    assert files.build["max_seq_len"] == 256
    assert Manifest.read(build.output / "manifest.json").versions["tensorrt_llm"] == config["version"]


def test_the_tokenizer_travels_with_the_engine(machine: Machine, build: LlmBuild) -> None:
    source = engines.checkpoint_dir("llama3", head_dim=64, num_hidden_layers=4)
    assert build(tokenizer_dir=source).code == 0
    assert (build.output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert EngineFiles.load(build.output).model["eos_token_ids"] == [1]


def test_delimiters_need_the_tokenizer(machine: Machine, build: LlmBuild) -> None:
    said = build(chunkkv_boundaries="delimiter").error(2)
    assert said == "--chunkkv_boundaries is 'delimiter', which needs the tokenizer: give --tokenizer_dir"


def test_agreement_needs_ranks(machine: Machine, build: LlmBuild) -> None:
    assert "--chunkkv_tp_agree has no effect with one tensor-parallel rank" in build(chunkkv_tp_agree=True).error(2)


def test_a_changed_side_file_or_key_is_refused(machine: Machine, build: LlmBuild) -> None:
    assert build().code == 0
    side, config = build.output / SIDE_FILE, build.output / "config.json"
    for path in (side, config):
        before = path.read_text()
        path.write_text(before.replace("4000", "5000"))
        with pytest.raises(EngineError, match="was changed"):
            EngineFiles.load(build.output)
        path.write_text(before)
    relist(build.output, side.name, side.read_text().replace("4000", "5000"))
    with pytest.raises(EngineError, match=naming("'chunkkv' config.json chunkkv_config.json")):
        EngineFiles.load(build.output)


def relist(folder: Path, name: str, text: str) -> None:
    """Write another content into a file of an engine, as if the engine had been built with it."""
    from chunkkv_builder.manifest import write_manifest
    from chunkkv_builder.progress import Progress

    (folder / name).write_text(text)
    write_manifest(folder, "tensorrt_llm", {}, Progress("error"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"ranks": []}, "'ranks' []"),
        ({"kv_dtype": "fp4"}, "'kv_dtype' 'fp4'"),
        ({"tokens_per_block": 0}, "'tokens_per_block' 0"),
        ({"mapping_rank": 3}, "'mapping_rank' 3"),
        ({"eos_token_ids": [-1]}, "'eos_token_ids' [-1]"),
        ({"versions": {"x": 1}}, "'x' 1"),
        ({"settings": {}}, "is missing"),
        ({"new": 1}, "'new'"),
        ({"ranks": [{"rank": 0}]}, "0 'tp_rank'"),
    ],
)
def test_a_damaged_side_file_is_refused(tmp_path: Path, side_file: str, change: dict, said: str) -> None:
    (tmp_path / SIDE_FILE).write_text(json.dumps({**json.loads(side_file), **change}))
    with pytest.raises(EngineError, match=naming(said)):
        SideFile.read(tmp_path)


@pytest.fixture
def side_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: LlmBuild) -> str:
    with doubles(tmp_path, monkeypatch):
        assert build().code == 0
    return (build.output / SIDE_FILE).read_text()


def test_a_dry_run_builds_the_network_prints_the_plan_and_writes_nothing(machine: Machine, build: LlmBuild) -> None:
    outcome = build("--dry_run", chunkkv_layer_reuse=2)
    assert outcome.code == 0, outcome
    assert "4 layers, 2 KV heads of 64 in float16, 2.0 KiB of KV cache per token" in outcome.out
    assert "0-1     1          819" in outcome.out and "The network of every rank was built and checked" in outcome.out
    assert len(machine.networks) == 1 and len(machine.networks[0].of("ChunkKVCompress")) == 2
    assert not build.output.exists()


def test_a_dry_run_without_tensorrt_llm_checks_what_it_can(build: LlmBuild) -> None:
    outcome = build("--dry_run", "--new_flag", "7", chunkkv_layer_reuse=2, log_level="warning")
    assert outcome.code == 0, outcome
    assert "0-1     1          819" in outcome.out
    assert "tensorrt_llm is not installed: config.json and the flags were checked, the network was not" in outcome.out
    assert "--new_flag was not checked: trtllm-build is not installed here" in outcome.err


def test_a_build_without_tensorrt_llm_says_what_is_missing(build: LlmBuild) -> None:
    said = build().error(1)
    assert "needs the Python package 'tensorrt_llm' (0.16 to 1.2.1), which is not installed" in said


def test_a_build_without_the_plugins_says_what_is_missing(
    machine: Machine, build: LlmBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from chunkkv.gpu import tensorrt_plugins

    monkeypatch.setenv("CHUNKKV_LIB", str(tmp_path / "nowhere" / "libchunkkv.so"))
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", ())
    assert "the ChunkKV plugins libchunkkv_tensorrt.so.10, which are in none of" in build().error(1)


def test_unknown_flags_are_refused_by_trtllm_builds_own_parser(machine: Machine, build: LlmBuild) -> None:
    assert build("--new_flag", "7").error(2) == "trtllm-build says: unrecognized arguments: --new_flag 7"


def test_mpi_is_refused(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm import _utils

    _utils.mpi_world_size = lambda: 2
    assert "2 MPI processes build at once" in build().error(2)


def test_another_trtllm_build_is_refused(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm.commands import build as command

    del command.build
    assert "tensorrt_llm.commands.build has no build" in build().error(1)


def test_a_build_that_fails_leaves_nothing_and_puts_everything_back(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm import builder
    from tensorrt_llm.commands import build as command
    from tensorrt_llm.layers import attention as layers

    def fails(*_: object) -> None:
        raise AssertionError("no memory")

    before = command.build, layers.gpt_attention, list(sys.argv)
    builder.Builder.build_engine = fails
    said = build().error(1)
    assert re.fullmatch(
        r"trtllm-build failed with AssertionError at tests/test_tensorrt_llm_command.py:\d+: no memory \(--log_level "
        r"debug shows the traceback\)",
        said,
    )
    assert (command.build, layers.gpt_attention, sys.argv) == before
    assert [path.name for path in build.output.parent.iterdir()] == ["plugins"]


def test_an_assertion_without_text_is_shown_as_it_is_written(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm import builder

    def fails(*_: object) -> None:
        raise AssertionError  # pytest would give an assert statement a text

    builder.Builder.build_engine = fails
    assert ": raise AssertionError  # pytest would give" in build().error(1)


def test_no_timing_cache_is_left_in_the_working_directory(
    machine: Machine, build: LlmBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm import builder

    asked = []

    def build_engine(self: object, network: Any, config: Any, weights: Any = None) -> bytes:
        asked.append(Path(sys.argv[sys.argv.index("--output_timing_cache") + 1]))
        asked[-1].write_bytes(b"timings")
        return real(self, network, config, weights)

    real, builder.Builder.build_engine = builder.Builder.build_engine, build_engine
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.cache"
    assert build().code == build(output_timing_cache=own, overwrite=True).code == 0
    assert not asked[0].exists() and not asked[0].parent.exists() and asked[1] == own and own.exists()
    assert not (tmp_path / "model.cache").exists()


def test_ranks_that_were_not_built_are_noticed(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm.commands import build as command

    command.main = lambda: None
    assert build().error(1) == "of 1 ranks only [] were built with ChunkKV"
    assert not build.output.exists()


def test_sigterm_in_a_build_leaves_nothing(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm import builder
    from tensorrt_llm.layers import attention as layers

    before = layers.gpt_attention
    builder.Builder.build_engine = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    outcome = build()
    assert outcome.code == 143 and layers.gpt_attention is before
    assert [path.name for path in build.output.parent.iterdir()] == ["plugins"]


def test_an_engine_is_replaced_with_overwrite_only(machine: Machine, build: LlmBuild) -> None:
    assert build().code == 0
    assert "give --overwrite or another directory" in build().error(2)
    assert build(overwrite=True, chunkkv_keep_ratio=0.5).code == 0
    assert EngineFiles.load(build.output).settings.keep_per_10k == 5000


def test_a_folder_in_the_engine_is_refused(machine: Machine, build: LlmBuild) -> None:
    from tensorrt_llm import builder

    save = builder.Engine.save

    def with_folder(self: object, engine_dir: str) -> None:
        save(self, engine_dir)
        (Path(engine_dir) / "lora").mkdir()

    builder.Engine.save = with_folder
    assert "trtllm-build wrote a folder, lora" in build().error(1)


def test_another_schema_is_another_version(tmp_path: Path, side_file: str) -> None:
    (tmp_path / SIDE_FILE).write_text(side_file.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(EngineMismatchError, match=naming("version")):
        SideFile.read(tmp_path)
