"""chunkkv chat: questions from a pipe and from a terminal, commands, Ctrl-C and Ctrl-D; and Conversation below it."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import engines

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.cli.main import main
from chunkkv.conversation import Conversation
from chunkkv.errors import RequestError
from chunkkv.executors.interface import Capabilities

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
DOCUMENT = "The door of the old house is green. The key lies under a stone. " * 2
FLAGS = ("--max_new_tokens", "8", "--ignore_eos", "--threads", "1")
Run = Callable[..., tuple[int, str, str]]
# Makes the pseudo terminal that of the program, so that Ctrl-C reaches it.
ON_ITS_TERMINAL = """
import fcntl, signal, sys, termios
from chunkkv.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt: a shell that starts pytest in the background has it and its children ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make_engine(chunkkv: bool = True) -> Path:
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=2_048)
    return engines.engine_dir("llama3", chunkkv, checkpoint_dir=checkpoint, max_seq_len=1_024)


@pytest.fixture(scope="module")
def session() -> ChunkKVSession:
    return ChunkKVSession.from_dir(make_engine(), threads=1)


@pytest.fixture
def without_template(session: ChunkKVSession, monkeypatch: pytest.MonkeyPatch) -> ChunkKVSession:
    monkeypatch.setattr(session.tokenizer, "_template_text", None)
    return session


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "house.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with `lines` from a pipe; returns exit code, output and errors."""

    def call(*arguments: object, lines: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="ascii"))
        code = 0
        try:
            main(["chat", "--engine_dir", str(make_engine()), *FLAGS, *map(str, arguments)])
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def answered(conversation: Conversation, text: str) -> str:
    return "".join(event.text for event in conversation.ask(text, GREEDY))


def plain_answers(session: ChunkKVSession, questions: list[str], document: str | None) -> list[str]:
    """Return the answers where every question prefills the whole conversation."""
    messages: list[dict[str, str]] = []
    answers = []
    for question in questions:
        first = document is not None and not messages
        messages.append({"role": "user", "content": f"{document}\n\n{question}" if first else question})
        answers.append(session.generate(messages, GREEDY, keep_ratio=1.0).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("document", [None, DOCUMENT])
def test_a_conversation_that_keeps_everything_equals_prefilling_it_all_again(session, document: str | None) -> None:
    questions = ["What colour is the door?", "And the key?", "Where?"]
    conversation = Conversation(session, document, keep_ratio=1.0)
    assert [answered(conversation, question) for question in questions] == plain_answers(session, questions, document)
    assert [question for question, _ in conversation.turns] == questions


def test_each_turn_prefills_what_is_new(session) -> None:
    conversation = Conversation(session, DOCUMENT, keep_ratio=0.5)
    conversation.compress_document()
    held = conversation.context
    assert held is not None and held.kept_tokens == len(held) // 2
    for question in ("What colour is the door?", "And the key?"):
        before = conversation.context
        answered(conversation, question)
        assert conversation.last is not None and conversation.context is not None
        statistics = conversation.last.statistics
        assert statistics.context_tokens in (len(held), len(before))
        assert statistics.context_tokens >= len(held)
        assert len(conversation.context) == statistics.prompt_tokens + statistics.new_tokens - 1
    conversation.reset()
    assert conversation.turns == [] and conversation.context is held


def test_a_template_that_rewrites_answers_goes_on_from_the_document(session, monkeypatch: pytest.MonkeyPatch) -> None:
    shouting = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | upper if m.role == 'assistant' else m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(session.tokenizer, "_template", None)
    monkeypatch.setattr(session.tokenizer, "_template_text", (shouting, "chat_template.jinja"))
    questions = ["What colour is the door?", "And the key?", "Where?"]
    expected = plain_answers(session, questions, DOCUMENT)
    assert any(answer != answer.upper() for answer in expected[:2])
    conversation = Conversation(session, DOCUMENT, keep_ratio=1.0)
    conversation.compress_document()
    document = conversation.context
    assert document is not None
    for question, answer in zip(questions, expected, strict=True):
        assert answered(conversation, question) == answer
        assert conversation.last is not None
        assert conversation.last.statistics.context_tokens == len(document)
    monkeypatch.undo()


def test_a_long_turn_is_compressed_where_a_ratio_was_given(session) -> None:
    whole, less = (Conversation(session, DOCUMENT, keep_ratio=ratio) for ratio in (None, 0.25))
    for conversation in (whole, less):
        answered(conversation, "What colour is the door of the old house on the hill behind the village?")
    for conversation, ratio in ((whole, 0.4), (less, 0.25)):
        context, last = conversation.context, conversation.last
        assert context is not None and last is not None
        held = last.statistics.context_tokens
        turn = len(context) - held
        assert context.kept_tokens == held * ratio // 1 + (turn if conversation is whole else turn // 4)


def test_changing_the_ratio_compresses_the_document_again(session) -> None:
    conversation = Conversation(session, DOCUMENT)
    answered(conversation, "What colour is the door?")
    conversation.set_keep_ratio(0.25)
    assert conversation.context is None
    answered(conversation, "And the key?")
    assert conversation.last is not None
    statistics = conversation.last.statistics
    document = session.compress([{"role": "user", "content": DOCUMENT}], keep_ratio=0.25)
    assert statistics.context_tokens == len(document)
    assert statistics.kept_tokens == document.kept_tokens + statistics.prompt_tokens - len(document)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="keep_ratio"):
            conversation.set_keep_ratio(wrong)
    assert conversation.keep_ratio == 0.25


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(session) -> None:
    conversation = Conversation(session, DOCUMENT)
    answered(conversation, "What colour is the door?")
    held = conversation.context
    with pytest.raises(RequestError, match="begin a new one"):
        answered(conversation, "word " * 1_000)
    with pytest.raises(RequestError, match="empty"):
        answered(conversation, " ")
    assert len(conversation.turns) == 1 and conversation.context is held
    assert answered(conversation, "And the key?")


