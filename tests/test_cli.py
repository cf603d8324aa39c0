"""chunkkv generate: where a prompt comes from, what is printed when, exit codes and one-line errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import engines

from chunkkv import SamplingParams
from chunkkv.cli import generate
from chunkkv.cli.main import main
from chunkkv.executors.onnxruntime.decode import OnnxRuntimeDecoder
from chunkkv.session import ChunkKVSession

CONSOLE_SCRIPT = Path(sys.executable).with_name("chunkkv")
PROMPT = "the key of the cache is in the token that is"
LONG = 6_000  # tokens: far more text than a pipe holds
PIPE_BYTES = 4_096
TEXT_FLAGS = ("--max_new_tokens", "9", "--ignore_eos", "--threads", "1", "--log_level", "error")
GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt: a shell that starts pytest in the background has it and its children ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def engine() -> str:
    return str(engines.engine_dir("llama3"))


@pytest.fixture(scope="module")
def long_engine() -> str:
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=8_192)
    return str(engines.engine_dir("llama3", checkpoint_dir=checkpoint, max_seq_len=8_000))


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Run the command line in this process; returns exit code, output and errors."""

    def call(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stream)
        code = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def script(*arguments: str | bytes, unbuffered: bool = False, **options) -> subprocess.Popen:
    """Start the installed console script, its output buffered as for most users."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([str(CONSOLE_SCRIPT), *arguments], env=environment, **{**pipes, **options})


def long_script(engine_dir: str, **options) -> subprocess.Popen:
    flags = ("--max_new_tokens", str(LONG), "--ignore_eos", "--threads", "1", "--engine_dir", engine_dir)
    return script("generate", *flags, PROMPT, **options)


@pytest.mark.parametrize(
    "source", ["argument", "file", "file with an end of line", "file with a mark", "dash", "pipe", "ids"]
)
def test_a_prompt_from_each_source_gives_the_sessions_text(engine, run, tmp_path: Path, source: str) -> None:
    session, stdin, prompt = engines.session("llama3"), None, [PROMPT]
    if source.startswith("file"):
        file = tmp_path / "prompt.txt"
        mark, end = (b"\xef\xbb\xbf" if "mark" in source else b""), (b"\r\n" if "end" in source else b"")
        file.write_bytes(mark + PROMPT.encode() + end)
        prompt = ["--prompt_file", str(file)]
    elif source in ("dash", "pipe"):
        stdin, prompt = PROMPT.encode() + b"\n", ["-"] if source == "dash" else []
    elif source == "ids":
        prompt = ["--token_ids", ", ".join(map(str, session.tokenizer.encode(PROMPT)))]
    code, out, err = run("generate", "--engine_dir", engine, *TEXT_FLAGS, *prompt, stdin=stdin)
    assert (code, out, err) == (0, session.generate(PROMPT, GREEDY).text + "\n", "")


def test_any_unicode_reaches_the_tokenizer(engine, run) -> None:
    text = "é€😀\n second line\t"
    expected = engines.session("llama3").generate(text, GREEDY).text + "\n"
    for arguments, stdin in (([text], None), ([], text.encode())):
        assert run("generate", "--engine_dir", engine, *TEXT_FLAGS, *arguments, stdin=stdin)[1] == expected


def test_chat_puts_the_prompt_into_the_template(engine, run) -> None:
    session = engines.session("llama3")
    ids = session.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    code, out, _ = run("generate", "--engine_dir", engine, *TEXT_FLAGS, "--chat", "--json", PROMPT)
    assert code == 0
    assert tuple(json.loads(out)["token_ids"]) == session.generate(ids, GREEDY).token_ids
    assert json.loads(out)["statistics"]["prompt_tokens"] == len(ids)


def test_json_is_the_sessions_result(engine, run) -> None:
    flags = ["--json", "--logprobs", "--keep_ratio", "0.5"]
    prompt = PROMPT * 3
    code, out, err = run("generate", "--engine_dir", engine, *TEXT_FLAGS, *flags, prompt)
    assert code == 0 and err == "" and out.count("\n") == 1
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=True)
    expected = json.loads(json.dumps(engines.session("llama3").generate(prompt, params, keep_ratio=0.5).to_dict()))
    found = json.loads(out)
    times = {name for name in found["statistics"] if name.endswith("_s")}
    assert times == {"ttft_s", "tpot_s", "prefill_s", "compress_s"}
    assert all(found["statistics"].pop(name) > 0 and expected["statistics"].pop(name) for name in times)
    assert found == expected
    assert found["statistics"]["kept_tokens"] == found["statistics"]["prompt_tokens"] // 2
    assert len(found["logprobs"]) == len(found["token_ids"]) == 9 and found["finish_reason"] == "length"


def test_without_a_tokenizer_ids_go_in_and_out(run) -> None:
    checkpoint = engines.checkpoint_dir("llama3", with_tokenizer=False)
    engine = str(engines.engine_dir("llama3", checkpoint_dir=checkpoint))
    ids = engines.session("llama3").generate([5, 6, 7], GREEDY).token_ids
    code, out, _ = run("generate", "--engine_dir", engine, *TEXT_FLAGS, "--token_ids", "5 6 7")
    assert code == 0 and out.split() == [str(token) for token in ids]
    code, _, err = run("generate", "--engine_dir", engine, *TEXT_FLAGS, PROMPT)
    assert code == 2 and "built without a tokenizer; give token ids instead of text" in err


def test_every_flag_arrives(engine, run, monkeypatch) -> None:
    seen = {}
    load, generate = ChunkKVSession.from_dir, ChunkKVSession.generate

    def watching_load(engine_dir, threads=None, max_tokens_in_paged_kv_cache=None):
        seen.update(engine_dir=str(engine_dir), threads=threads, pool=max_tokens_in_paged_kv_cache)
        return load(engine_dir, threads)

    def watching_generate(self, prompts, sampling, **options):
        seen.update(prompts=prompts, sampling=sampling, **options)
        return generate(self, prompts, sampling, **options)

    monkeypatch.setattr(ChunkKVSession, "from_dir", watching_load)
    monkeypatch.setattr(ChunkKVSession, "generate", watching_generate)
    assert run("generate", "--engine_dir", engine, "the")[0] == 0
    assert seen["sampling"] == SamplingParams()
    assert (seen["keep_ratio"], seen["budget_tokens"], seen["threads"]) == (None, None, None)
    values = {"max_new_tokens": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 42}
    for hyphenated in (False, True):
        flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        flags += ["--stop", "END", "--stop", "x y", "--ignore_eos", "--keep_ratio", ".5", "--threads=2"]
        flags += ["--logprobs", "--json", "--engine_dir", engine]
        flags = [flag.replace("_", "-") if hyphenated and flag.startswith("--") else flag for flag in flags]
        assert run("generate", *flags, "the")[0] == 0
        assert seen["sampling"] == SamplingParams(**values, stop=("END", "x y"), ignore_eos=True, logprobs=True)
        assert (seen["keep_ratio"], seen["threads"], seen["engine_dir"]) == (0.5, 2, engine)
    run("generate", "--engine_dir", engine, "--budget_tokens", "12", "--max_new_tokens", "1", "the")
    assert seen["budget_tokens"] == 12 and seen["pool"] is None
    run("generate", "--engine_dir", engine, "--max_tokens_in_paged_kv_cache", "640", "--max_new_tokens", "1", "the")
    assert seen["pool"] == 640


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([""], 2, "the prompt is empty; give at least one word"),
        (["--token_ids", " , "], 2, "--token_ids is empty; give at least one token id"),
        (["--token_ids", "1,x"], 2, "--token_ids contains 'x'; give whole numbers such as 1,15,7"),
        (["--token_ids", "1,384"], 2, "token id 384 at position 1; allowed is 0 to 383"),
        (["--token_ids", "-3"], 2, "token id -3 at position 0"),
        (["--token_ids", "1", "the"], 2, "given more than once; give its text, --prompt_file or --token_ids"),
        (["--prompt_file", "/", "the"], 2, "given more than once"),
        (["--prompt_file", "/"], 2, "--prompt_file / cannot be read: Is a directory"),
        (["--prompt_file", "/no/such"], 2, "--prompt_file /no/such cannot be read: No such file"),
        (["--chat", "--token_ids", "5"], 2, "--chat needs a prompt of text"),
        (
            ["the " * 300],
            2,
            "tokens; this engine takes at most 256: shorten it, or build with a larger --max_input_len",
        ),
        (["--max_new_tokens", "400", "the"], 2, "lower max_new_tokens to 254 or less"),
        (["--max_new_tokens", "0", "the"], 2, "--max_new_tokens is 0; give a whole number of at least 1"),
        (["--max_new_tokens", "1.5", "the"], 2, "--max_new_tokens: '1.5' is not a whole number; give one such as 4096"),
        (["--temperature", "-1", "the"], 2, "--temperature is -1.0; give a number of at least 0"),
        (["--temperature", "warm", "the"], 2, "--temperature: 'warm' is not a number; give one such as"),
        (["--temperature", "nan", "the"], 2, "--temperature is nan"),
        (["--top_k", "-1", "the"], 2, "--top_k is -1"),
        (["--top_p", "0", "the"], 2, "--top_p is 0.0; give a number in (0, 1]"),
        (["--repetition_penalty", "0", "the"], 2, "--repetition_penalty is 0.0"),
        (["--seed", "-1", "the"], 2, "--seed is -1"),
        (["--stop", "", "the"], 2, "--stop contains ''; give non-empty strings"),
        (["--threads", "0", "the"], 2, "--threads is 0; allowed is 1 to 1024; without it"),
        (["--seed", "9" * 20, "the"], 2, f"--seed: '{'9' * 20}' is too large; no flag takes more than {2**63 - 1}"),
        (["--max_new_tokens", "9" * 5000, "the"], 2, "--max_new_tokens: a number of 5000 digits is too large"),
        (["--max_new_tokens", "99999", "the"], 2, "chunkkv: error: prompt 0 has 2 tokens and max_new_tokens is 99999"),
        (["--keep_ratio", "0", "the"], 2, "--keep_ratio is 0.0; allowed is (0, 1]"),
        (["--budget_tokens", "0", "the"], 2, "--budget_tokens is 0"),
        (
            ["--keep_ratio", "1", "--budget_tokens", "9", "the"],
            2,
            "--keep_ratio 1.0 and budget_tokens 9 were both given",
        ),
        (["--log_level", "loud", "the"], 2, "'loud' is not offered; allowed is error or warning"),
        (["--tempreature", "1", "the"], 2, "unknown flag --tempreature; did you mean --temperature?"),
        (["--xyzzy", "the"], 2, "unknown flag --xyzzy; see --help for those there are"),
        (["the", "end"], 2, "'end' is one argument too many; put a text of several words into quotes"),
        (["--seed"], 2, "--seed: expected one argument"),
        (["--seed", "--json"], 2, "--seed: expected one argument"),
        (["--stop"], 2, "--stop: expected one argument"),
        (["--engine_dir", "", "the"], 2, "--engine_dir: is empty; give a path"),
        (["--engine_dir", "/no/such", "the"], 1, "engine directory /no/such does not exist; give the --output_dir"),
        (["--engine_dir", "/", "the"], 1, "has no manifest.json"),
    ],
)
def test_errors_are_one_line_that_names_the_flag(engine, run, arguments: list, code: int, named: str) -> None:
    found, out, err = run("generate", "--engine_dir", engine, *arguments)
    assert found == code and out == ""
    assert err.startswith("chunkkv: error: ") and err.count("\n") == 1
    assert named in err and "Traceback" not in err


def test_what_is_missing_is_said(engine, run) -> None:
    missing = "chunkkv: error: --engine_dir is missing; give the directory that chunkkv-build wrote\n"
    assert run("generate", "the") == (2, "", missing)
    assert "unknown flag --engin_dir; did you mean --engine_dir?" in run("generate", "--engin_dir", engine, "the")[2]
    for prompt in ([], ["-"]):
        code, _, err = run("generate", "--engine_dir", engine, *prompt)  # standard input is closed
        assert code == 2 and "no prompt was given; give its text, --prompt_file or --token_ids, or pipe it in" in err
    code, _, err = run("generate", "--engine_dir", engine, stdin=b" \n")
    assert code == 2 and "the prompt is empty" in err


def test_bytes_that_are_no_utf8_are_refused(engine, run, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    base = ("generate", "--engine_dir", engine)
    told = "is not UTF-8 text: byte 0xe9 at 3; convert it to UTF-8"
    assert run(*base, "--prompt_file", str(file))[::2] == (2, f"chunkkv: error: {file} {told}\n")
    assert run(*base, stdin=b"caf\xe9")[::2] == (2, f"chunkkv: error: standard input {told}\n")
    assert run(*base, "caf\udce9")[::2] == (2, f"chunkkv: error: the prompt {told}\n")
    process = script("generate", "--engine_dir", engine, b"caf\xe9")
    out, err = process.communicate()
    assert (process.returncode, out, err.decode()) == (2, b"", f"chunkkv: error: the prompt {told}\n")


def test_a_damaged_engine_is_refused_and_debug_shows_where(engine, run, tmp_path: Path) -> None:
    damaged = shutil.copytree(engine, tmp_path / "engine")
    weights = bytearray((damaged / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(weights)
    code, out, err = run("generate", "--engine_dir", str(damaged), "the")
    assert code == 1 and out == "" and err.count("\n") == 1 and "weights.safetensors was changed" in err
    code, _, err = run("generate", "--engine_dir", str(damaged), "--log_level", "debug", "the")
    assert code == 1 and err.startswith("Traceback") and "was changed" in err.splitlines()[-1]


def test_the_summary_is_for_terminals_only(engine, run, monkeypatch) -> None:
    flags = ("generate", "--engine_dir", engine, "--max_new_tokens", "3", "--ignore_eos", PROMPT)
    assert run(*flags)[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run(*flags)
    assert err.startswith("[prompt ") and "3 new" in err and "kept" in err and "[prompt" not in out
    assert run(*flags, "--json")[2] == run(*flags, "--log_level", "error")[2] == ""


def test_text_comes_while_decoding_goes_on(engine, run, monkeypatch) -> None:
    """Decode steps counted at every write: the first piece is out before the first step, none waits for a later one."""
    steps, written = [], []
    decode, write = OnnxRuntimeDecoder.step, sys.stdout.write
    monkeypatch.setattr(OnnxRuntimeDecoder, "step", lambda *inputs: steps.append(1) or decode(*inputs))
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append((len(steps), text)) or write(text))
    _, out, _ = run("generate", "--engine_dir", engine, *TEXT_FLAGS, PROMPT)
    assert [count for count, _ in written] == [*range(9), 8]  # the last write ends the line
    assert "".join(text for _, text in written) == out


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_ends_within_a_token(engine, run, monkeypatch, interrupts: int) -> None:
    """The first Ctrl-C ends the answer with what there is, the second one at once; 130 either way."""
    decode, handler, steps = OnnxRuntimeDecoder.step, signal.getsignal(signal.SIGINT), []

    def interrupted(*inputs):
        steps.append(1)
        if len(steps) == 3:
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
        return decode(*inputs)

    monkeypatch.setattr(OnnxRuntimeDecoder, "step", interrupted)
    code, out, err = run("generate", "--engine_dir", engine, *TEXT_FLAGS, "--max_new_tokens", "90", "--json", PROMPT)
    assert code == 130 and err == "chunkkv: error: interrupted\n" and len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is handler
    if interrupts == 1:
        found = json.loads(out)
        assert found["finish_reason"] == "cancelled"
        whole = engines.session("llama3").generate(PROMPT, GREEDY)
        assert tuple(found["token_ids"]) == whole.token_ids[:4]  # the first comes from prefill


@pytest.mark.skipif(sys.platform != "linux", reason="sets the size of a pipe")
def test_a_reader_sees_the_first_piece_and_may_interrupt(long_engine) -> None:
    """The pipe is far smaller than the answer, so the process cannot end before its output is read."""
    process = long_script(long_engine, pipesize=PIPE_BYTES)
    first = os.read(process.stdout.fileno(), 1)
    assert first and process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and err == b"chunkkv: error: interrupted\n"
    params = SamplingParams(max_new_tokens=len(first + out), ignore_eos=True)
    whole = ChunkKVSession.from_dir(long_engine, threads=1).generate(PROMPT, params).text
    shown = (first + out).decode().removesuffix("\n").rstrip("\ufffd")
    assert whole.startswith(shown) and len(first + out) < 2 * PIPE_BYTES


@pytest.mark.parametrize("module", ["chunkkv", "chunkkv_builder.build"])
def test_a_program_is_a_module_too_and_ends_alike_where_its_reader_has_gone(module: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["version"] if module == "chunkkv" else ["--dry_run", "--checkpoint_dir", engines.checkpoint_dir("llama3")]
    done = subprocess.run([sys.executable, "-m", module, *flags], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 141 and b"error" not in done.stderr


def test_a_misspelt_command_gets_the_nearest_one(run) -> None:
    code, _, err = run("genrate", "--engine_dir", "e", "the")
    assert code == 2 and err.endswith("; did you mean generate?\n")
    code, _, err = run("xyzzy")
    assert code == 2 and "did you mean" not in err


def test_a_closed_pipe_ends_quietly(long_engine) -> None:
    process = long_script(long_engine)
    assert os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_an_interrupt_before_the_engine_runs(engine, run, monkeypatch) -> None:
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "read_prompt", interrupted)
    assert run("generate", "--engine_dir", engine, "the") == (130, "", "chunkkv: error: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", [["version"], ["--help"], ["generate", PROMPT], ["generate", "--json", PROMPT]])
def test_a_full_disk_is_one_line(engine, command: list[str], unbuffered: bool) -> None:
    flags = ["--engine_dir", engine, *TEXT_FLAGS] if command[0] == "generate" else []
    with open("/dev/full", "wb") as full:
        process = script(*command, *flags, stdout=full, unbuffered=unbuffered)
        _, err = process.communicate()
    assert process.returncode == 1
    assert (
        err.startswith(b"chunkkv: error: ")
        and b"standard output: No space left on device" in err
        and err.count(b"\n") == 1
    )


def test_the_console_script_reads_a_pipe_and_prints_the_answer(engine) -> None:
    process = script("generate", "--engine_dir", engine, *TEXT_FLAGS, stdin=subprocess.PIPE)
    out, err = process.communicate(PROMPT.encode())
    expected = engines.session("llama3").generate(PROMPT, GREEDY).text + "\n"
    assert (process.returncode, out.decode(), err) == (0, expected, b"")


@pytest.mark.parametrize("text", ["--json", "-x", "--", "- item", "--no-such-flag=1"])
def test_a_text_may_begin_with_a_hyphen(engine, run, monkeypatch, text: str) -> None:
    stops = []
    monkeypatch.setattr(generate, "read_prompt", lambda args: stops.append(args.stop) or "the")
    assert run("generate", "--engine_dir", engine, *TEXT_FLAGS, "--stop", text, f"--stop={text}")[0] == 0
    assert stops == [(text, text)]


def test_after_two_hyphens_a_prompt_may_begin_with_one(engine, run) -> None:
    expected = engines.session("llama3").generate("--engine-dir", GREEDY).text + "\n"
    assert run("generate", "--engine_dir", engine, *TEXT_FLAGS, "--", "--engine-dir")[1] == expected
