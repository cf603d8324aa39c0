"""Whole runs: resumed after an interruption, tables, intervals, pictures, and chunkkv eval's errors."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import engines, needle_engine
from support.messages import naming

from chunkkv.cli.main import main
from chunkkv.errors import BackendUnavailableError, ConfigError, EngineMismatchError, RequestError
from chunkkv.evaluation.evaluator import Evaluator, Plan
from chunkkv.evaluation.policies import parse_policies
from chunkkv.evaluation.records import RECORDS_FILE, read_records
from chunkkv.evaluation.report import figures, plots
from chunkkv.evaluation.report.summary import summarize, table, write_results
from chunkkv.evaluation.runner import PromptRunner
from chunkkv.evaluation.statistics import jaccard, paired_difference, wilson
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.questions import Question
from chunkkv.evaluation.texts.templates import ENGLISH, NEEDLE

SESSION = needle_engine.session()
SETTINGS = SESSION.settings
assert SETTINGS is not None
SUITES = make_suites(SETTINGS)
POLICIES = "full,chunkkv,snapkv,pyramidkv"


def plan(**changes: object) -> Plan:
    values = {
        "suites": (SUITES["needle"], SUITES["questions"]),
        "policies": tuple(parse_policies(POLICIES, SETTINGS)),
        "keeps": (10_000, 3_000),
        "lengths": (200,),
        "modes": ("in", "after"),
        "examples": 2,
        "seed": 0,
        "wording": NEEDLE,
        "engine": "the engine",
    }
    return Plan(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, Evaluator(SESSION, plan()).run(folder)


def test_a_run_has_every_example_with_every_policy_at_equal_kept_tokens(finished: tuple[Path, list[dict]]) -> None:
    folder, records = finished
    assert len(records) == (5 + 2) * 2 * 2
    assert read_records(folder / RECORDS_FILE)[1:] == records
    for record in records:
        named = [(outcome["policy"], outcome["keep"]) for outcome in record["outcomes"]]
        assert named == [("full", 10_000), ("chunkkv", 3_000), ("snapkv", 3_000), ("pyramidkv", 3_000)]
        full, *others = (outcome["kept"] for outcome in record["outcomes"])
        assert full == record["tokens"] and set(others) == {SETTINGS.kept_tokens(full, 3_000)}
        assert all(len(outcome["right"]) == len(record["pieces"]) for outcome in record["outcomes"])


def test_the_full_cache_answers_and_compression_costs(finished: tuple[Path, list[dict]]) -> None:
    rows = {
        (row["mode"], row["policy"]): row
        for row in summarize(plan().header(SETTINGS), finished[1])["suites"]
        if row["suite"] == "needle"
    }
    for mode in ("in", "after"):
        assert rows[mode, "full"]["accuracy"] >= 0.9
        assert rows[mode, "snapkv"]["accuracy"] < rows[mode, "full"]["accuracy"]
        assert rows[mode, "chunkkv"]["full_accuracy"] == rows[mode, "full"]["accuracy"]
    assert rows["in", "chunkkv"]["through"][0] == 1.0  # the first token comes from the full prefill


@pytest.mark.parametrize("cut", ["after a line", "within a line", "before the first line ended"])
def test_an_interrupted_run_goes_on_to_the_same_file(
    finished: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    whole = (finished[0] / RECORDS_FILE).read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {"after a line": b"".join(lines[:9]), "within a line": b"".join(lines[:9]) + lines[9][:50]}.get(
        cut, lines[0][:9]
    )
    (tmp_path / RECORDS_FILE).write_bytes(kept)
    ran, told = [], []
    prefill = PromptRunner.prefill
    monkeypatch.setattr(
        PromptRunner, "prefill", lambda self, *given, **named: ran.append(1) or prefill(self, *given, **named)
    )
    Evaluator(SESSION, plan()).run(tmp_path, told.append)
    assert (tmp_path / RECORDS_FILE).read_bytes() == whole
    assert sum(told) == len(finished[1]) == len(ran) + (8 if "a line" in cut else 0)


def test_a_finished_run_runs_nothing_again(finished: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptRunner, "prefill", None)
    assert Evaluator(SESSION, plan()).run(finished[0]) == finished[1]


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 1}, "seed"), ({"keeps": (2_000,)}, "keeps"), ({"engine": "another"}, "engine")],
)
def test_results_of_another_run_are_not_mixed_in(finished: tuple[Path, list[dict]], change: dict, field: str) -> None:
    before = (finished[0] / RECORDS_FILE).read_bytes()
    with pytest.raises(ConfigError, match=naming(finished[0], field)):
        Evaluator(SESSION, plan(**change)).run(finished[0])
    assert (finished[0] / RECORDS_FILE).read_bytes() == before


def test_a_run_that_never_began_stands_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / RECORDS_FILE).write_text(json.dumps(plan(seed=7).header(SETTINGS)) + "\n")
    Evaluator(SESSION, plan(suites=(SUITES["arithmetic"],), examples=1)).run(tmp_path)
    assert read_records(tmp_path / RECORDS_FILE)[0]["seed"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (200, 9000)}, "lengths 9000 4096"),
        (
            {"policies": tuple(parse_policies("chunkkv:window=33", SETTINGS))},
            "window 33 32",
        ),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_before_any_work(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=naming(message)):
        Evaluator(SESSION, plan(**change))


@pytest.mark.parametrize(
    "change", [{"outcomes": 5}, {"outcomes": [{}]}, {"pieces": []}, {"pieces": [6, 6, 6]}, {"tokens": None}]
)
def test_a_damaged_record_is_named(finished: tuple[Path, list[dict]], change: dict, tmp_path: Path) -> None:
    lines = (finished[0] / RECORDS_FILE).read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    (tmp_path / RECORDS_FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=naming("3")):
        Evaluator(SESSION, plan()).run(tmp_path)


def test_a_line_that_is_half_written_is_named_with_what_to_do(
    finished: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    lines = (finished[0] / RECORDS_FILE).read_text().splitlines()
    (tmp_path / RECORDS_FILE).write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]) + "\n")
    with pytest.raises(ConfigError, match=naming("line 3", "remove this line and those below it")):
        Evaluator(SESSION, plan()).run(tmp_path)
    (tmp_path / RECORDS_FILE).write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    with pytest.raises(ConfigError, match=naming("line 3", "remove this line and those below it")):
        Evaluator(SESSION, plan()).run(tmp_path)


def test_random_chunks_follow_the_seed(tmp_path: Path) -> None:
    random = tuple(parse_policies("random", SETTINGS))
    found = []
    for seed in (0, 1):
        once = plan(suites=(SUITES["needle"],), policies=random, keeps=(3_000,), seed=seed, modes=("in",), examples=1)
        records = Evaluator(SESSION, once).run(tmp_path / f"{seed}")
        found.append([record["outcomes"][0]["jaccard"] for record in records])
    assert found[0] != found[1]


def test_what_does_not_fit_behind_a_prompt_is_refused() -> None:
    runner = PromptRunner(SESSION)
    prompt = runner.prefill(np.arange(1, 50))
    question = Question((), "", (1,), SESSION.limits.max_seq_len)
    with pytest.raises(RequestError, match=naming("prompt 49 tokens")):
        runner.answer(prompt, [[np.arange(49)] * prompt.num_layers], [question])


@pytest.mark.parametrize("content", [b"[1]\n", b'{"format": "x"}\n', b"nonsense\n", b"\xff\n"])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORDS_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=naming("records.jsonl")):
        Evaluator(SESSION, plan()).run(tmp_path)
    assert (tmp_path / RECORDS_FILE).read_bytes() == content


def test_engines_whose_caches_cannot_be_seen_run_their_own_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(plan(), policies=tuple(parse_policies("full,engine", SETTINGS)), suites=(SUITES["questions"],))
    seen = Evaluator(SESSION, own).run(tmp_path / "seen")
    monkeypatch.setattr(PromptRunner, "sees_caches", lambda self: False)
    unseen = Evaluator(SESSION, own).run(tmp_path / "unseen")
    for record in seen:
        for outcome in record["outcomes"]:
            outcome.pop("useful"), outcome.pop("jaccard", None)
    assert seen == unseen
    with pytest.raises(ConfigError, match=naming("policies chunkkv prefill")):
        Evaluator(SESSION, plan())


def test_engines_without_chunkkv_or_a_tokenizer_are_refused() -> None:
    with pytest.raises(EngineMismatchError, match=naming("without ChunkKV")):
        Evaluator(engines.session("llama3", chunkkv=False), plan())
    with pytest.raises(ConfigError, match=naming("count 'needle'")):
        Evaluator(SESSION, plan(suites=(SUITES["count"],)))


def test_another_model_and_wording_run_through(tmp_path: Path) -> None:
    """A tiny random model answers nothing, but every suite's prompts, modes and scorings run on its tokenizer."""
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=4096)
    session = engines.session("llama3", checkpoint_dir=checkpoint, max_seq_len=4096, max_num_tokens=512)
    settings = session.settings
    assert settings is not None
    policies = tuple(parse_policies("full,chunkkv-delimiter,streaming_llm", settings))
    run = plan(policies=policies, wording=ENGLISH, lengths=(2000,), examples=1, chat=True, modes=("in",))
    run = replace(run, suites=tuple(make_suites(settings)[name] for name in ("count", "rule", "arithmetic")))
    records = Evaluator(session, run).run(tmp_path)
    assert {record["suite"] for record in records} == {"count", "rule", "arithmetic"}


