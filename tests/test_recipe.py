"""Recipes: what chunkkv calibrate writes is what chunkkv-build reads, flags win over it, and files are only data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.builds import CommandLine
from support.messages import naming

from chunkkv.command_line import UsageError
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.recipe import read_recipe, write_recipe
from chunkkv.errors import ConfigError
from chunkkv_builder.chunkkv_flags import chunkkv_settings
from chunkkv_builder.flags import parse

LAYERS = 3
SETTINGS = {"keep_ratio": 0.3, "window": 16, "chunk_size": 8, "boundaries": "fixed", "leader": "first"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_recipe(tmp_path / "r.json", {**SETTINGS, "layer_reuse": "0-1,2"}, LAYERS, {"prompts": 4})
    return tmp_path / "r.json"


def settings(recipe: Path, line: str = "") -> Any:
    return chunkkv_settings(
        parse(["--checkpoint_dir", "c", "--chunkkv", "--chunkkv_recipe", str(recipe), *line.split()]), LAYERS
    )


def test_a_recipe_sets_what_it_names_and_nothing_else(recipe: Path) -> None:
    found = settings(recipe)
    assert (found.keep_per_10k, found.window, found.chunk_size, found.leader) == (3000, 16, 8, "first")
    assert found.layer_groups == ((0, 1), (2,))
    plain = chunkkv_settings(parse(["--checkpoint_dir", "c", "--chunkkv"]), LAYERS)
    assert plain is not None and (found.sinks, found.pooling) == (plain.sinks, plain.pooling)
    assert [path.name for path in recipe.parent.iterdir()] == ["r.json"]


def test_flags_win_over_a_recipe(recipe: Path) -> None:
    found = settings(recipe, "--chunkkv_window 8 --chunkkv_layer_reuse 1 --chunkkv_leader last")
    assert (found.window, found.leader, len(found.layer_groups), found.chunk_size) == (8, "last", LAYERS, 8)
    by_number = settings(recipe, "--chunkkv_budget_tokens 512")
    assert by_number.budget_tokens == 512 and by_number.keep_per_10k != 3000
    write_recipe(recipe, {"budget_tokens": 512}, LAYERS, {})
    by_share = settings(recipe, "--chunkkv_keep_ratio 0.1")
    assert by_share.budget_tokens == 0 and by_share.keep_per_10k == 1000


CLASSES = {
    "budget_split": "classes",
    "reading_heads": [[0], [], [1]],
    "reading_share_per_10k": 20_000,
    "local_share_per_10k": 5_000,
    "local_policy": "chunks",
    "heads": "each",
    "leaders": [0, 1, 2],
}


def with_heads(recipe: Path, line: str = "") -> Any:
    words = ["--checkpoint_dir", "c", "--chunkkv", "--chunkkv_recipe", str(recipe), *line.split()]
    return chunkkv_settings(parse(words), LAYERS, num_kv_heads=2)


def test_a_recipe_lists_heads_and_leaders(recipe: Path) -> None:
    write_recipe(recipe, CLASSES, LAYERS, {})
    found = with_heads(recipe)
    assert (found.reading_heads, found.leaders, found.num_kv_heads) == (((0,), (), (1,)), (0, 1, 2), 2)
    assert (found.budget_split, found.local_policy, found.heads) == ("classes", "chunks", "each")
    assert (found.reading_share_per_10k, found.local_share_per_10k) == (20_000, 5_000)


def test_flags_replace_what_belongs_to_a_recipes_classes_and_groups(recipe: Path) -> None:
    write_recipe(recipe, CLASSES, LAYERS, {})
    found = with_heads(recipe, "--chunkkv_budget_split uniform --chunkkv_leader last")
    assert (found.budget_split, found.reading_heads, found.leaders) == ("uniform", (), ())
    assert (found.reading_share_per_10k, found.heads) == (10_000, "each")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"reading_heads": [0]}}, "reading_heads 0"),
        ({"settings": {"reading_heads": 1}}, "reading_heads 1"),
        ({"settings": {"leaders": ["0"]}}, "leaders '0'"),
        ({"format": "other"}, "format 'other' 2 'chunkkv-recipe' 2"),
        ({"format_version": 1}, "format 'chunkkv-recipe' 1 2"),
        ({"num_hidden_layers": 4}, "4 layers 3"),
        ({"settings": [1]}, "'settings' [1]"),
        ({"settings": {"windw": 1}}, "settings 'windw' window"),
        ({"settings": {"window": "16"}}, "'window' '16'"),
        ({"settings": {"window": True}}, "'window' True"),
        ({"settings": {"keep_ratio": None}}, "'keep_ratio' None"),
        ({"settings": {"layer_reuse": [[0]]}}, "'layer_reuse' [[0]]"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Path, changes: dict[str, Any], message: str) -> None:
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **changes}))
    with pytest.raises(ConfigError, match=naming(message)):
        read_recipe(recipe, LAYERS)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_other_files_are_refused_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ConfigError, match=naming("r.json")):
        read_recipe(tmp_path / "r.json", LAYERS)
    with pytest.raises(ConfigError, match=naming("none.json")):
        read_recipe(tmp_path / "none.json", LAYERS)


def test_values_out_of_range_name_the_flag(recipe: Path) -> None:
    write_recipe(recipe, {"window": 1000}, LAYERS, {})
    with pytest.raises(UsageError, match=naming("--chunkkv_window 1000 1 128")):
        settings(recipe)


def test_a_build_reads_it(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = CommandLine(capsys)
    line = [
        "--checkpoint_dir",
        engines.checkpoint_dir("llama3"),
        "--output_dir",
        tmp_path / "e",
        "--log_level",
        "error",
    ]
    assert run(*line, "--chunkkv", "--chunkkv_recipe", recipe).code == 0
    found = EngineFiles.load(tmp_path / "e").settings
    assert found is not None and found.layer_groups == ((0, 1), (2,)) and found.keep_ratio == 0.3
    message = run(*line, "--chunkkv_recipe", recipe).error(2)
    assert message == "--chunkkv_recipe has no effect without --chunkkv: add it"


@pytest.mark.parametrize(
    ("name", "policy", "count", "keep", "whole"),
    [
        ("recipe.json", "chunks", 12, 2_000, True),
        ("recipe-static.json", "recent", 12, 2_000, True),
        ("recipe-10.json", "recent", 11, 1_000, False),
        ("recipe-in-prompt.json", "recent", 24, 300, False),
    ],
)
def test_the_recipes_of_smollm2_are_for_their_share_of_the_cache(
    name: str, policy: str, count: int, keep: int, whole: bool
) -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / "smollm2" / name
    words = ["--checkpoint_dir", "c", "--chunkkv", "--chunkkv_recipe", str(path)]
    found = chunkkv_settings(parse([*words, "--chunkkv_keep_ratio", str(keep / 10_000)]), 30, num_kv_heads=3)
    assert found is not None and found.local_policy == policy and sum(map(len, found.reading_heads)) == count
    reading, local = found.class_lengths(2_000)
    assert (reading == 2_000) == whole and 0 <= 90 * keep // 5 - (count * reading + (90 - count) * local) < 90
    measured = json.loads(path.read_text(encoding="utf-8"))["measured"]
    rows = measured["rows" if measured["asked"] == "after compression" else "rows_in_prompt"]
    assert measured["keep_ratio"] == keep / 10_000 and measured["chosen"] in {row["name"] for row in rows}


def test_smollm2s_two_recipes_for_20_percent_differ_in_what_the_other_heads_keep() -> None:
    """Both are rows of one search: 12 heads of the same demand, with chunks or recent tokens elsewhere."""
    folder = Path(__file__).resolve().parent.parent / "examples" / "smollm2"
    chunks, recent = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("recipe.json", "recipe-static.json")
    )
    changed = {name for name, value in chunks["settings"].items() if recent["settings"][name] != value}
    assert changed == {"local_policy"}
    assert "12 of 90 heads read, others chunks" in {row["name"] for row in recent["measured"]["rows"]}
