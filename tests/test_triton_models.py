"""Triton's models without a server: written repositories run, request tensors are read, logs are lines of JSON."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import engines
from support.messages import naming

from chunkkv import ChunkKVSession, SamplingParams, logs
from chunkkv.errors import RequestError
from chunkkv.triton.models import inputs
from chunkkv.triton.repository.write import write_repository
from chunkkv.triton.server.health import canary_id

TESTS = Path(__file__).parent
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def engine() -> Path:
    return engines.engine_dir("llama3")


@pytest.fixture(scope="module")
def session(engine: Path) -> ChunkKVSession:
    return ChunkKVSession.from_dir(engine, threads=1)


@pytest.fixture(scope="module")
def repositories(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository of each layout."""
    folder = tmp_path_factory.mktemp("repositories")
    for layout in ("single", "trtllm"):
        write_repository(engine, folder / layout, layout)
    return folder


def ask(model: Path, *requests: dict[str, Any]) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Run a model in a process of its own, as Triton does; returns each request's responses, and the log's lines."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_backend_double", str(model)],
        input=json.dumps(requests),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [json.loads(line) for line in done.stderr.splitlines()]


def test_the_single_model_answers_as_the_library_does(repositories: Path, session: ChunkKVSession) -> None:
    own = session.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))
    asked = {"text_input": [PROMPT], "max_tokens": [6], "ignore_eos": [True]}
    (whole, stream, echo, bad, unknown), lines = ask(
        repositories / "single" / "chunkkv",
        {"id": "whole", "inputs": asked},
        {"inputs": {**asked, "stream": [True]}},
        {"inputs": {**asked, "exclude_input_in_output": [False]}},
        {"id": "bad", "inputs": {**asked, "max_tokens": [0]}},
        {"inputs": asked, "parameters": {"keep": 1}},
    )
    (answer,) = whole
    assert (answer["text_output"], answer["output_ids"]) == ([own.text], [list(own.token_ids)])
    counts = [answer[name][0][0] for name in ("num_input_tokens", "kept_tokens", "num_output_tokens")]
    assert counts == [own.statistics.prompt_tokens, own.statistics.kept_tokens, 6]
    assert "".join(part["text_output"][0] for part in stream) == own.text
    assert [token for part in stream for token in part["output_ids"][0]] == list(own.token_ids)
    assert ["finish_reason" in part for part in stream] == [False] * (len(stream) - 1) + [True] and len(stream) > 1
    assert echo[0]["text_output"] == [PROMPT + own.text]
    assert bad[0]["error"].startswith("CHUNKKV_INVALID: max_new_tokens is 0")
    assert unknown[0]["error"].startswith("CHUNKKV_INVALID: there is no input 'keep'; known are text_input")
    assert {line["model"] for line in lines} == {"chunkkv"}
    (done,) = [line for line in lines if line.get("request_id") == "whole"]
    assert (done["level"], done["event"], done["new_tokens"]) == ("info", "request_done", 6)
    (refused,) = [line for line in lines if line.get("request_id") == "bad"]
    assert (refused["level"], refused["event"]) == ("warning", "request_invalid")


def test_a_prompt_begins_once_or_as_it_says(repositories: Path, session: ChunkKVSession) -> None:
    template = session.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    asked = {"text_input": [template], "max_tokens": [3]}
    (once, bare), _ = ask(
        repositories / "single" / "chunkkv",
        {"inputs": asked},
        {"inputs": {"text_input": [PROMPT], "max_tokens": [3], "add_special_tokens": [False]}},
    )
    for answer, text in ((once, template), (bare, PROMPT)):
        assert answer[0]["num_input_tokens"] == [[len(session.tokenizer.encode(text, add_special_tokens=False))]]


def test_the_engine_model_takes_and_gives_token_ids(repositories: Path, session: ChunkKVSession) -> None:
    ids = session.tokenizer.encode(PROMPT)
    own = session.generate(ids, SamplingParams(max_new_tokens=5, ignore_eos=True))
    asked = {"input_ids": ids, "input_lengths": [len(ids)], "request_output_len": [5], "ignore_eos": [True]}
    (whole, stream, echo, stop, bad), _ = ask(
        repositories / "trtllm" / "tensorrt_llm",
        {"id": "a", "inputs": {**asked, "return_log_probs": [False]}},
        {"id": "b", "inputs": {**asked, "streaming": [True]}},
        {"inputs": {**asked, "exclude_input_in_output": [False]}},
        {"id": "nobody", "inputs": {**asked, "stop": [True]}},
        {"inputs": {**asked, "input_lengths": [len(ids) + 1]}},
    )
    assert whole[0]["output_ids"] == [[list(own.token_ids)]] and whole[0]["chunkkv_text"] == [own.text]
    assert [token for part in stream for token in part["output_ids"][0][0]] == list(own.token_ids)
    assert sum(part["num_output_tokens"][0][0] for part in stream) == 5, "clients add up what the responses count"
    assert echo[0]["output_ids"] == [[[*ids, *own.token_ids]]]
    assert echo[0]["chunkkv_text"] == [session.tokenizer.decode(ids) + own.text]
    assert not {"output_log_probs", "cum_log_probs"} & set(whole[0]), "nobody asked for them"
    assert stop == [], "a stop request for no running answer just ends"
    assert bad[0]["error"] == f"CHUNKKV_INVALID: input_lengths is {len(ids) + 1}; input_ids has {len(ids)}"


