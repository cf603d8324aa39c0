"""The flags of chunkkv-build: names, defaults, what reaches the engine, and one clear line for everything wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import engines
from support.builds import CommandLine, Outcome
from support.messages import naming

import chunkkv
from chunkkv.command_line import UsageError
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.chunkkv_flags import chunkkv_settings
from chunkkv_builder.flags import parse
from chunkkv_builder.trtllm_flags import TRTLLM_FLAGS_WITHOUT_MEANING

TRTLLM_FLAGS = (
    *("checkpoint_dir", "output_dir", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"),
    *("log_level", "dry_run"),
)
CHUNKKV_FLAGS = tuple(
    "chunkkv" + end
    for end in (
        *("", "_keep_ratio", "_budget_tokens", "_max_keep_ratio", "_chunk_size", "_window", "_sinks", "_pooling"),
        *("_min_tokens", "_boundaries", "_score", "_leader", "_layer_reuse", "_recipe", "_window_reduce"),
        *("_head_reduce", "_value_norm", "_heads", "_budget_split", "_local_policy"),
    )
)
OWN_FLAGS = ("overwrite", "backend", "dtype", "use_weight_only", "weight_only_precision")
OWN_FLAGS += ("weight_only_activations", "kv_cache_dtype", "prefill_precision")
OWN_FLAGS += ("tensorrt", "compute_capability", "timing_cache", "chunkkv_ops")
LAYERS, KV_HEADS = 3, 2  # of the llama3 checkpoint, whose context is 512


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.chdir(tmp_path)  # the default output_dir lies in the current directory
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return engines.checkpoint_dir("llama3")


GIVEN = {"score": "given", "head_reduce": "mean"}


def settings(line: str) -> ChunkKVSettings | None:
    return chunkkv_settings(parse(["--checkpoint_dir", "c", *line.split()]), LAYERS, KV_HEADS)


def test_help_names_every_flag_with_its_default_on_a_narrow_terminal(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("--help")
    assert done.code == 0 and done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
    shown = done.out.partition("paths:")[2]
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", shown, re.MULTILINE | re.DOTALL))
    assert set(entries) == {*TRTLLM_FLAGS, *CHUNKKV_FLAGS, *OWN_FLAGS}
    without_default = {"checkpoint_dir", "overwrite", "use_weight_only", "dry_run"}
    without_default |= {"chunkkv", "chunkkv_budget_tokens", "chunkkv_recipe"}
    for name, text in entries.items():
        words = " ".join(text.split())
        assert ("default: " in words) == (name not in without_default), name


def test_the_version_and_the_short_flag_for_help(cli: CommandLine) -> None:
    assert cli("--version") == Outcome(0, f"chunkkv-build {chunkkv.__version__}\n", "")
    for backend in ([], ["--backend", "tensorrt_llm"]):
        assert cli(*backend, "-h") == cli(*backend, "--help") and cli(*backend, "-h").out.startswith("usage: ")


def test_the_defaults_are_the_documented_ones() -> None:
    flags = parse(["--checkpoint_dir", "c"])
    assert (flags.output_dir, flags.max_batch_size, flags.max_num_tokens) == ("engine_outputs", 8, None)
    assert (flags.max_input_len, flags.max_seq_len, flags.weight_only_precision) == (None, None, None)
    assert (flags.backend, flags.dtype, flags.log_level) == ("auto", "auto", "info")
    assert not (flags.overwrite or flags.use_weight_only or flags.dry_run or flags.chunkkv)
    assert settings("") is None and settings("--chunkkv disable") is None and settings("--chunkkv=disable") is None
    expected = ChunkKVSettings(
        keep_per_10k=5000, budget_tokens=0, max_keep_per_10k=10000, window=16, chunk_size=20, sinks=4,
        boundaries="delimiter", pooling=5, score="softmax", min_tokens=64, leader="first",
        layer_groups=((0,), (1,), (2,)),
    )  # fmt: skip
    assert settings("--chunkkv") == settings("--chunkkv enable") == settings("--chunkkv=enable") == expected
    assert flags.weight_only_activations is None
    flags = parse(["--checkpoint_dir", "c", "--use_weight_only"])
    assert (flags.weight_only_precision, flags.weight_only_activations) == ("int8", "int8")
    flags = parse(["--checkpoint_dir", "c", "--use_weight_only", "--weight_only_precision", "int4"])
    assert flags.weight_only_activations == "int8"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--chunkkv_window 60 --chunkkv_chunk_size 20", {"window": 60, "chunk_size": 20, "min_tokens": 84}),
        ("--chunkkv_window 8", {"window": 8, "min_tokens": 64}),
        ("--chunkkv_max_keep_ratio 0.3", {"keep_per_10k": 3000, "max_keep_per_10k": 3000}),
        ("--chunkkv_max_keep_ratio 0.8", {"keep_per_10k": 5000, "max_keep_per_10k": 8000}),
        ("--chunkkv_keep_ratio 1", {"keep_per_10k": 10000}),
        ("--chunkkv_keep_ratio 0.12344", {"keep_per_10k": 1234}),
        ("--chunkkv_keep_ratio 0.0001", {"keep_per_10k": 1}),
        ("--chunkkv_budget_tokens 1024", {"budget_tokens": 1024}),
        ("--chunkkv_sinks 0", {"sinks": 0}),
        ("--chunkkv_boundaries auto", {"boundaries": "delimiter", "chunk_size": 20}),
        ("--chunkkv_boundaries fixed", {"boundaries": "fixed", "chunk_size": 10}),
        ("--chunkkv_boundaries fixed --chunkkv_chunk_size 7", {"boundaries": "fixed", "chunk_size": 7}),
        ("--chunkkv_window_reduce max --chunkkv_head_reduce max", {"window_reduce": "max", "head_reduce": "max"}),
        ("--chunkkv_head_reduce mean", {"head_reduce": "mean"}),
        ("--chunkkv_score logits --chunkkv_head_reduce mean", {"score": "logits", "head_reduce": "mean"}),
        ("--chunkkv_value_norm on --chunkkv_heads each", {"value_norm": "on", "heads": "each"}),
        ("--chunkkv_budget_split ranked", {"budget_split": "ranked"}),
        (
            "--chunkkv_budget_split ranked --chunkkv_heads each",
            {"budget_split": "ranked", "heads": "each", "num_kv_heads": KV_HEADS},
        ),
        ("--chunkkv_score given --chunkkv_local_policy chunks", {**GIVEN, "local_policy": "chunks"}),
        ("--chunkkv_boundaries delimiter --chunkkv_chunk_size 10", {"boundaries": "delimiter", "chunk_size": 10}),
        ("--chunkkv_layer_reuse 2", {"layer_groups": ((0, 1), (2,))}),
        ("--chunkkv_layer_reuse 0,1-2", {"layer_groups": ((0,), (1, 2))}),
    ],
)
def test_a_flag_changes_its_own_setting_and_what_hangs_on_it(line: str, expected: dict[str, object]) -> None:
    found, default = settings(f"--chunkkv {line}"), settings("--chunkkv")
    assert found is not None and default is not None
    assert found.to_dict() == ChunkKVSettings(**{**vars(default), **expected}).to_dict()


def test_ranks_that_agree_take_the_mean_of_their_heads() -> None:
    given = ["--backend", "tensorrt_llm", "--checkpoint_dir", "c", "--chunkkv", "--chunkkv_tp_agree"]
    found = [chunkkv_settings(parse([*given, *more]), LAYERS) for more in ([], ["--chunkkv_head_reduce", "max"])]
    assert [one and one.head_reduce for one in found] == ["mean", "max"]  # the second is refused by the backend


def test_without_a_tokenizer_chunks_have_one_length() -> None:
    flags = parse(["--checkpoint_dir", "c", "--chunkkv"])
    found = chunkkv_settings(flags, LAYERS, has_tokenizer=False)
    assert found is not None and (found.boundaries, found.chunk_size) == ("fixed", 10)


def test_every_setting_arrives_in_the_engine_as_given(cli: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    given = {
        "checkpoint_dir": checkpoint, "output_dir": tmp_path / "engine", "max_batch_size": 3, "max_input_len": 150,
        "max_seq_len": 200, "max_num_tokens": 40, "log_level": "error", "backend": "onnxruntime", "dtype": "float32",
        "use_weight_only": True, "weight_only_activations": "float32", "kv_cache_dtype": "float16",
        "prefill_precision": "w8a8", "weight_only_precision": "int4", "chunkkv": True, "chunkkv_keep_ratio": 0.25,
        "chunkkv_max_keep_ratio": 0.75, "chunkkv_chunk_size": 7, "chunkkv_window": 9, "chunkkv_sinks": 2,
        "chunkkv_boundaries": "delimiter", "chunkkv_pooling": 5, "chunkkv_score": "logits", "chunkkv_leader": "first",
        "chunkkv_min_tokens": 33, "chunkkv_layer_reuse": "0-1,2",
    }  # fmt: skip
    done = cli(*engines.command_line(given))
    assert (done.code, done.out, done.err) == (0, "", "")
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["build_config"] == {
        "max_batch_size": 3, "max_input_len": 150, "max_seq_len": 200, "max_num_tokens": 40, "backend": "onnxruntime",
        "dtype": "float32", "weight_only_precision": "int4", "max_beam_width": 1, "kv_cache_type": "continuous",
        "weight_only_activations": "float32", "kv_cache_dtype": "float16", "prefill_precision": "w8a8",
    }  # fmt: skip
    assert config["chunkkv"] == {
        **ChunkKVSettings().to_dict(),
        "keep_per_10k": 2500, "max_keep_per_10k": 7500, "budget_tokens": 0, "chunk_size": 7, "window": 9, "sinks": 2,
        "boundaries": "delimiter", "pooling": 5, "score": "logits", "leader": "first", "min_tokens": 33,
        "head_reduce": "mean", "layer_groups": [[0, 1], [2]],
    }  # fmt: skip


def test_hyphens_serve_as_underscores_in_names_but_not_in_values() -> None:
    line = (
        "--checkpoint-dir my-model --output-dir=my-out --max-seq-len=9 --max-num-tokens 7 --use-weight-only --dry-run"
    )
    flags = parse(line.split())
    assert (flags.checkpoint_dir, flags.output_dir) == ("my-model", "my-out")
    assert (flags.max_seq_len, flags.max_num_tokens, flags.use_weight_only, flags.dry_run) == (9, 7, True, True)
    hyphens, underscores = (f"--chunkkv --chunkkv{c}keep{c}ratio 0.3 --chunkkv{c}leader=first" for c in "-_")
    assert settings(hyphens) == settings(underscores) != settings("--chunkkv")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--max_seq_length 9", "unknown flag --max_seq_length; did you mean --max_seq_len?"),
        ("--max-decoder-seq-len 9", "unknown flag --max-decoder-seq-len; did you mean --max_seq_len?"),
        ("--chunkkv_ratio=0.3", "unknown flag --chunkkv_ratio; did you mean --chunkkv_keep_ratio?"),
        ("--chunkkv-budget 9", "unknown flag --chunkkv-budget; did you mean --chunkkv_budget_split?"),
        ("--output out", "unknown flag --output; did you mean --output_dir?"),
        ("-checkpoint_dir c", "unknown flag -checkpoint_dir; did you mean --checkpoint_dir?"),
        ("--max_batch 4", "unknown flag --max_batch; did you mean --max_batch_size?"),  # never a silent abbreviation
        ("--overwite", "unknown flag --overwite; see --help for those there are"),  # no hint offers what deletes files
        ("--over-write", "unknown flag --over-write; see --help for those there are"),
        ("-o out", "unknown flag -o; see --help for those there are"),
        ("--xyzzy", "unknown flag --xyzzy; see --help for those there are"),
        ("stray", "'stray' belongs to no flag; every value follows its flag, as in --max_seq_len 4096"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_known_one(line: str, hint: str, cli: CommandLine) -> None:
    assert cli("--checkpoint_dir", "c", *line.split()).error(2) == hint


@pytest.mark.parametrize("name", sorted(TRTLLM_FLAGS_WITHOUT_MEANING))
def test_flags_of_trtllm_build_without_a_meaning_here_are_named_as_such(name: str) -> None:
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        for line in ([spelling, "1"], [f"{spelling}=1"]):
            with pytest.raises(UsageError, match=naming(spelling, "trtllm-build meaning")):
                parse(["--checkpoint_dir", "c", *line])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--chunkkv_keep_ratio 0.3", "--chunkkv_keep_ratio has no effect without --chunkkv: add it"),
        ("--chunkkv disable --chunkkv_sinks 0", "--chunkkv_sinks has no effect without --chunkkv: add it"),
        ("--chunkkv_layer_reuse 2", "--chunkkv_layer_reuse has no effect without --chunkkv: add it"),
        ("--weight_only_precision int4", "--weight_only_precision has no effect without --use_weight_only: add it"),
        ("--weight_only_activations int8", "--weight_only_activations has no effect without --use_weight_only: add it"),
        (
            "--chunkkv --chunkkv_keep_ratio 0.3 --chunkkv_budget_tokens 99",
            "--chunkkv_budget_tokens: give either this or --chunkkv_keep_ratio",
        ),
        (
            "--chunkkv --chunkkv_budget_tokens 99 --chunkkv_max_keep_ratio 0.3",
            "--chunkkv_max_keep_ratio bounds a share, --chunkkv_budget_tokens is a number of tokens: give one of them",
        ),
        (
            "--chunkkv --chunkkv_keep_ratio 0.5 --chunkkv_max_keep_ratio 0.3",
            "--chunkkv_keep_ratio 0.5 is above max_keep_ratio 0.3: raise max_keep_ratio or lower keep_ratio",
        ),
        (
            "--max_input_len 300 --max_seq_len 200",
            "--max_input_len is 300, above max_seq_len = 200, which counts prompt and answer: "
            "lower max_input_len or raise max_seq_len",
        ),
        (
            "--chunkkv --chunkkv_budget_split classes",
            "--chunkkv_budget_split is 'classes', whose heads are listed in a recipe: give one too",
        ),
        (
            "--chunkkv --max_num_tokens 15",
            "--max_num_tokens is 15, below the observation window of 16 tokens, which must fit in one prefill block: "
            "raise max_num_tokens or lower chunkkv_window",
        ),
    ],
)
def test_contradictions_are_refused(line: str, message: str, cli: CommandLine, checkpoint: Path) -> None:
    assert cli("--checkpoint_dir", checkpoint, "--log_level", "error", *line.split()).error(2) == message


@pytest.mark.parametrize("line", ["", "--chunkkv", "--checkpoint_dir"])
def test_the_checkpoint_is_required(line: str, cli: CommandLine) -> None:
    assert "--checkpoint_dir" in cli(*line.split()).error(2)


# flag, value, what is allowed; a value without --chunkkv_ needs no --chunkkv
INVALID = [
    ("chunkkv_window", "0", "allowed is 1 to 128"),
    ("chunkkv_window", "-1", "allowed is 1 to 128"),
    ("chunkkv_window", "129", "allowed is 1 to 128"),
    ("chunkkv_chunk_size", "0", "allowed is 1 to 256"),
    ("chunkkv_chunk_size", "257", "allowed is 1 to 256"),
    ("chunkkv_sinks", "-1", "allowed is 0 to 65536"),
    ("chunkkv_pooling", "2", "allowed are odd values"),
    ("chunkkv_pooling", "64", "allowed is 1 to 63"),
    ("chunkkv_pooling", "0", "allowed is 1 to 63"),
    ("chunkkv_min_tokens", "39", "at least window + sinks + chunk_size = 40: raise min_tokens or lower one"),
    ("chunkkv_budget_tokens", "63", "below min_tokens = 64"),
    ("chunkkv_budget_tokens", "-5", "allowed is 0 to 2147483647"),
    ("chunkkv_budget_tokens", "0", "give at least 1"),
    *(("chunkkv_keep_ratio", value, "allowed is (0, 1]") for value in ("0.0", "-0.5", "1.5", "nan", "inf")),
    ("chunkkv_keep_ratio", "1e-05", "the smallest keep ratio is 0.0001"),
    ("chunkkv_max_keep_ratio", "1.1", "allowed is (0, 1]"),
    ("chunkkv_layer_reuse", "'0-1'", "layer 2 is missing: list every layer from 0 to 2 once"),
    ("chunkkv_layer_reuse", "'0-1,1-2'", "layer 1 is listed twice"),
    ("chunkkv_layer_reuse", "'0-3'", "this model has layers 0 to 2"),
    ("chunkkv_layer_reuse", "'a'", "give a group size such as 2, or groups such as 0-1,2,3-5"),
    ("chunkkv_layer_reuse", "0", "give a group size from 1 to 3"),
    ("chunkkv_layer_reuse", "4", "give a group size from 1 to 3"),
    ("max_seq_len", "513", "this model was trained for at most 512 positions"),
    ("max_input_len", "0", "give a whole number from 1 to"),
    ("max_batch_size", "-2", "give a whole number from 1 to 4096"),
    ("max_batch_size", "4097", "give a whole number from 1 to 4096"),
    ("max_num_tokens", "0", "give a whole number from 1 to"),
    ("dtype", "'float16'", "backend onnxruntime computes in float32"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), INVALID)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    name: str, value: str, allowed: str, cli: CommandLine, checkpoint: Path, tmp_path: Path
) -> None:
    switch = ["--chunkkv"] if name.startswith("chunkkv") else []
    given = [f"--{name}", value.strip("'"), "--log_level", "error", "--output_dir", tmp_path / "engine"]
    message = cli("--checkpoint_dir", checkpoint, *switch, *given).error(2)
    assert message.startswith(f"--{name} is {value}") and allowed in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        *(("max_seq_len", v, "is not a whole number; give one such as 4096") for v in ("1e3", "4.5", "4k", "", "0x9")),
        ("max_num_tokens", "9" * 30, f"is too large; no flag takes more than {2**63 - 1}"),
        ("chunkkv_window", "many", "is not a whole number; give one such as 4096"),
        ("chunkkv_keep_ratio", "20%", "is not a number; give one in (0, 1] such as 0.2"),
        ("chunkkv_boundaries", "words", "is not offered; allowed is auto or fixed or delimiter"),
        ("chunkkv_score", "cosine", "is not offered; allowed is softmax or logits"),
        ("chunkkv_leader", "middle", "is not offered; allowed is first or last"),
        (
            "dtype",
            "flaot16",
            "is not offered; allowed is auto or float32 or float16 or bfloat16; did you mean float16?",
        ),
        ("chunkkv", "maybe", "is not offered; allowed is enable or disable"),
        ("backend", "tensorflow", "is not offered; allowed is auto or onnxruntime or tensorrt or tensorrt_llm"),
        ("dtype", "int8", "is not offered; allowed is auto or float32 or float16 or bfloat16"),
        ("weight_only_precision", "int2", "is not offered; allowed is int8 or int4 or w8a8"),
        ("weight_only_activations", "int4", "is not offered; allowed is int8 or float32"),
        ("prefill_precision", "int8", "is not offered; allowed is w8a8"),
        ("log_level", "loud", "is not offered; allowed is error or warning or info or verbose or debug"),
    ],
)
def test_a_value_of_the_wrong_kind_is_quoted(name: str, value: str, advice: str, cli: CommandLine) -> None:
    message = cli("--checkpoint_dir", "c", f"--{name}={value}").error(2)
    assert message.startswith(f"--{name}: {value!r} {advice}")


@pytest.mark.parametrize("name", ["checkpoint_dir", "chunkkv_recipe", "timing_cache"])
def test_an_empty_path_is_not_the_current_directory(name: str, cli: CommandLine) -> None:
    assert cli("--checkpoint_dir", "c", f"--{name}", "").error(2).startswith(f"--{name}: is empty; give a path")


def test_a_flag_without_its_value_is_named(cli: CommandLine) -> None:
    message = cli("--checkpoint_dir", "c", "--max_seq_len", "--dry_run").error(2)
    assert message == "--max_seq_len: expected one argument"


def test_delimiters_need_a_tokenizer(cli: CommandLine, tmp_path: Path) -> None:
    bare = engines.checkpoint_dir("llama3", with_tokenizer=False)
    line = ["--chunkkv", "--chunkkv_boundaries", "delimiter", "--log_level", "error", "--output_dir", tmp_path / "e"]
    message = cli("--checkpoint_dir", bare, *line).error(2)
    assert message.startswith("--chunkkv_boundaries is 'delimiter', which needs a tokenizer beside the checkpoint")


def test_a_usage_error_is_a_config_error_for_those_who_call_from_python() -> None:
    with pytest.raises(ConfigError, match=naming("--chunkkv_window 0")):
        settings("--chunkkv --chunkkv_window 0")
