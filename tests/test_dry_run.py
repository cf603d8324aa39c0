"""--dry_run: the plan as a table, with numbers worked out here from the model's sizes and the contract's N(L)."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support import class_engines, engines
from support.builds import CommandLine, tree

from chunkkv.engine.layer_groups import layer_groups
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.dry_run import print_plan
from chunkkv_builder.plan import make_plan

LENGTHS = (2048, 8192, 32768)
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.chdir(tmp_path)  # the default output_dir lies in the current directory
    return CommandLine(capsys)


def rows(text: str) -> list[list[str]]:
    """Return the cells of the table's rows, the line of totals included."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if re.match(r" (\d+(-\d+)?|all) ", line)]


def is_close(shown: str, count: int) -> bool:
    """Return whether `shown` is `count` bytes, rounded to one decimal of a unit that leaves less than 1024."""
    number, unit = shown.split()
    return float(number) <= 1024 and abs(float(number) * UNITS[unit] - count) <= 0.051 * UNITS[unit]


def dry_run(cli: CommandLine, variant: str, *flags: str) -> str:
    done = cli("--checkpoint_dir", engines.checkpoint_dir(variant), "--dry_run", "--log_level", "error", *flags)
    assert (done.code, done.err) == (0, "")
    return done.out


# flags, kept at 2k, 8k and 32k: ratios are floored, min_tokens is a floor, a budget is one number for all lengths
@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--chunkkv", (1024, 4096, 16384)),
        ("--chunkkv --chunkkv_keep_ratio 0.1", (204, 819, 3276)),
        ("--chunkkv --chunkkv_keep_ratio 0.2", (409, 1638, 6553)),
        ("--chunkkv --chunkkv_keep_ratio 0.0333", (68, 272, 1091)),
        ("--chunkkv --chunkkv_keep_ratio 0.01", (64, 81, 327)),
        ("--chunkkv --chunkkv_keep_ratio 0.01 --chunkkv_min_tokens 300", (300, 300, 327)),
        ("--chunkkv --chunkkv_keep_ratio 1", LENGTHS),
        ("--chunkkv --chunkkv_budget_tokens 4000", (2048, 4000, 4000)),
        ("", LENGTHS),
    ],
)
@pytest.mark.parametrize(
    ("variant", "layers", "bytes_of_a_layer"),
    [("llama2", 3, 2 * 4 * 16 * 4), ("llama3", 3, 2 * 2 * 16 * 4), ("qwen3", 2, 2 * 2 * 32 * 4)],  # K and V in float32
)
def test_kept_tokens_and_saved_bytes(
    variant: str, layers: int, bytes_of_a_layer: int, flags: str, kept: tuple[int, ...], cli: CommandLine
) -> None:
    found = rows(dry_run(cli, variant, *flags.split()))
    *each, total = found
    assert [row[0] for row in each] == [f"0-{layers - 1}"] and total[0] == "all"
    for row, count in [(row[1:], layers) for row in each] + [(total, layers)]:
        assert tuple(map(int, row[1:4])) == kept
        saved = [(length - keep) * bytes_of_a_layer * count for length, keep in zip(LENGTHS, kept, strict=True)]
        assert len(row) == 7 and all(map(is_close, row[4:], saved)), (row, saved)


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        ("", ["keeps all"]),
        ("--chunkkv", ["chooses"]),
        ("--chunkkv --chunkkv_heads each", ["chooses per head"]),
        ("--chunkkv --chunkkv_budget_split ranked", ["is ranked"]),
        ("--chunkkv --chunkkv_budget_split ranked --chunkkv_heads each", ["is ranked per head"]),
        ("--chunkkv --chunkkv_layer_reuse 2 --chunkkv_leader last", ["follows 1", "leads 0-1", "chooses"]),
        ("--chunkkv --chunkkv_layer_reuse 3 --chunkkv_leader last", ["follows 2", "leads 0-2"]),
        ("--chunkkv --chunkkv_layer_reuse 3 --chunkkv_leader first", ["leads 0-2", "follows 0"]),
        ("--chunkkv --chunkkv_layer_reuse 0,1-2 --chunkkv_leader first", ["chooses", "leads 1-2", "follows 1"]),
    ],
)
def test_groups_and_their_leaders_are_shown(flags: str, roles: list[str], cli: CommandLine) -> None:
    found = rows(dry_run(cli, "llama3", *flags.split()))
    assert [row[1] for row in found[:-1]] == roles


