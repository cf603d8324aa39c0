"""chunkkv eval for real models: chat template, real text, the warning about a weak full cache, the estimate of time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from support import engines, needle_engine

from chunkkv.cli.main import main
from chunkkv.evaluation.full_cache_check import FEWEST, FullCacheCheck
from chunkkv.evaluation.run_time import duration, estimate_seconds
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import Example
from chunkkv.evaluation.texts.real_suites import real_suites
from chunkkv.evaluation.texts.real_tasks import TASKS
from chunkkv.evaluation.texts.real_texts import KINDS, RealText
from chunkkv.evaluation.texts.suites import Suite
from chunkkv.evaluation.texts.templates import ENGLISH
from chunkkv.settings import ChunkKVSettings

SETTINGS = ChunkKVSettings(layer_groups=((0,),))
FLAGS = {
    "checkpoint_dir": engines.checkpoint_dir("llama3", max_position_embeddings=4096),
    "max_seq_len": 4096,
    "max_num_tokens": 512,
}
SESSION = engines.session("llama3", **FLAGS)
ENGINE = engines.engine_dir("llama3", **FLAGS)
OWN = RealText("file", " ".join(f"In the year {year} the harbour master saw {year * 3} ships." for year in range(900)))


def example(suite: Suite, cell: dict, chat: bool) -> Example:
    assert SESSION.tokenizer is not None
    frame = PromptFrame(SESSION.tokenizer, chat)
    return suite.make(PromptWriter(SESSION.tokenizer, ENGLISH, frame, suite.seed(0, cell, 0)), cell)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_real_text_have_their_length_and_hold_their_answer(task: str, chat: bool) -> None:
    tokenizer, suite = SESSION.tokenizer, real_suites()[task]
    assert tokenizer is not None
    cells = suite.cells([2_000], SETTINGS)
    assert [cell["text"] for cell in cells] == list(KINDS)
    for cell in cells:
        made = example(suite, cell, chat)
        ids, (question,) = made.prompt("in")
        assert 1_500 < len(ids) <= 2_100
        text = tokenizer.decode(list(made.context))
        assert " ".join(question.answer.split()) in " ".join(text.split())
        ((first, end),) = made.spans
        assert question.answer.split()[0] in tokenizer.decode(list(made.context[first - 1 : end + 1]))
        assert question.is_right(list(question.answer_ids), tokenizer.decode(list(question.answer_ids)))
        begun = tokenizer.decode(list(made.questions[0].ids), False)
        assert chat or "\n" in begun.strip()


def test_suites_of_another_text_are_another_run() -> None:
    own = real_suites(OWN)
    assert own["copy"].content != real_suites()["copy"].content
    assert [cell["text"] for cell in own["copy"].cells([500, 600], SETTINGS)] == ["file", "file"]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture):
    def call(**flags: object) -> tuple[dict, str]:
        named = {
            "output_dir": tmp_path / "out", "threads": 1, "examples": 1, "keep": 0.5, "modes": "in",
            "policies": "chunkkv", "no_plots": True, **flags,
        }  # fmt: skip
        main(["eval", *engines.command_line(named)])
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        return summary["run"], capsys.readouterr().err

    return call


def test_a_text_of_ones_own_is_asked_in_the_chat_template(run, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(OWN.text, encoding="utf-8")
    flags = {
        "engine_dir": ENGINE,
        "text_file": file,
        "lengths": 1_500,
        "wording": "english",
    }
    ran, err = run(**flags)
    assert ran["suites"] == ["copy"] and ran["files"] == {"copy": real_suites(OWN)["copy"].content}
    assert ran["chat"] is True and "suite copy, question in: the full cache answers 0% of 1 prompts right" in err
    assert "--chat" not in err


def test_no_chat_leaves_the_template_out_and_the_warning_says_so(run, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(OWN.text, encoding="utf-8")
    ran, err = run(
        engine_dir=ENGINE,
        text_file=file,
        lengths=1_500,
        wording="english",
        suite="keeper",
        no_chat=True,
    )
    assert ran["chat"] is False and ran["suites"] == ["keeper"] and "needs its chat template (--chat)" in err


def test_the_shipped_model_keeps_its_own_wording_without_a_template(run) -> None:
    ran, err = run(engine_dir=needle_engine.engine_dir(), suite="recall", lengths=200)
    assert ran["chat"] is False and err == ""


def record(right: int, suite: str = "s") -> dict:
    outcomes = [{"policy": "full", "right": [right]}, {"policy": "chunkkv", "right": [0]}]
    return {"suite": suite, "mode": "in", "outcomes": outcomes}


def test_a_weak_full_cache_is_reported_once_as_soon_as_it_shows() -> None:
    check = FullCacheCheck(chat=True)
    said = [check.take(record(number % 2)) for number in range(2 * FEWEST)]
    assert [number for number, text in enumerate(said) if text] == [FEWEST - 1]
    assert "the full cache answers 50% of 10 prompts right" in str(said[FEWEST - 1]) and check.remaining() == []
    assert check.take(record(0, "few")) is None
    assert len(check.remaining()) == 1 and check.remaining() == []


def test_a_strong_full_cache_is_not_reported() -> None:
    check = FullCacheCheck(chat=False)
    assert not any(check.take(record(int(number % 10 < 7))) for number in range(30)) and not check.remaining()


def test_the_estimate_grows_with_prompts_and_rows() -> None:
    session = needle_engine.session()
    start = time.monotonic()
    one = estimate_seconds(session, [500], 4, 0.5)
    assert time.monotonic() - start < 20 and one > 0
    assert estimate_seconds(session, [500] * 100, 4, 0.5) > 10 * one
    assert estimate_seconds(session, [], 4, 0.5) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 seconds"), (61, "61 seconds"), (200, "3 minutes"), (5_000, "83 minutes"), (9_000, "2.5 hours")],
)
def test_durations_are_said_roughly(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_names_of_suites_do_not_clash() -> None:
    assert not set(make_suites(SETTINGS)) & set(real_suites()) and np.all([s.general for s in real_suites().values()])
