"""chunkkv eval for real models: chat template, real text, the warning about a weak full cache, the estimate of time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import engines, needle_engine

from chunkkv.cli.main import main
from chunkkv.engine.recipe import write_recipe
from chunkkv.evaluation.evaluator import Evaluator, Plan
from chunkkv.evaluation.full_cache_check import FEWEST, FullCacheCheck
from chunkkv.evaluation.policies import parse_policies
from chunkkv.evaluation.records import RECORDS_FILE, read_records
from chunkkv.evaluation.run_time import READINGS, Work, duration, estimate_seconds
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter
from chunkkv.evaluation.texts.questions import Example
from chunkkv.evaluation.texts.real_suites import real_suites
from chunkkv.evaluation.texts.real_tasks import TASKS
from chunkkv.evaluation.texts.real_texts import KINDS, RealText
from chunkkv.evaluation.texts.suites import Suite
from chunkkv.evaluation.texts.templates import ENGLISH, NEEDLE
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession
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
        main(["eval", *engines.command_line({name: value for name, value in named.items() if value is not None})])
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
    work = Work(4, after=0.5)
    one = estimate_seconds(session, [500], work)
    assert time.monotonic() - start < 20 and one > 0
    assert estimate_seconds(session, [500] * 100, work) > 10 * one
    assert estimate_seconds(session, [500], Work(0, 40, 40 * READINGS, 0.5)) > 10 * one
    assert estimate_seconds(session, [], work) == 0


def uneven_plan(session: ChunkKVSession, policies: str) -> Plan:
    assert session.settings is not None
    listed = tuple(parse_policies(policies, session.settings))
    return Plan((), listed, (10_000, 3_000, 2_000), (100,), ("in", "after"), 1, 0, NEEDLE)


def test_rows_that_prefill_for_themselves_are_counted_so() -> None:
    """A context of an engine with head classes is read again; one prompt serves all policies of an even engine."""
    even, ranked = needle_engine.session(), needle_engine.session("--chunkkv_budget_split", "ranked")
    assert Evaluator(even, uneven_plan(even, "full,chunkkv,snapkv")).work() == Work(5, after=0.5)
    again = Evaluator(even, uneven_plan(even, "full,engine:scorer=reread")).work()
    assert again == Work(1, 2, 2 * READINGS, 0.5)
    assert Evaluator(ranked, uneven_plan(ranked, "full,engine")).work() == Work(0, 3, 1 + 2 * (1 + READINGS) / 2, 0.5)


@pytest.mark.parametrize("split", ["ranked", "classes"])
def test_an_engine_of_unequal_heads_is_measured_as_it_is_used(split: str, run, tmp_path: Path) -> None:
    """Asked afterwards it reads a prompt again, as contexts do; the full cache of it is whole."""
    flags = ["--chunkkv_budget_split", "ranked"]
    if split == "classes":
        heads = {"reading_heads": [[0], [], [1], []], "reading_share_per_10k": 30_000, "local_share_per_10k": 3_333}
        write_recipe(tmp_path / "r.json", {"budget_split": "classes", "local_policy": "chunks", **heads}, 4, {})
        flags = ["--chunkkv_recipe", str(tmp_path / "r.json")]
    folder = needle_engine.engine_dir(*flags)
    ran, err = run(engine_dir=folder, suite="recall", lengths=500, keep=0.2, policies=None, modes="after")
    assert [one["name"] for one in ran["policies"]] == ["full", "engine"] and "engine" not in err
    session = ChunkKVSession.from_dir(folder, threads=1)
    suite, tokenizer = make_suites(session.settings)["recall"], session.tokenizer
    frame, by_window = PromptFrame(tokenizer, False), []
    for record in read_records(tmp_path / "out" / RECORDS_FILE)[1:]:
        made = suite.make(PromptWriter(tokenizer, NEEDLE, frame, suite.seed(0, record["cell"], 0)), record["cell"])
        params = SamplingParams(max_new_tokens=made.questions[0].max_new_tokens)

        def answer(keep: float, scorer: str | None, made: Example = made, params: SamplingParams = params) -> str:
            context = session.compress(list(made.context), keep_ratio=keep, scorer=scorer)
            return session.generate([list(made.questions[0].ids)], params, context=context)[0].text

        given = [outcome["answers"][0] for outcome in record["outcomes"]]
        assert [
            text[: len(shown)] for text, shown in zip((answer(1.0, None), answer(0.2, None)), given, strict=True)
        ] == given
        by_window.append(answer(0.2, "window").startswith(given[1]))
    assert not all(by_window)  # else these prompts could not tell the scorers apart


def test_a_scorer_may_be_named_for_the_engines_own_choice(run) -> None:
    ran, _ = run(
        engine_dir=needle_engine.engine_dir(), suite="recall", lengths=300, keep=0.3, modes="after",
        policies="SnapKV,engine:scorer=reread,Streaming-LLM",
    )  # fmt: skip
    named = ["full", "snapkv", "engine:scorer=reread", "streaming_llm"]
    assert [one["name"] for one in ran["policies"]] == named


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"policies": "engine:scorer=x"}, ("scorer is 'x'", "window or reread")),
        ({"policies": "engine:window=8"}, ("'window=8' is no setting of engine", "scorer")),
        ({"policies": "snapkv:scorer=reread"}, ("'scorer=reread' is no setting of snapkv",)),
        ({"policies": "SnapKV,snapkv"}, ("snapkv twice",)),
        ({"output_dir": __file__}, ("output_dir", "is a file", "a directory")),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(run, capsys, flags: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        run(engine_dir=needle_engine.engine_dir(), suite="recall", lengths=300, **flags)
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 seconds"), (61, "61 seconds"), (200, "3 minutes"), (5_000, "83 minutes"), (9_000, "2.5 hours")],
)
def test_durations_are_said_roughly(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_names_of_suites_do_not_clash() -> None:
    assert not set(make_suites(SETTINGS)) & set(real_suites()) and np.all([s.general for s in real_suites().values()])


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A process of its own is interrupted after its first prompts."""
    folder = needle_engine.engine_dir()
    words = f"eval --engine_dir {folder} --suite needle --modes in --lengths 300 --examples 3 --keep 0.4 --threads 1"
    # A background process of a shell may ignore the signal, and so would what it starts.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom chunkkv.cli.main import main"
    )
    command = [sys.executable, "-c", f"{program}\nmain()", *words.split()]
    command += ["--policies", "chunkkv", "--no_plots", "--output_dir"]
    begun = subprocess.Popen([*command, tmp_path / "cut"], stderr=subprocess.PIPE, text=True)
    file, ends = tmp_path / "cut" / RECORDS_FILE, time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3) and time.monotonic() < ends:
        time.sleep(0.01)
    begun.send_signal(signal.SIGINT)
    err = begun.communicate(timeout=60)[1]
    measured = file.read_bytes().count(b"\n") - 1
    assert begun.returncode == 130 and "goes on from there" in err and "Traceback" not in err
    assert 2 <= measured < 15
    for name in ("cut", "whole"):
        done = subprocess.run([*command, tmp_path / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for name in (RECORDS_FILE, "summary.json", "summary.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