def test_the_last_answer_takes_the_room_that_is_left(session) -> None:
    conversation = Conversation(session)
    params = SamplingParams(max_new_tokens=5_000, ignore_eos=True)
    list(conversation.ask("Hello", params))
    assert conversation.last is not None
    statistics = conversation.last.statistics
    assert statistics.prompt_tokens + statistics.new_tokens == 1_024


def test_an_engine_that_cannot_continue_prefills_everything(session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(session.executor), "capabilities", Capabilities(True, False, False, False))
    questions = ["What colour is the door?", "And the key?"]
    conversation = Conversation(session, DOCUMENT, keep_ratio=1.0)
    conversation.compress_document()
    assert not conversation.is_held and conversation.context is None
    assert [answered(conversation, question) for question in questions] == plain_answers(session, questions, DOCUMENT)
    assert conversation.last is not None and conversation.last.statistics.context_tokens == 0


@pytest.mark.parametrize("document", [None, DOCUMENT])
def test_without_a_template_lines_are_added_to_a_text(without_template, document: str | None) -> None:
    session = without_template
    conversation = Conversation(session, document, keep_ratio=1.0)
    assert not conversation.has_template
    ids: list[int] = []
    for question in ("What colour is the door?", "And the key?"):
        behind = question if not ids and document is None else "\n" + question
        ids = ids or ([] if document is None else session.tokenizer.encode_prompt(document))
        ids += session.tokenizer.encode(behind, False) if ids else session.tokenizer.encode_prompt(behind)
        expected = session.generate(ids, GREEDY, keep_ratio=1.0)
        assert answered(conversation, question) == expected.text
        ids += expected.token_ids
    assert conversation.last is not None and conversation.last.statistics.context_tokens > 0
    with pytest.raises(RequestError, match="chat template"):
        Conversation(session, system="Be kind.")


def test_what_a_conversation_needs(session) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Conversation(ChunkKVSession(session.executor, session.settings, session.limits))
    with pytest.raises(RequestError, match="without ChunkKV"):
        Conversation(ChunkKVSession.from_dir(make_engine(chunkkv=False)), keep_ratio=0.5)


def test_questions_from_a_pipe_get_one_answer_each(run: Run, session, document: Path) -> None:
    lines = "What colour is the door?\n\n/keep\nAnd the key?\n/history\n"
    code, out, err = run("--prompt_file", document, "--keep_ratio", "1.0", lines=lines)
    answers = plain_answers(session, ["What colour is the door?", "And the key?"], DOCUMENT.rstrip("\n"))
    history = f"> What colour is the door?\n{answers[0]}\n> And the key?\n{answers[1]}\n"
    assert (code, out) == (0, f"{answers[0]}\nkeep_ratio: 1\n{answers[1]}\n{history}")
    assert re.search(r"^document: \d+ tokens, \d+ kept, [\d.]+ MB of cache$", err, re.MULTILINE)
    assert "> " not in err


