"""What every command line of this project shares: a parser with one-line errors, and how a program ends.

The standard library is all it needs, so that a machine where a dependency is missing gets a readable error, too.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from chunkkv.errors import ChunkKVError, ConfigError

# Exit codes; from 128 on they are 128 + the number of the signal, as a shell reports it.
FAILED, BAD_USAGE, HUNG_UP, INTERRUPTED, CLOSED_PIPE, TERMINATED = 1, 2, 129, 130, 141, 143
LOG_LEVELS = ("error", "warning", "info", "verbose", "debug")
_TRACEBACK_LEVELS = ("verbose", "debug")
# Flags that delete files: whoever misspelt one has to spell it out, no hint offers it.
_DESTRUCTIVE_FLAGS = ("--overwrite",)
Command = Callable[[argparse.Namespace], None]  # what a command does with its flags
_LARGEST_NUMBER = 2**63 - 1  # the 64 bits of sizes and seeds; most settings have a lower limit of their own
_MOST_DIGITS = len(str(_LARGEST_NUMBER))
_LONGEST_SHOWN = 40  # characters of a number that an error repeats
_CHOICE_CUTOFF = 0.6  # as the next one; choices are shorter than flags
_SUGGESTION_CUTOFF = 0.5  # of difflib: 0 suggests anything, 1 only the same name


class UsageError(ConfigError):
    """The command line asks for something that is not offered."""


class TextAction(argparse.Action):
    """Stores the next word whatever it is, as in `--server_arg --log-verbose=1`; argparse would take it for a flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the word; argparse calls this wherever the flag stands."""
        # Before Python 3.13 argparse drops a value that is two hyphens and hands over an empty list.
        self.store(namespace, values if isinstance(values, str) else "--")

    def store(self, namespace: argparse.Namespace, text: str) -> None:
        """Keep the text as the flag's value."""
        setattr(namespace, self.dest, text)


class TextListAction(TextAction):
    """Collects the texts of a flag that may be repeated in a tuple; otherwise as TextAction."""

    def store(self, namespace: argparse.Namespace, text: str) -> None:
        """Append the text to the flag's values."""
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), text))