def test_log_probabilities_are_the_librarys(repositories: Path, session: ChunkKVSession) -> None:
    ids = session.tokenizer.encode(PROMPT)
    own = session.generate(ids, SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=True)).logprobs
    asked = {"input_ids": ids, "input_lengths": [len(ids)], "request_output_len": [5], "ignore_eos": [True]}
    asked |= {"return_log_probs": [True]}
    (whole, stream, echo), _ = ask(
        repositories / "trtllm" / "tensorrt_llm",
        {"inputs": asked},
        {"inputs": {**asked, "streaming": [True]}},
        {"inputs": {**asked, "exclude_input_in_output": [False]}},
    )
    for answer in (whole, echo):  # the prompt has none
        assert answer[0]["output_log_probs"] == [[pytest.approx(own, abs=1e-6)]]
        assert answer[0]["cum_log_probs"] == [[pytest.approx(sum(own), abs=1e-5)]]
    assert [value for part in stream for value in part["output_log_probs"][0][0]] == pytest.approx(own, abs=1e-6)
    total = 0.0
    for part in stream:
        assert len(part["output_log_probs"][0][0]) == part["num_output_tokens"][0][0]
        total += sum(part["output_log_probs"][0][0])
        assert part["cum_log_probs"] == [[pytest.approx(total, abs=1e-5)]]


def test_a_canary_is_answered_by_the_heartbeat_and_is_in_no_log(repositories: Path) -> None:
    """Without a supervisor the prefix of its id is empty; one that asks for more than a token is a request like any."""
    asked = {"text_input": [PROMPT], "ignore_eos": [True]}
    (canary, more), lines = ask(
        repositories / "single" / "chunkkv",
        {"id": canary_id(""), "inputs": {**asked, "max_tokens": [1]}},
        {"id": canary_id(""), "inputs": {**asked, "max_tokens": [2]}},
    )
    assert canary == [{"text_output": [""], "output_ids": [[]]}]
    assert more[0]["num_output_tokens"] == [[2]]
    assert [line["request_id"] for line in lines if line["event"] == "request_done"] == [canary_id("")]


BENCHMARKS = {  # what the clients that measure servers send to a model of TensorRT-LLM, beside text and max_tokens
    "vLLM": {"accumulate_tokens": [True], "temperature": [0.0], "top_p": [1.0], "stream": [True]},
    "vLLM, ignore_eos": {"accumulate_tokens": [True], "temperature": [0.0], "stream": [True], "min_length": [6]},
    "SGLang": {
        "accumulate_tokens": [True], "temperature": [0.000001], "top_p": [1.0], "top_k": [1], "stream": [True],
        "min_length": [1], "end_id": [1_048_576],
    },
    "genai-perf": {"stream": [True], "min_tokens": [6]},
}  # fmt: skip


@pytest.mark.parametrize("client", BENCHMARKS)
def test_benchmark_clients_are_served(repositories: Path, session: ChunkKVSession, client: str) -> None:
    own = session.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))
    fields = BENCHMARKS[client]
    (stream,), _ = ask(
        repositories / "single" / "chunkkv", {"inputs": {"text_input": [PROMPT], "max_tokens": [6], **fields}}
    )
    texts = [part["text_output"][0] for part in stream]
    if "accumulate_tokens" not in fields:
        texts = ["".join(texts[: number + 1]) for number in range(len(texts))]
    assert len(texts) > 1 and texts[-1] == own.text
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert stream[-1]["num_output_tokens"] == [[6]]


def test_penalties_and_a_least_length_are_the_librarys(repositories: Path, session: ChunkKVSession) -> None:
    params = SamplingParams(max_new_tokens=9, min_tokens=7, presence_penalty=0.5, frequency_penalty=1.5)
    fields = {"max_tokens": [9], "min_tokens": [7], "presence_penalty": [0.5], "frequency_penalty": [1.5]}
    (answer, refused), _ = ask(
        repositories / "single" / "chunkkv",
        {"inputs": {"text_input": [PROMPT], **fields}},
        {"inputs": {"text_input": [PROMPT], "max_tokens": [9], "min_length": [10]}},
    )
    assert answer[0]["output_ids"] == [list(session.generate(PROMPT, params).token_ids)]
    assert refused[0]["error"].startswith("CHUNKKV_INVALID: min_tokens is 10")


