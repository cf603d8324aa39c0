"""chunkkv calibrate: groups grow while the measure allows it, and the recipe builds an engine that loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import command_line

from chunkkv.cli.main import main
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.layer_groups import layer_groups
from chunkkv.evaluation.calibration import MeasuredCandidate
from chunkkv.evaluation.recipe_search import (
    best,
    groups_by_agreement,
    grow_groups,
    layer_reuse_text,
    with_groups,
)
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder import build as build_engine

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "needle" / "model"
PROMPTS = ROOT / "examples" / "needle" / "prompts"
# Layers 0 and 1 agree, 2 and 3 agree, and so do 3 and 4, but not 2 and 4.
AGREEMENT = np.eye(5)
for _a, _b, _value in ((0, 1, 0.9), (2, 3, 0.8), (3, 4, 0.7), (2, 4, 0.2), (1, 2, 0.1)):
    AGREEMENT[_a, _b] = AGREEMENT[_b, _a] = _value


@pytest.mark.parametrize(
    ("leader", "most", "least", "groups"),
    [
        ("first", 4, 0.5, "0-1,2-3,4"),
        ("last", 4, 0.5, "0-1,2-3,4"),
        ("first", 4, 0.85, "0-1,2,3,4"),
        ("first", 4, 0.2, "0-1,2-4"),
        ("first", 2, 0.0, "0-1,2-3,4"),
        ("last", 5, 0.0, "0-4"),
        ("last", 5, 1.0, "0,1,2,3,4"),
    ],
)
def test_groups_hold_what_agrees_with_their_leader(leader: str, most: int, least: float, groups: str) -> None:
    found = groups_by_agreement(AGREEMENT, leader, most, least)
    assert layer_reuse_text(found) == groups
    assert layer_groups(5, groups) == found  # as --chunkkv_layer_reuse reads it


def test_a_layer_that_is_refused_begins_a_group_of_its_own() -> None:
    asked = []

    def accepts(groups: Any, number: int) -> bool:
        asked.append((layer_reuse_text(groups), number))
        return 2 not in groups[number] or len(groups[number]) == 2

    assert grow_groups(4, 4, accepts) == ((0, 1), (2, 3))
    assert asked == [("0-1,2,3", 0), ("0-2,3", 0), ("0-1,2-3", 1)]


def test_fewest_groups_win_then_the_last_layer_then_accuracy() -> None:
    def candidate(reuse: str, leader: str, right: float) -> MeasuredCandidate:
        settings = with_groups(ChunkKVSettings(), layer_groups(4, reuse), leader)
        return MeasuredCandidate(f"{reuse} {leader} {right}", settings, np.full((2, 3), right))

    alone, pair, other = candidate("1", "last", 1.0), candidate("0-1,2-3", "first", 0.9), candidate("2", "last", 0.9)
    assert best([alone, pair]) is pair
    assert best([pair, other]) is best([other, pair]) is other
    better = candidate("0,1-3", "first", 0.95)
    assert best([pair, better]) is better
    assert best([pair, other, better]) is other


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("engine") / "plain")


def built(output: Path, **flags: Any) -> Path:
    common = {"checkpoint_dir": MODEL, "output_dir": output, "chunkkv": True, "log_level": "error"}
    build_engine.main(command_line({**common, **flags}))
    return output


def calibrate(engine: Path, output: Path, *arguments: str) -> dict[str, Any]:
    main(["calibrate", "--engine_dir", str(engine), "--output", str(output), "--threads", "1", *arguments])
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_suite_gives_a_recipe_whose_engine_shares_choices(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = calibrate(engine, tmp_path / "r.json", "--data", "recall", "--prompts", "12", "--keep", "0.2,0.1")
    shown = capsys.readouterr().out
    assert "agreement of neighbouring layers" in shown and "full cache" in shown and "n = 12" in shown
    settings, measured = recipe["settings"], recipe["measured"]
    assert (settings["leader"], settings["layer_reuse"]) == ("last", "0-1,2-3")
    rows = {row["name"]: [cell["accuracy"] for cell in row["cells"]] for row in measured["rows"]}
    assert rows["full cache"] == [1.0, 1.0]
    first, last = (
        next(cells for name, cells in rows.items() if name.endswith(f"groups 0-1,2-3, leader {leader}"))
        for leader in ("first", "last")
    )
    assert sum(last) > sum(first) + 0.5
    assert np.array(measured["agreement"]).shape == (4, 4)
    built(tmp_path / "e", chunkkv_recipe=tmp_path / "r.json", chunkkv_keep_ratio=0.2)
    found = EngineFiles.load(tmp_path / "e").settings
    assert found is not None and found.layer_groups == ((0, 1), (2, 3)) and found.keep_ratio == 0.2


def lines(tmp_path: Path, answers: bool, *more: str) -> str:
    """Return a file of the example prompts as JSON lines."""
    path = tmp_path / "prompts.jsonl"
    written = []
    for name in ("demo", "home", "keeper"):
        file = json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
        answer = {"answer": file["expected"].replace("<eos>", "").rstrip(". ")} if answers else {}
        written.append(json.dumps({"prompt": file["text"], **answer}))
    path.write_text("\n".join([*written, *more]), encoding="utf-8")
    return str(path)


def test_prompts_without_answers_are_grouped_by_agreement(engine: Path, tmp_path: Path) -> None:
    data = lines(tmp_path, answers=False)
    recipe = calibrate(engine, tmp_path / "r.json", "--data", data, "--min_agreement", "1.0")
    assert recipe["settings"]["layer_reuse"] == "0,1,2,3" and recipe["measured"]["rows"] == []
    recipe = calibrate(engine, tmp_path / "r.json", "--data", data, "--min_agreement", "0")
    assert recipe["settings"]["layer_reuse"] == "0-3"
    diagonal = np.diag(np.array(recipe["measured"]["agreement"]))
    assert (diagonal == 1).all() and recipe["measured"]["prompts"] == 3


def test_prompts_with_answers_show_what_is_lost(engine: Path, tmp_path: Path) -> None:
    data = lines(tmp_path, answers=True)
    recipe = calibrate(engine, tmp_path / "r.json", "--data", data, "--policies", "chunkkv-delimiter:chunk_size=20")
    rows = {row["name"]: row["cells"] for row in recipe["measured"]["rows"]}
    assert all(cell["accuracy"] == 1.0 for cell in rows["full cache"])
    assert all(cell["accuracy"] == 1.0 for cell in rows["chunkkv-delimiter:chunk_size=20"])


def test_the_examples_of_chunkkv_eval_serve_too(engine: Path, tmp_path: Path) -> None:
    file = json.loads((PROMPTS / "home.json").read_text(encoding="utf-8"))
    context = file["text"].removesuffix(file["question"])
    answer = file["expected"].replace("<eos>", "").rstrip(". ")
    example = json.dumps({"context": context, "question": file["question"], "answer": answer})
    (tmp_path / "e.jsonl").write_text(f"{example}\n{example}\n", encoding="utf-8")
    recipe = calibrate(engine, tmp_path / "r.json", "--data", f"file:{tmp_path / 'e.jsonl'}", "--policies", "")
    assert recipe["measured"]["prompts"] == 2  # each once, though 64 were wanted
    assert [cell["accuracy"] for cell in recipe["measured"]["rows"][0]["cells"]] == [1.0] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nothing", "suite is 'nothing'; there are all, needle, "),
        ("--data none.jsonl", "none.jsonl cannot be read: No such file"),
        ("--data recall --prompts 0", "prompts is 0; give a whole number of at least 1"),
        ("--data recall --max_loss 2", "--max_loss is 2.0; allowed is 0 to 1"),
        ("--data recall --keep 0", "keep is 0.0; allowed is (0, 1]"),
        ("--data recall --output no/such/r.json", "output no/such/r.json cannot be written"),
        ("--data recall --policies snapkv", "policies names snapkv, which no engine can be built with"),
        ("--data recall --lengths 64 --prompts 2", "data has no prompt that is compressed"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    engine: Path, tmp_path: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--engine_dir", str(engine), *arguments.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_lines_and_bad_engines_are_named(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "{": "line 4 is no valid JSON",
        "[1]": "line 4 is a JSON list; give an object",
        '{"prompt": " "}': "line 4: prompt is ' '; give text",
        '{"prompt": "a", "answer": 7}': "line 4: answer is 7; give text",
        '{"prompt": "a"}': "has answers to some prompts only",
    }
    for line, message in bad.items():
        with pytest.raises(SystemExit):
            calibrate(engine, tmp_path / "r.json", "--data", lines(tmp_path, True, line))
        assert message in capsys.readouterr().err
    shared = built(tmp_path / "shared", chunkkv_layer_reuse=2)
    with pytest.raises(SystemExit):
        calibrate(shared, tmp_path / "r.json", "--data", "recall")
    assert "build the engine with --chunkkv and --chunkkv_layer_reuse 1" in capsys.readouterr().err