@pytest.mark.parametrize(
    ("reuse", "leader", "each"),
    [
        (2, "first", [("0-7", "1 of 2 leads", 4), ("0-7", "1 of 2 follow", 4), ("8", "chooses", 1)]),
        (4, "last", [("0-7", "3 of 4 follow", 6), ("0-7", "1 of 4 leads", 2), ("8", "chooses", 1)]),
    ],
)
def test_layer_groups_that_are_alike_share_their_rows(
    reuse: int, leader: str, each: list[tuple[str, str, int]], cli: CommandLine
) -> None:
    flags = ["--checkpoint_dir", engines.checkpoint_dir("llama3", num_hidden_layers=9), "--dry_run", "--chunkkv"]
    done = cli(*flags, "--chunkkv_layer_reuse", str(reuse), "--chunkkv_leader", leader, "--log_level", "error")
    *found, total = rows(done.out)
    assert [tuple(row[:2]) for row in found] == [one[:2] for one in each] and total[0] == "all"
    for row, (_, _, layers) in zip(found, each, strict=True):
        kept = map(int, row[2:5])
        saved = [(length - count) * layers * 2 * 2 * 16 * 4 for length, count in zip(LENGTHS, kept, strict=True)]
        assert all(map(is_close, row[5:], saved))


def test_every_class_of_heads_has_a_row_and_the_total_is_their_sum() -> None:
    settings = class_engines.settings_of(**class_engines.CLASSES)
    screen = Console(file=(page := io.StringIO()), width=120)
    print_plan(class_engines.plan_of(settings), BuildConfig(40_000, 40_000), screen)
    shown = page.getvalue()
    words = " ".join(shown.split())
    assert "3 of 9 KV heads read and keep 1.8 times as much, the others 0.6 times" in words
    *each, total = rows(shown)
    assert [row[:2] for row in each] == [
        ["0", "2 reading: chooses"],
        ["0", "1 local: keeps recent"],
        ["1", "3 local: keeps recent"],
        ["2", "1 reading: chooses"],
        ["2", "2 local: keeps recent"],
    ]
    head_bytes = 2 * 16 * 4
    saved = [0] * 3
    for row in each:
        heads, word = int(row[1][0]), row[1].split()[1].rstrip(":")
        for place, length in enumerate(LENGTHS):
            kept = settings.class_lengths(length)[word == "local"]
            assert int(row[2 + place]) == kept and is_close(row[5 + place], (length - kept) * heads * head_bytes)
            saved[place] += (length - kept) * heads * head_bytes
    assert tuple(map(int, total[1:4])) == tuple(map(settings.kept_tokens, LENGTHS))
    assert all(map(is_close, total[4:], saved))


def test_the_lines_above_the_table_say_what_would_be_built(cli: CommandLine) -> None:
    text = " ".join(dry_run(cli, "llama3", "--chunkkv", "--chunkkv_keep_ratio", "0.2", "--max_seq_len", "300").split())
    assert "LlamaForCausalLM: 3 layers, 2 KV heads of 16, 768 B of KV cache per token" in text
    assert "backend onnxruntime, weights float32, max_batch_size 8, max_input_len 300, max_seq_len 300" in text
    half = " ".join(dry_run(cli, "llama3", "--kv_cache_dtype", "float16").split())
    assert "2 KV heads of 16, 384 B of KV cache per token in float16 backend" in half
    assert (
        "keep_ratio 0.2 (kvpress compression_ratio 0.8), chunk_size 20, boundaries delimiter, window 16, sinks 4"
        in text
    )
    assert "Prompts of 2k, 8k, 32k are above max_input_len; shown for comparison." in text
    packed = dry_run(cli, "llama3", "--use_weight_only", "--chunkkv", "--chunkkv_budget_tokens", "500")
    assert "weights int8 times activations int8" in packed and "ChunkKV: budget_tokens 500," in packed
    assert "ChunkKV: off, every prompt token is kept" in dry_run(cli, "llama3")


def test_only_lengths_above_the_limit_are_marked_as_such(cli: CommandLine) -> None:
    long = engines.checkpoint_dir("llama2", max_position_embeddings=8192)
    out = cli("--checkpoint_dir", long, "--dry_run", "--log_level", "error").out
    assert "Prompts of 32k are above max_input_len" in out