@pytest.mark.parametrize(
    ("asked", "means"),
    [
        ({}, {}),
        ({"temperature": 1.5}, {}),  # TensorRT-LLM samples only where top_k or top_p says so
        ({"top_k": 0, "top_p": -1.0, "temperature": 0.7}, {}),
        ({"top_k": 50}, {"temperature": 1.0, "top_k": 50}),
        ({"top_k": 5000, "top_p": 0.0}, {"temperature": 1.0, "top_k": 1024}),
        ({"top_p": 0.9, "temperature": 0.5}, {"temperature": 0.5, "top_p": 0.9}),
        ({"top_p": 1.0, "temperature": 0.0}, {}),
        ({"top_p": 1.0, "presence_penalty": 2.0}, {"temperature": 1.0, "presence_penalty": 2.0}),
        (
            {"top_k": 9, "temperature": 0.5, "presence_penalty": 2.0, "frequency_penalty": 1.0},
            {"temperature": 0.5, "top_k": 9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        ),
        ({"temperature": 2.0, "presence_penalty": 1.0}, {"presence_penalty": 2.0}),
        ({"random_seed": 7}, {"seed": 7}),
        ({"seed": 2**64 - 1}, {"seed": 2**63 - 1}),
        ({"repetition_penalty": 1.25}, {"repetition_penalty": 1.25}),
    ],
)
def test_sampling_of_layout_trtllm_is_tensorrt_llms(asked: dict[str, float], means: dict[str, float]) -> None:
    types = {"top_k": np.int32, "seed": np.uint64, "random_seed": np.uint64}
    arrays = {name: np.array([[value]], types.get(name, np.float32)) for name, value in asked.items()}
    parsed = inputs.parse_request(arrays.get, "a", (), frozenset({2}), 100, as_tensorrt_llm=True)
    assert parsed.sampling == SamplingParams(**{"seed": 0, "penalise_prompt": True, **means})


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"top_k": -2}, "top_k is -2"), ({"top_p": 1.5}, "top_p is 1.5")],
)
def test_sampling_of_layout_trtllm_is_refused_by_name(asked: dict[str, float], named: str) -> None:
    arrays = {name: np.array([[value]], np.int32 if name == "top_k" else np.float32) for name, value in asked.items()}
    with pytest.raises(RequestError, match=naming(named)):
        inputs.parse_request(arrays.get, "a", (), frozenset({2}), 100, as_tensorrt_llm=True)


def test_stop_words_without_text_end_an_answer_by_their_id(repositories: Path, session: ChunkKVSession) -> None:
    ids = session.tokenizer.encode(PROMPT)
    free = session.generate(ids, SamplingParams(max_new_tokens=40, ignore_eos=True)).token_ids
    without_text = next(token for token in free if not session.tokenizer.decode([token]))
    words = inputs.pack_word_lists([[without_text]]).tolist()
    asked = {"input_ids": ids, "input_lengths": [len(ids)], "request_output_len": [40], "ignore_eos": [True]}
    (answer,), _ = ask(repositories / "trtllm" / "tensorrt_llm", {"inputs": {**asked, "stop_words_list": words}})
    assert "error" not in answer[0], answer
    assert answer[0]["output_ids"] == [[list(free[: free.index(without_text) + 1])]]
    assert answer[0]["finish_reason"] == ["stop"]


def test_preprocessing_gives_what_the_engine_model_reads(repositories: Path, session: ChunkKVSession) -> None:
    (answer, refused), _ = ask(
        repositories / "trtllm" / "preprocessing",
        {"inputs": {"QUERY": [PROMPT], "REQUEST_OUTPUT_LEN": [5], "STOP_WORDS_DICT": ["fox", ""]}},
        {"inputs": {"REQUEST_OUTPUT_LEN": [5]}},
    )
    assert answer[0]["INPUT_ID"] == [session.tokenizer.encode(PROMPT)]
    words = inputs.unpack_word_lists(np.array(answer[0]["STOP_WORDS_IDS"]), "stop_words_list")
    assert words == [session.tokenizer.encode("fox", add_special_tokens=False)]
    assert refused[0]["error"] == "CHUNKKV_INVALID: QUERY is missing; give the prompt"