def test_tables_are_written(finished: tuple[Path, list[dict]], tmp_path: Path) -> None:
    summary = summarize(plan().header(SETTINGS), finished[1])
    files = write_results(tmp_path, summary)
    assert (
        [path.name for path in files]
        == ["summary.json", "summary.csv"]
        == sorted(p.name for p in tmp_path.iterdir())[::-1]
    )
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(summary))
    rows = list(csv.DictReader(io.StringIO(table(summary))))
    assert len(rows) == len(summary["cells"]) == 7 * 2 * 4
    row = next(row for row in rows if row["suite"] == "needle" and row["policy"] == "snapkv")
    assert row["cell"] == "length=200 depth=0.0" and row["n"] == "2" and float(row["low"]) <= float(row["accuracy"])
    assert float(row["against_full"]) == pytest.approx(float(row["accuracy"]) - float(row["full_accuracy"]))


def test_numbers_of_a_summary_follow_from_the_records() -> None:
    def outcome(policy: str, keep: int, right: list[int], through: list[int]) -> dict:
        values = {"policy": policy, "keep": keep, "kept": 5, "right": right, "through": through, "useful": 0.5}
        return {**values, "jaccard": [[1.0, 0.25], [0.25, 1.0]]} if keep < 10_000 else values

    records = [
        {
            "suite": "s", "mode": "in", "cell": {"length": 9}, "index": index, "tokens": 10, "pieces": [2, 2],
            "outcomes": [outcome("full", 10_000, [1, 1], [2, 2]), outcome("a", 2_000, [1, index], [2, 1 + index]),
                         outcome("b", 2_000, [0, 0], [0, 1])],
        }
        for index in (0, 1)
    ]  # fmt: skip
    summary = summarize({"policies": [{"name": "full"}, {"name": "a"}, {"name": "b"}]}, records)
    row = next(row for row in summary["suites"] if row["policy"] == "a")
    assert (row["n"], row["accuracy"], row["kept"], row["tokens"], row["keep_ratio"]) == (2, 0.75, 5.0, 10.0, 0.2)
    assert (row["low"], row["high"]) == tuple(round(bound, 4) for bound in wilson(1.5, 2))
    assert row["through"] == [1.0, 0.75] and row["full_accuracy"] == 1.0 and row["against_full"][0] == -0.25
    (difference,) = summary["differences"]
    assert (difference["policy"], difference["minus"], difference["difference"]) == ("b", "a", -0.75)
    assert summary["agreement"][0]["jaccard"] == [[1.0, 0.25], [0.25, 1.0]] and summary["agreement"][0]["n"] == 2