def test_the_column_titles_name_quantity_and_length(cli: CommandLine) -> None:
    lines = dry_run(cli, "llama3", "--chunkkv").splitlines()
    bottom = next(number for number, line in enumerate(lines) if line.strip().startswith("layer"))
    assert lines[bottom - 1].split() == ["kept"] * 3 + ["KV", "saved"] * 3
    assert lines[bottom].split() == ["layer", "role", *["at", "2k", "at", "8k", "at", "32k"] * 2]


def test_a_big_models_table_fits_eighty_columns_unbroken() -> None:
    model = HuggingFaceCheckpoint.open(engines.checkpoint_dir("llama2")).config
    big = type(model)(**{**vars(model), "num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128})
    plan = make_plan(big, ChunkKVSettings(leader="last", layer_groups=layer_groups(80, "0-9,10-79")))
    console = Console(width=80, highlight=False, force_terminal=True, no_color=True)
    with console.capture() as shown:
        print_plan(plan, BuildConfig.for_model(big), console)
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in shown.get().splitlines()]
    table = [line for line in lines if re.match(r" (\d+(-\d+)?|all) ", line)]
    assert len(table) == 5 and max(map(len, lines)) <= 80
    assert " ".join(table[2].split()) == "10-78 follows 79 1024 4096 16384 552.0 MiB 2.2 GiB 8.6 GiB"
    assert " ".join(table[3].split()) == "79 leads 10-79 1024 4096 16384 8.0 MiB 32.0 MiB 128.0 MiB"
    assert " ".join(table[4].split()) == "all 1024 4096 16384 640.0 MiB 2.5 GiB 10.0 GiB"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_nothing_is_written(overwrite: list[str], cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "engine.partial-1").mkdir()  # not even what an earlier build left is touched
    before = tree(tmp_path), tree(engines.checkpoint_dir("llama3"))
    for output in ([], ["--output_dir", "deep/down/engine"], ["--output_dir", "engine"]):
        assert rows(dry_run(cli, "llama3", "--chunkkv", *output, *overwrite))
    assert (tree(tmp_path), tree(engines.checkpoint_dir("llama3"))) == before


def test_it_refuses_what_the_build_would_refuse(cli: CommandLine) -> None:
    model, taken = engines.checkpoint_dir("llama3"), engines.engine_dir("llama3", chunkkv=False)
    base = ("--checkpoint_dir", model, "--dry_run", "--log_level", "error")
    assert "holds an engine already; give --overwrite" in cli(*base, "--output_dir", taken).error(2)
    assert cli(*base, "--output_dir", taken, "--overwrite").code == 0
    assert "max_seq_len is 513" in cli(*base, "--max_seq_len", 513).error(2)


def test_engines_for_tensorrt_are_planned_without_a_tensorrt(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    flags = ("--backend", "tensorrt", "--max_seq_len", "256", "--max_batch_size", "4")
    text = dry_run(cli, "llama3", "--chunkkv", *flags)
    assert re.search(r"ChunkKV operators: undecided \(.*\)", text)
    assert re.search("missing here: .*'tensorrt' .*'tensorrt_rtx'", text)
    assert "prefill.engine: 1 to 2 rows of 1 to 256 tokens, caches of 128 to 256 slots" in text
    assert re.findall(r"(decode_\d+\.engine): 1 to 4 rows", text) == ["decode_128.engine", "decode_256.engine"]
    text = dry_run(cli, "llama3", "--chunkkv", *flags, "--tensorrt", "rtx", "--chunkkv_ops", "functions")
    assert re.search(r"ChunkKV operators: functions \(.*--chunkkv_ops", text)
    assert "'tensorrt_rtx'" in text and "'tensorrt'" not in text
    text = dry_run(cli, "llama3", "--chunkkv", *flags, "--compute_capability", "13.7")
    assert "compute capability 13.7: not checked" in text


def test_the_table_goes_to_standard_output_and_stages_to_standard_error(cli: CommandLine) -> None:
    done = cli("--checkpoint_dir", engines.checkpoint_dir("llama3"), "--dry_run")
    assert re.fullmatch(r"checkpoint +\d+\.\d s\n", done.err)
    assert len(rows(done.out)) == 2 and "checkpoint " not in done.out