@pytest.mark.parametrize("model", ["postprocessing", "tensorrt_llm_bls"])
def test_the_other_models_start(repositories: Path, model: str) -> None:
    """They need other models, or arrays of two dimensions, to answer."""
    assert ask(repositories / "trtllm" / model) == ([], [])


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), max_size=6))
def test_word_lists_come_back(lists) -> None:
    packed = inputs.pack_word_lists(lists)
    assert packed.dtype == np.int32 and packed.shape[0] == 2 and packed.shape[1] >= 1
    assert inputs.unpack_word_lists(packed, "words") == inputs.unpack_word_lists(packed[None], "words") == lists


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((3, 2), np.int32), "shape [3,2]"),
        (np.zeros(4, np.int32), "shape [4]"),
        (np.array([[1, 2], [2, 1]]), "ends [2,1]"),
        (np.array([[1, 2], [1, 3]]), "ends [1,3]"),
        (np.array([[1, 2], [0, 1]]), "ends [0,1]"),
    ],
)
def test_broken_word_lists_are_named(array, named: str) -> None:
    with pytest.raises(RequestError, match=naming(named)):
        inputs.unpack_word_lists(array, "words")


def test_a_float32_means_the_decimal_it_was_written_as() -> None:
    for written in (0.7, 0.2, 1e-05, 1.3):
        assert inputs.scalar({"x": np.array([[written]], np.float32)}.get, "x") == written


def test_a_parameter_of_the_server_is_no_unknown_field() -> None:
    inputs.refuse_unknown_fields('{"triton_enable_empty_final_response": true, "id": "a"}', ["text_input"])
    inputs.refuse_unknown_fields("", ["text_input"])
    with pytest.raises(RequestError, match=naming("'keep' text_input")):
        inputs.refuse_unknown_fields('{"keep": 1}', ["text_input"])


@contextmanager
def unconfigured_logging() -> Iterator[logging.Logger]:
    """Yield the logger above all of this package, without the handlers that pytest has added for the test."""
    logger = logging.getLogger("chunkkv")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [], False
    try:
        yield logger
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_log_lines_are_json_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with unconfigured_logging():
        logs.configure("info", model="m")
        logger = logging.getLogger("chunkkv.triton.models.test")
        logger.debug("unimportant")
        logger.info("request_done", extra=logs.fields(new_tokens=3, path=Path("a")))
        logging.getLogger("chunkkv").handlers[0].flush()
    (line,) = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "event": "request_done", "model": "m", "new_tokens": 3, "path": "a"}


def test_a_hosts_own_logging_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    with unconfigured_logging() as logger:
        logger.addHandler(logging.StreamHandler(text))
        logs.configure("info", model="m")
        logging.getLogger("chunkkv.triton.models.test").error("gave_up", extra=logs.fields(failures=2))
    assert (text.getvalue(), capsys.readouterr().err) == ("gave_up\n", "")


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    with unconfigured_logging():
        logs.configure()
        closed.close()
        logging.getLogger("chunkkv.triton.models.test").error("gave_up")
        logging.getLogger("chunkkv").handlers[0].flush()


def test_a_reader_that_stalls_holds_up_nobody_and_is_told_what_it_missed() -> None:
    """A pipe that nobody reads for a while: 5,000 lines of 1 kB are logged at once, and written when somebody reads."""
    program = (
        "import logging, sys; from chunkkv import logs; logs.configure(model='m'); log = logging.getLogger("
        "'chunkkv.x')\nfor n in range(5000): log.info('event', extra=logs.fields(n=n, text='x' * 1000))\n"
        "print('logged', flush=True); sys.stdin.readline()"
    )
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout.readline() == b"logged\n"
        lines = []
        while not lines or lines[-1]["event"] != "log_lines_dropped":
            lines.append(json.loads(process.stderr.readline()))
        process.stdin.close()
        assert process.wait(10) == 0
    events = [line for line in lines if line["event"] == "event"]
    assert len(events) >= 1000 and lines[-1]["count"] == 5000 - len(events) > 0
    assert lines[-1]["level"] == "warning" and lines[-1]["model"] == "m"


def test_inputs_of_older_clients_and_switches_that_are_off() -> None:
    from chunkkv.triton.models.inputs import parse_request

    given = {"random_seed": np.array([[7]], np.uint64), "min_length": np.array([[2]], np.int32)}
    given |= {name: np.array([[False]]) for name in ("return_log_probs", "return_perf_metrics")}
    parsed = parse_request(given.get, [1, 2], (), frozenset(), 100)
    assert (parsed.sampling.seed, parsed.sampling.min_tokens) == (7, 2)
    given["return_context_logits"] = np.array([[True]])
    with pytest.raises(RequestError, match="return_context_logits is True"):
        parse_request(given.get, [1, 2], (), frozenset(), 100)
