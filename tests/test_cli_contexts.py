"""chunkkv compress and chunkkv generate --context: what is written, what answers, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import engines
from support.builds import CommandLine

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.cli.main import main

DOCUMENT = "The door of the old house is green. The key lies under a stone. " * 2
FLAGS = ("--max_new_tokens", "8", "--ignore_eos", "--threads", "1")


@pytest.fixture(scope="module")
def engine() -> Path:
    return engines.engine_dir("llama3")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys, main)


@pytest.mark.parametrize("chat", [False, True])
def test_a_document_is_compressed_once_and_asked_twice(run: CommandLine, engine: Path, tmp_path: Path, chat) -> None:
    prompt, file = tmp_path / "house.txt", tmp_path / "house.safetensors"
    prompt.write_text(DOCUMENT, encoding="utf-8")
    flags = ["--prompt_file", prompt, "--output", file, "--keep_ratio", "1.0", *(["--chat"] if chat else [])]
    done = run("compress", "--engine_dir", engine, *flags)
    assert (done.code, done.out) == (0, "")
    assert f"{file}: " in done.err and " kept, " in done.err
    session = ChunkKVSession.from_dir(engine, threads=1)
    for question in (" What colour is the door?", " Where is the key?"):
        answer = run("generate", "--engine_dir", engine, "--context", file, *FLAGS, question)
        whole = [{"role": "user", "content": DOCUMENT + "\n\n" + question}] if chat else DOCUMENT + question
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        assert answer.code == 0, answer.err
        assert answer.out == session.generate(whole, params, keep_ratio=1.0).text + "\n"


def test_json_says_what_was_written(run: CommandLine, engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.safetensors"
    ids = ",".join(map(str, range(5, 65)))
    done = run(
        "compress", "--engine_dir", engine, "--token_ids", ids, "--output", file, "--json", "--budget_tokens", 20
    )
    values = json.loads(done.out)
    bytes_per_token = ChunkKVSession.from_dir(engine, threads=1).executor.kv_bytes_per_token
    assert values == {
        "file": str(file),
        "tokens": 60,
        "kept_tokens": 20,
        "bytes": 20 * bytes_per_token,
        "scorer": "window",
    }
    answer = run("generate", "--engine_dir", engine, "--context", file, "--token_ids", "9", "--json", *FLAGS)
    statistics = json.loads(answer.out)["statistics"]
    assert [statistics[name] for name in ("prompt_tokens", "context_tokens", "kept_tokens")] == [61, 60, 21]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "--output", "OUT.bin", "text"], "OUT.bin does not end in .safetensors"),
        (["compress", "--output", "missing/OUT.safetensors", "text"], "cannot be written"),
        (["compress", "text"], "--output"),
        (
            ["compress", "--output", "OUT.safetensors", "--scorer", "nobody", "text"],
            "--scorer: 'nobody' is not offered",
        ),
        (["compress", "--output", "OUT.safetensors", "--chat", "--token_ids", "5"], "chat needs a prompt of text"),
        (["generate", "--context", "OUT.safetensors", "text"], "OUT.safetensors cannot be read"),
        (["generate", "--context", "OUT.safetensors", "--chat", "text"], "--chat has no effect with --context"),
        (["generate", "--context", "IDS", "--keep_ratio", "0.5", "text"], "give budget and scorer to compress()"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(
    run: CommandLine, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "IDS" in words:
        ChunkKVSession.from_dir(engine, threads=1).compress([5, 6, 7]).save("ids.safetensors")
        words = ["ids.safetensors" if word == "IDS" else word for word in words]
    before = list(tmp_path.iterdir())
    done = run(words[0], "--engine_dir", engine, *words[1:])
    assert (done.code, done.out) == (2, "") and len(done.err.splitlines()) == 1
    assert message in done.err
    assert list(tmp_path.iterdir()) == before