def test_commands_from_a_pipe(run: Run, document: Path) -> None:
    lines = "/stats\n/help\n/keep 0.25\n/keep\nWhat?\n/stats\n/reset\n/history\n/exit\nnever\n"
    code, out, _ = run("--prompt_file", document, "--log_level", "error", lines=lines)
    assert code == 0
    assert out.startswith("no answer so far\n/keep RATIO")
    assert out.count("keep_ratio: 0.25\n") == 2
    assert re.search(
        r"conversation \d+ tokens, \d+ in the cache; \d+ prefilled for this answer; 8 new; first after [\d.]+ s, "
        r"[\d.]+ ms per token; [\d.]+ MB held for the next question\n$",
        out,
    )


@pytest.mark.parametrize(
    ("arguments", "lines", "words"),
    [
        ((), "/nothing\n", "/nothing is no command"),
        ((), "/keep much\n", "/keep much: give a number"),
        ((), "/keep 2\n", "allowed is (0, 1]"),
        ((), "/keep 0.1 0.2\n", "/help"),
        ((), "word " * 1_100 + "\n", "begin a new one"),
        (("--prompt_file", "/nowhere"), "", "--prompt_file /nowhere cannot be read"),
        (("--keep_ratio", "0"), "", "keep_ratio"),
    ],
)
def test_errors_end_a_piped_conversation_in_one_line(run: Run, arguments, lines: str, words: str) -> None:
    code, _, err = run(*arguments, "--log_level", "error", lines=lines)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("chunkkv: error: ") and words in err


def test_an_empty_pipe_is_no_error(run: Run) -> None:
    assert run("--log_level", "error", lines="") == (0, "", "")


class Terminal:
    """The command on a pseudo terminal."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._here, there = os.openpty()
        words = [
            sys.executable,
            "-c",
            ON_ITS_TERMINAL,
            "chat",
            "--engine_dir",
            make_engine(),
            "--threads",
            1,
            *arguments,
        ]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200", **environment},
        )
        os.close(there)
        self.shown = ""

    def type_until(self, keys: str, pattern: str) -> None:
        """Type `keys`, again each second, until `pattern` comes: input() may miss a signal while it takes a key."""
        for _ in range(60):
            self.type(keys)
            with suppress(AssertionError):
                self.wait_for(pattern, 1)
                return
        raise AssertionError(f"{pattern} did not come behind {self.shown!r}")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until what was not matched before has `pattern`; return it up to there."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._here], [], [], max(end - time.monotonic(), 0))
            assert ready, f"nothing more comes behind {self.shown!r}"
            try:
                piece = os.read(self._here, 65_536)
            except OSError:  # how Linux says that the other side has closed
                piece = b""
            assert piece, self.shown
            self.shown += piece.decode(errors="replace")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._here)


def test_a_terminal_conversation_survives_errors_and_ctrl_c(document: Path) -> None:
    """Without bars and notes, which would stand between the question and the first word of the answer."""
    flags = ("--threads", 1, "--ignore_eos", "--max_new_tokens", 900, "--log_level", "error")
    terminal = Terminal(*flags, "--prompt_file", document)
    terminal.wait_for(r"> ")
    terminal.type("/nothing\n")
    terminal.wait_for(r"error: /nothing is no command")
    terminal.wait_for(r"> ")
    terminal.type("half a question")
    terminal.wait_for(r"half a question")
    terminal.type_until("\x03", r"> $")
    terminal.type("What colour is the door?\n")
    terminal.wait_for(r"door\?\r\n.")
    terminal.type("\x03")
    terminal.wait_for(r"> $")
    terminal.type("/stats\n")
    new = re.search(r"; (\d+) new;", terminal.wait_for(r"held for the next question"))
    assert new is not None and 0 < int(new.group(1)) < 900
    terminal.wait_for(r"> ")
    terminal.type("\x04")
    assert terminal.close() == 0
