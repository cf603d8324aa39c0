"""chunkkv chat: a conversation in the terminal, or with questions from a pipe, one a line."""

from __future__ import annotations

import argparse
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from chunkkv.cli.options import (
    ENGINE_DIR,
    add_engine_flags,
    add_log_level,
    decode_text,
    open_session,
    path_argument,
    read_text_file,
)
from chunkkv.cli.progress import prefill_progress
from chunkkv.cli.sampling_flags import add_sampling_flags, sampling_params
from chunkkv.command_line import CommandParser, TextAction, interrupt_as_cancel, ratio
from chunkkv.errors import ChunkKVError, ConfigError, RequestError

if TYPE_CHECKING:
    from chunkkv.conversation import Conversation
    from chunkkv.executors.interface import PrefillProgress
    from chunkkv.sampling import SamplingParams

_HELP = """/keep RATIO  keep this share of the document, and of long turns; /keep alone says the share
/stats       counts and times of the last answer
/history     all questions and answers so far
/reset       forget them; the document stays
/exit        end, as Ctrl-D does
Ctrl-C stops an answer."""


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "chat",
        "Talk to an engine; a long document is compressed once and stays.",
        run,
        usage="chunkkv chat --engine_dir DIR [flags]",
        required=ENGINE_DIR,
    )
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--prompt_file", type=path_argument, metavar="FILE", help="a document that the questions are about, UTF-8 text"
    )
    group.add_argument("--system", action=TextAction, metavar="TEXT", help="a system message")
    group.add_argument(
        "--keep_ratio",
        type=ratio,
        metavar="R",
        help="share of the document that is kept, and of long turns, in (0, 1]; default: the engine's for the "
        "document, and turns stay whole",
    )
    add_engine_flags(parser, paged_kv_cache=True)
    add_sampling_flags(parser, max_new_tokens=512)
    add_log_level(parser.add_argument_group("output"))


def run(args: argparse.Namespace) -> None:
    """Talk until the input ends; raises ChunkKVError at once where questions come from a pipe."""
    document = None if args.prompt_file is None else read_text_file(args.prompt_file)
    sampling = sampling_params(args)
    session = open_session(args, args.max_tokens_in_paged_kv_cache)
    from chunkkv.conversation import Conversation

    conversation = Conversation(session, document, args.system, args.keep_ratio)
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    chat = Chat(conversation, sampling, on_terminal, args.log_level == "error")
    chat.greet()
    while (line := chat.next_line()) is not None:
        if not chat.take(line):
            break


class Chat:
    """Reads lines, obeys commands and prints answers as they come.

    Parameters
    ----------
    conversation : Conversation
        The conversation.
    sampling : SamplingParams
        How tokens are chosen.
    on_terminal : bool
        Whether a person types: then there is a prompt, and an error ends the turn only.
    quiet : bool
        Whether to print answers and errors alone.
    """

    def __init__(self, conversation: Conversation, sampling: SamplingParams, on_terminal: bool, quiet: bool) -> None:
        self._conversation, self._sampling = conversation, sampling
        self._on_terminal, self._quiet = on_terminal, quiet
        if on_terminal:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 - lets input() edit lines, with those before at the arrow keys

    def greet(self) -> None:
        """Compress the document, and say how the conversation goes."""
        if not self._conversation.has_template:
            self._note("The model has no chat template: your lines are added to a plain text, which it goes on with.")
        if not self._conversation.is_held:
            self._note("This engine cannot continue a context: every question prefills the whole conversation.")
        self._compress_document()
        if self._on_terminal:
            self._note("/help shows the commands, Ctrl-D ends.")

    def next_line(self) -> str | None:
        """Return the next line that is not empty, None at the end of the input."""
        while True:
            try:
                line = self._read()
            except EOFError:
                if self._on_terminal:
                    print()
                return None
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                print()  # the line that was being typed is dropped
                continue
            if line.strip():
                return line

    def _read(self) -> str:
        if self._on_terminal:
            return input("> ")
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_text(line, "standard input")

    def take(self, line: str) -> bool:
        """Obey or answer one line; return whether to go on."""
        try:
            if line.startswith("/"):
                return self._obey(line.split())
            self._answer(line)
        except ChunkKVError as error:
            if not self._on_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
        return True

    def _obey(self, words: list[str]) -> bool:
        command, conversation = words[0], self._conversation
        if command == "/exit":
            return False
        if command == "/keep" and len(words) <= 2:
            self._keep(words[1:])
        elif command == "/stats":
            print(self._stats())
        elif command == "/history":
            for question, answer in conversation.turns:
                print(f"> {question}\n{answer}")
        elif command == "/reset":
            conversation.reset()
        elif command == "/help":
            print(_HELP)
        else:
            raise RequestError(f"{' '.join(words)} is no command; /help shows them")
        sys.stdout.flush()
        return True

    def _keep(self, words: list[str]) -> None:
        if words:
            try:
                self._conversation.set_keep_ratio(float(words[0]))
            except ConfigError as error:
                raise RequestError(str(error)) from None
            except ValueError:
                raise RequestError(f"/keep {words[0]}: give a number in (0, 1], such as 0.2") from None
        ratio = self._conversation.keep_ratio
        print("keep_ratio: the engine's own" if ratio is None else f"keep_ratio: {ratio:g}")

    def _answer(self, line: str) -> None:
        try:
            self._compress_document()
            with interrupt_as_cancel() as cancel, prefill_progress(self._quiet) as on_prefill:
                self._print_answer(line, cancel, on_prefill)
        except KeyboardInterrupt:  # a second Ctrl-C, or one while a document is compressed
            if not self._on_terminal:
                raise
            print("\n[stopped]", file=sys.stderr)

    def _print_answer(self, line: str, cancel: threading.Event, on_prefill: PrefillProgress) -> None:
        finished = None
        for event in self._conversation.ask(line, self._sampling, cancel, on_prefill):
            sys.stdout.write(event.text)
            sys.stdout.flush()
            finished = event.finished or finished
        sys.stdout.write("\n")
        sys.stdout.flush()
        if finished is not None and finished.finish_reason == "cancelled":
            if not self._on_terminal:
                raise KeyboardInterrupt
            self._note("[stopped]")

    def _stats(self) -> str:
        last, context = self._conversation.last, self._conversation.context
        if last is None:
            return "no answer so far"
        statistics = last.statistics
        rate = "" if statistics.tpot_s is None else f", {statistics.tpot_s * 1e3:.1f} ms per token"
        held = "" if context is None else f"; {context.nbytes / 1e6:.1f} MB held for the next question"
        return (
            f"conversation {statistics.prompt_tokens} tokens, {statistics.kept_tokens} in the cache; "
            f"{statistics.prompt_tokens - statistics.context_tokens} prefilled for this answer; "
            f"{statistics.new_tokens} new; first after {statistics.ttft_s:.2f} s{rate}{held}"
        )

    def _compress_document(self) -> None:
        """Compress the document, unless that is done, and say what is left of it."""
        before = self._conversation.context
        with prefill_progress(self._quiet) as on_prefill:
            self._conversation.compress_document(on_prefill)
        context = self._conversation.context
        if before is None and context is not None:
            self._note(
                f"document: {len(context)} tokens, {context.kept_tokens} kept, {context.nbytes / 1e6:.1f} MB of cache"
            )

    def _note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)