class CommandParser(argparse.ArgumentParser):
    """A parser that raises UsageError, takes --engine-dir for --engine_dir, and suggests names for misspelt flags.

    Parameters
    ----------
    required : Mapping[str, str], optional
        Destinations of the flags that must be given, each with what to give: "the directory of a checkpoint". Unlike
        argparse's own `required`, a misspelt flag is reported before a missing one: usually they are the same.
    passes_unknown_flags : bool, default False
        Return unknown words from parse_known_args instead of refusing them.
    passes_all : bool, default False
        Read nothing; every word, --help too, lands in the namespace's `passed_on`.
    **settings
        Those of argparse.ArgumentParser.
    """

    def __init__(
        self,
        *,
        required: Mapping[str, str] | None = None,
        passes_unknown_flags: bool = False,
        passes_all: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._required = required or {}
        self._passes_unknown_flags, self._passes_all = passes_unknown_flags, passes_all
        self._commands: argparse._SubParsersAction[CommandParser] | None = None

    def add_command(
        self, name: str, summary: str, run: Command | None = None, aliases: Sequence[str] = (), **settings: Any
    ) -> CommandParser:
        """Add a command and return its parser.

        Parameters
        ----------
        name : str
            The word that chooses it.
        summary : str
            One sentence on what it does, for its own help and for the list of commands.
        run : Command, optional
            Called with the parsed flags; the namespace holds it as `run_command`. Default: it has commands of its own.
        aliases : Sequence[str], default ()
            Other words for it.
        **settings
            Those of CommandParser.
        """
        if self._commands is None:
            self._commands = self.add_subparsers(title="commands", metavar="COMMAND", prog=self.prog)
        parser = self._commands.add_parser(name, help=summary, description=summary, aliases=aliases, **settings)
        parser.set_defaults(run_command=run)
        return parser

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message or "", end="", file=file or sys.stderr)  # argparse's own passes over a full disk

    def _can_run(self) -> bool:
        return self.get_default("run_command") is not None

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for what argparse found wrong, in the words of this project's other errors."""
        message = re.sub(r"^argument ([-\w/]+): ", r"\1: ", message)
        message = message.replace("not allowed with argument", "give either this or")
        message = re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", _not_offered, message, flags=re.DOTALL)
        names = r"^the following arguments are required: (.*)$"
        raise UsageError(re.sub(names, r"\1 is missing; --help lists what there is", message))

    def parse_known_args(  # type: ignore[override]  # argparse's overloads for namespaces of other types are not used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; raises UsageError for an unknown word, unless the parser passes them on."""
        words = list(sys.argv[1:] if args is None else args)
        if self._passes_all:
            flags = super().parse_known_args([], namespace)[0]
            flags.passed_on = words
            return flags, []
        if not words and self._commands is not None and not self._can_run():
            self.print_help(sys.stderr)
            self.exit(BAD_USAGE)
        flags, unknown = super().parse_known_args(self._normalized(words), namespace)
        if unknown and not self._passes_unknown_flags:
            raise UsageError(self.unknown(unknown[0]))
        if self._commands is not None and getattr(flags, "run_command", None) is None:
            raise UsageError("COMMAND is missing; --help lists what there is")
        for name, content in self._required.items():
            if getattr(flags, name) is None:
                raise UsageError(f"--{name} is missing; give {content}")
        return flags, unknown

    def unknown(self, word: str) -> str:
        """Return what is wrong with a word that belongs to no flag and no argument, and what may have been meant."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"{word!r} is one argument too many; put a text of several words into quotes"
        comparable = {flag.replace("-", "_"): flag for flag in self._options() if flag.startswith("--")}
        close = difflib.get_close_matches(name.replace("-", "_"), comparable, 1, _SUGGESTION_CUTOFF)
        suggestion = comparable[close[0]] if close else None
        if suggestion is None or suggestion in _DESTRUCTIVE_FLAGS:
            return f"unknown flag {name}; see --help for those there are"
        return f"unknown flag {name}; did you mean {suggestion}?"

    def _options(self) -> dict[str, argparse.Action]:
        return {flag: action for action in self._actions for flag in action.option_strings}

    def _normalized(self, words: Sequence[str]) -> list[str]:
        """Return --max-seq-len=9 as --max_seq_len=9, and a text with its flag as one word; unknown words stay."""
        options = self._options()
        normalized: list[str] = []
        remaining = iter(words)
        for word in remaining:
            if word == "--":  # everything after it is an argument
                return [*normalized, word, *remaining]
            name, equals, value = word.partition("=")
            flag = "--" + name[2:].replace("-", "_")
            if not name.startswith("--") or flag not in options:
                normalized.append(word)
            elif isinstance(options[flag], TextAction) and not equals:
                text = next(remaining, None)
                normalized.append(flag if text is None else f"{flag}={text}")
            else:
                normalized.append(flag + equals + value)
        return normalized


def _not_offered(match: re.Match[str]) -> str:
    choices = [choice.strip("'\"") for choice in match[2].split(", ")]
    close = difflib.get_close_matches(match[1].strip("'\""), choices, 1, _CHOICE_CUTOFF)
    suggestion = f"; did you mean {close[0]}?" if close else ""
    return f"{match[1]} is not offered; allowed is {' or '.join(choices)}{suggestion}"


def whole_number(text: str) -> int:
    """Return the whole number that a flag's text spells; for `type=` of argparse."""
    if not re.fullmatch(r"\s*[+-]?\d+\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 4096")
    digits = text.strip().lstrip("+-").lstrip("0")
    if len(digits) > _MOST_DIGITS or int(digits or "0") > _LARGEST_NUMBER:  # Python refuses to read 5,000 digits
        shown = repr(text) if len(text) <= _LONGEST_SHOWN else f"a number of {len(digits)} digits"
        raise argparse.ArgumentTypeError(f"{shown} is too large; no flag takes more than {_LARGEST_NUMBER}")
    return int(text)


def path_text(text: str) -> str:
    """Return a flag's text unless it is empty, which as a path would be the current directory; for `type=`."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path, . for the current directory")
    return text


def number(text: str, example: str = "one such as 0.5") -> float:
    """Return the number that a flag's text spells; for `type=` of argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give {example}") from None


def ratio(text: str) -> float:
    """Return the number that a flag's text spells; the error names the range of a share. For `type=` of argparse."""
    return number(text, "one in (0, 1] such as 0.2")


def with_flag_name(message: str, prefix: str = "", flags: Collection[str] | None = None) -> str:
    """Return an error that begins with the name of a setting as one that begins with the flag.

    Parameters
    ----------
    message : str
        The text of an error, such as "window is 0; allowed is 1 to 128".
    prefix : str, default ""
        What the flag's name has before the setting's: "chunkkv_" gives "--chunkkv_window is 0; …".
    flags : Collection[str], optional
        The names of the command's flags; others stay as they are. Default: any first word of a name's form is one.
    """
    if re.match(r"prompt \d+ ", message):  # a prompt by its place in the request, whatever flag it came from
        return message
    name = message.partition(" ")[0]
    is_flag = re.fullmatch("[a-z_0-9]+", name) if flags is None else prefix + name in flags
    return f"--{prefix}{message}" if is_flag and name != message else message


@contextmanager
def errors_name_flags(prefix: str = "") -> Iterator[None]:
    """Turn a ConfigError about a setting into a UsageError that names the flag, `prefix` before the setting's name."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(with_flag_name(str(error), prefix)) from None


def run_program(
    program: str,
    parse: Callable[[], argparse.Namespace],
    run: Command,
    usage_errors: tuple[type[ChunkKVError], ...] = (UsageError,),
) -> None:
    """Parse a command line and run it; whatever fails ends the process with one line on standard error.

    Parameters
    ----------
    program : str
        The name that begins the line: "chunkkv-build".
    parse : Callable[[], Namespace]
        Reads the command line. Its `log_level`, where there is one, decides whether errors show a traceback.
    run : Command
        Does what the flags ask for.
    usage_errors : tuple of error classes
        The errors that mean a wrong command line.

    Raises
    ------
    SystemExit
        With 1 for failures, 2 for a wrong command line, 130 for Ctrl-C, 141 where the reader of the output has gone,
        or with what `parse` and `run` raise it with. Returns after success.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding must not end an answer
    flags = argparse.Namespace()
    try:
        try:
            flags = parse()
            run(flags)
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):  # rich makes an exit with 1 of it
                raise error.__context__ from None
            _flush_output()
            raise
        _flush_output()
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(CLOSED_PIPE) from None
    except KeyboardInterrupt:
        _show_traceback(flags)
        stop_with(program, "interrupted", INTERRUPTED)
    except Exception as error:
        _show_traceback(flags)
        message = _described(error, flags)
        if isinstance(error, ChunkKVError):
            message = with_flag_name(message, flags=vars(flags))
        elif isinstance(error, OSError) and error.strerror:
            message = f"{_place(error, flags)}: {error.strerror}"
        stop_with(program, message, BAD_USAGE if isinstance(error, usage_errors) else FAILED)