def test_wilson_intervals_are_the_published_ones() -> None:
    assert [round(bound, 4) for bound in wilson(0, 10)] == [0.0, 0.2775]
    assert [round(bound, 4) for bound in wilson(81, 263)] == [0.2553, 0.3662]
    assert wilson(10, 10)[1] == 1.0


def test_paired_differences_cover_what_they_should() -> None:
    mean, low, high = paired_difference([0.0] * 50)
    assert mean == 0 and -0.06 < low < 0 < high < 0.06
    mean, low, high = paired_difference([1.0] * 30 + [0.0] * 60 + [-1.0] * 10)
    centre, spread = 20 / 102, 1.96 * math.sqrt(41 - 400 / 102) / 102
    assert mean == 0.2 and low == pytest.approx(centre - spread) and high == pytest.approx(centre + spread)


def test_jaccard_counts_only_ranked_tokens() -> None:
    kept = [np.array([0, 1, 4, 5, 9]), np.array([0, 1, 5, 6, 9]), np.array([0, 1, 9])]
    assert jaccard(kept, 2, 9).tolist() == [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]
    assert jaccard(kept[:1], 9, 9).tolist() == [[1]]


def test_pictures_are_drawn(finished: tuple[Path, list[dict]], tmp_path: Path) -> None:
    files = plots.draw_all(tmp_path, summarize(plan().header(SETTINGS), finished[1]))
    names = ["accuracy.png", "positions.png", "layers.png", "needle-in.png", "needle-after.png"]
    assert [path.name for path in files] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match=naming("'chunkkv-trt[eval]' --no_plots")):
        figures.check_matplotlib()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture, tmp_path: Path) -> Run:
    """Run chunkkv eval on one short suite; returns exit code, output and errors."""

    def call(**flags: object) -> tuple[int, str, str]:
        small = {"suite": "questions", "lengths": 200, "examples": 1, "keep": "1.0,0.4", "policies": "chunkkv,snapkv"}
        named = {
            "engine_dir": needle_engine.engine_dir(),
            "output_dir": tmp_path / "out",
            "threads": 1,
            **small,
            **flags,
        }
        code = 0
        try:
            main(["eval", *engines.command_line(named)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_the_command_writes_records_tables_and_pictures(run: Run, tmp_path: Path) -> None:
    code, out, err = run()
    assert code == 0 and all(line.startswith(("chunkkv: warning: suite", "eval: ")) for line in err.splitlines())
    files = ["accuracy.png", "layers.png", "positions.png", "records.jsonl", "summary.csv", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert "questions, question after" in out and "chunkkv" in out and "full" in out and "77 tokens" in out
    again = run(no_plots=True, log_level="error")
    assert again == (0, "", "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["run"]["wording"] == "needle" and summary["run"]["suites"] == ["questions"]
    assert {row["policy"] for row in summary["suites"]} == {"full", "chunkkv", "snapkv"}


def test_a_file_of_examples_runs_from_the_command(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    question = "question: what is the access code of the amber kettle? answer:"
    line = {"context": "the access code of the amber kettle is 53912.\\n", "question": question, "answer": "53912"}
    path.write_text(json.dumps(line) + "\n")
    code, out, err = run(suite=f"file:{path}", no_plots=True)
    assert (code, err) == (0, "") and "mine, question in" in out and "100.0" in out


def test_a_file_that_changed_is_another_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    for answer, code in (("53912", 0), ("53913", 2)):
        path.write_text(json.dumps({"context": "the code is 53912.", "question": "code?", "answer": answer}) + "\n")
        found, _, err = run(suite=f"file:{path}", no_plots=True)
        assert found == code
    assert "holds the results of another run, with other files" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"suite": "all,questions"}, "suite is 'all,questions', where questions comes twice"),
        ({"suite": "needel"}, "suite is 'needel'; there are all, needle, recall"),
        ({"suite": "needle,,"}, "suite is 'needle,,'; give different values"),
        ({"suite": "file:/nowhere.jsonl"}, "/nowhere.jsonl cannot be read"),
        ({"suite": "count"}, "suite count has no wording 'needle'"),
        ({"keep": "0"}, "keep is 0.0; allowed is (0, 1]"),
        ({"keep": "20%"}, "keep has '20%'; give shares in (0, 1]"),
        ({"policies": "best"}, "policies names 'best'; there are full, engine"),
        ({"policies": "chunkkv:window=64"}, "window is 64, the engine gives the last 32 queries"),
        ({"lengths": "9"}, "length is 9"),
        ({"lengths": "many"}, "lengths has 'many'; give whole numbers"),
        ({"lengths": "9000"}, "this engine takes prompts of at most 4096 tokens"),
        ({"modes": "before"}, "modes has 'before'; allowed is in or after"),
        ({"examples": 0}, "--examples is 0; give a whole number of at least 1"),
        ({"seed": -1}, "--seed is -1; give a whole number of at least 0"),
        ({"wording": "french"}, "wording is 'french'; allowed is auto or needle or english"),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(run: Run, flags: dict, message: str, tmp_path: Path) -> None:
    code, out, err = run(**flags)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / RECORDS_FILE).read_text().count("\n") == 1
