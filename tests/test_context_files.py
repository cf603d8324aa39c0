"""Saved contexts answer as before; files that were changed, cut off or made by another engine are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support import engines

from chunkkv import ChunkKVSession, Context, SamplingParams
from chunkkv.contexts.saved import KEY
from chunkkv.errors import RequestError

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "The door of the old house is green. " * 6}]


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return engines.session("llama3")


@pytest.fixture(scope="module")
def saved(session: ChunkKVSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "door.safetensors"
    session.compress(MESSAGES, keep_ratio=0.4).save(path)
    return path


def test_a_loaded_context_answers_as_the_one_that_was_saved(session: ChunkKVSession, saved: Path) -> None:
    context, loaded = session.compress(MESSAGES, keep_ratio=0.4), Context.load(saved, session)
    assert (loaded.slots, loaded.scorer, loaded.origin) == (context.slots, "window", context.origin)
    np.testing.assert_array_equal(loaded.token_ids, context.token_ids)
    for array, expected in zip(loaded.cache.keys, context.cache.keys, strict=True):
        np.testing.assert_array_equal(array, expected)
    question = "What colour is the door?"
    answers = [session.generate(question, GREEDY, context=each).token_ids for each in (context, loaded)]
    assert answers[0] == answers[1]
    assert loaded.created_at == pytest.approx(context.created_at, abs=60)
    again = saved.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_the_file_is_plain_safetensors_and_nothing_else_is_left(saved: Path) -> None:
    with safe_open(saved, "np") as file:
        values = json.loads(file.metadata()[KEY])
        assert file.get_tensor("key.0").shape == (2, values["slots"][0], 16)
        assert len(file.keys()) == 6
    assert values["format"] == "chunkkv-context"
    assert values["messages"] == MESSAGES
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_context_of_another_engine_is_refused(saved: Path) -> None:
    with pytest.raises(RequestError, match="another engine"):
        Context.load(saved, engines.session("llama3", chunkkv=False))


def test_a_session_without_a_directory_cannot_save(session: ChunkKVSession, tmp_path: Path) -> None:
    without = ChunkKVSession(session.executor, session.settings, session.limits)
    with pytest.raises(RequestError, match="engine directory"):
        without.compress([5, 6, 7]).save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def with_values(**changes: object) -> Callable[[bytes], bytes]:
    """Return what changes values of the JSON object and leaves everything else as it is."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        values = {**json.loads(header["__metadata__"][KEY]), **changes}
        header["__metadata__"][KEY] = json.dumps(values)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change


def with_tensor(**changes: object) -> Callable[[bytes], bytes]:
    """Return what changes the header's entry of key.0."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["key.0"].update(changes)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return change


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no saved context"),
    "cut in the length": (lambda data: data[:5], "no saved context"),
    "cut in the header": (lambda data: data[:100], "no saved context"),
    "cut in the tensors": (lambda data: data[:-1], "bytes of tensors"),
    "longer": (lambda data: data + b"x", "bytes of tensors"),
    "one bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256"),
    "a header of 2^60 bytes": (lambda data: (2**60).to_bytes(8, "little") + data[8:], "no saved context"),
    "no JSON": (lambda data: data[:8] + b"x" * (len(data) - 8), "no saved context"),
    "other metadata": (lambda data: data.replace(b"chunkkv_context", b"chunkkv_contexu"), "no saved context"),
    "another format": (with_values(format="x"), "format 'x'"),
    "another version": (with_values(format_version=2), "version 2"),
    "another digest": (with_values(engine_sha256="0" * 64), "another engine"),
    "no tokens": (with_values(token_ids=[]), "0 tokens"),
    "a token too large": (with_values(token_ids=[384]), "token_ids"),
    "tokens too many": (with_values(token_ids=[5] * 257), "257 tokens"),
    "slots of another length": (with_values(slots=[3]), "other tensors"),
    "no slots": (with_values(slots=[0]), "slots"),
    "two classes": (with_values(slots=[3, 3]), "2 lengths"),
    "messages": (with_values(messages=[5]), "messages"),
    "time": (with_values(created_at="now"), "created_at"),
    "an unknown value": (with_values(more=1), "other tensors"),
    "another type": (with_tensor(dtype="I32"), "other tensors"),
    "offsets beyond the file": (with_tensor(data_offsets=[0, 2**40]), "other tensors"),
    "negative offsets": (with_tensor(data_offsets=[-8, 0]), "other tensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(session: ChunkKVSession, saved: Path, tmp_path: Path, damage: str) -> None:
    change, words = DAMAGE[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(change(saved.read_bytes()))
    with pytest.raises(RequestError, match=words):
        Context.load(path, session)


def test_files_that_cannot_be_read_or_written(session: ChunkKVSession, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        Context.load(tmp_path / "missing.safetensors", session)
    with pytest.raises(RequestError, match="cannot be read"):
        Context.load(tmp_path, session)
    with pytest.raises(OSError, match="missing"):
        Context.load(saved, session).save(tmp_path / "missing" / "a.safetensors")