def stop_with(program: str, message: str, code: int) -> NoReturn:
    """End the program with one line on standard error."""
    print(f"{program}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


def _show_traceback(flags: argparse.Namespace) -> None:
    if getattr(flags, "log_level", None) in _TRACEBACK_LEVELS:
        traceback.print_exc()


def _described(error: Exception, flags: argparse.Namespace) -> str:
    if isinstance(error, ChunkKVError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name!r} is missing; install this project with pip install ."
    if isinstance(error, ImportError):
        return f"a Python package is damaged or too old: {error}; install this project again with pip install ."
    return f"unexpected {type(error).__name__}: {error}" + "; --log_level debug shows where" * ("log_level" in flags)


def _place(error: OSError, flags: argparse.Namespace) -> str:
    """Return what an error of reading or writing is about: a flag with its path, a path, or a standard stream."""
    if error.filename is None:
        # Errors of files name the file; an unbuffered output leaves nothing to flush.
        unbuffered = error.errno == errno.ENOSPC and getattr(sys.stdout, "write_through", False)
        return "standard output" if _discard_output() or unbuffered else "input or output"
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    names = [name for name, value in vars(flags).items() if isinstance(value, (str, Path)) and str(value) == path]
    return f"--{names[0]} {path}" if names else path


def _flush_output() -> None:
    if sys.stdout is not None:  # it is None where the process was started with standard output closed
        sys.stdout.flush()


def _discard_output() -> bool:
    """Send what cannot be written to the null device, or Python fails at exit; return whether there was any."""
    try:
        _flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextmanager
def interrupt_as_cancel() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second one raises KeyboardInterrupt as usual."""
    cancel, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def request(number: int, frame: FrameType | None) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)

    with _signal_handler(signal.SIGINT, request):
        yield cancel


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) unwind the program as Ctrl-C does; under nohup SIGHUP is ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(HUNG_UP if number != signal.SIGTERM else TERMINATED)

    with ExitStack() as handlers:
        handlers.enter_context(_signal_handler(signal.SIGTERM, leave))
        hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
        if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
            handlers.enter_context(_signal_handler(hang_up, leave))
        yield


@contextmanager
def _signal_handler(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
