"""The Triton model `tensorrt_llm` of layout `trtllm`: token ids in, token ids out, around a ChunkKV engine."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.errors import RequestError
from chunkkv.triton.models.answers import CANARY_PART, AnswerListener, ResponsePart
from chunkkv.triton.models.backend import PbRequest, PbTensor, ReadTensor, tensor_reader
from chunkkv.triton.models.engine_door import DoorBackend, DoorRequest, DoorTensor, EngineDoor, door_address
from chunkkv.triton.models.inputs import ParsedRequest, parse_request, scalar, unpack_word_lists
from chunkkv.triton.models.serving import Parameters, Serving
from chunkkv.triton.models.text_requests import ShownText, parse_text_request
from chunkkv.triton.repository.tensors import BLS_INPUTS, ENGINE_ANSWER, ENGINE_TEXT

_TENSOR_NAMES = {
    "max_tokens": "request_output_len",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "stream": "streaming",
    "length_penalty": "len_penalty",
}


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that config.pbtxt names."""
        self._serving = Serving(pb_utils, args)
        self._excludes_input = Parameters(args["model_config"]).text("exclude_input_in_output", "true") == "true"
        # Answers by their number, and the number of the newest one of each id that a client chose, for stop requests.
        # The batcher's thread removes answers that have ended.
        self._running: dict[int, AnswerListener] = {}
        self._numbers: dict[str, int] = {}
        self._next_number = itertools.count(1).__next__
        self._lock = threading.Lock()
        self._door_backend = DoorBackend()
        self._door = EngineDoor(door_address(args["model_name"]), BLS_INPUTS, self._queue_text, self._stop_answer)

    def execute(self, requests: list[PbRequest]) -> None:
        """Queue the requests; one with `stop` ends the running request of the same id."""
        for request in requests:
            read = tensor_reader(pb_utils, request)
            if scalar(read, "stop", False):
                self._stop(request.request_id())
                request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            elif not self._serving.answer_canary(
                request, read, "request_output_len", partial(_output_tensors, [], "", CANARY_PART)
            ):
                self._queue(request, read)

    def finalize(self) -> None:
        """End what is open."""
        self._door.close()
        self._serving.close()

    def _queue(self, request: PbRequest, read: ReadTensor) -> None:
        responder, request_id = self._serving.responder(request), request.request_id()
        number = self._next_number()
        try:
            parsed = self._parse(read)
            listener = AnswerListener(
                responder,
                reply=partial(_output_tensors, *self._echoed(parsed), number=number, log_probs=LogProbs(parsed)),
                stream=parsed.stream,
                stream_interval_s=self._serving.stream_interval_s,
                # Nothing of the listener: in a circle with it, what it holds of Triton would outlive Triton.
                on_end=partial(self._forget, request_id, number),
            )
        except Exception as error:
            responder.fail(error)
            return
        with self._lock:
            self._running[number] = listener
            if request_id:
                self._numbers[request_id] = number
        self._serving.submit(parsed, listener)

    def _queue_text(self, request: DoorRequest) -> None:
        """Queue a request of tensorrt_llm_bls, which has text instead of token ids."""
        serving, backend = self._serving, self._door_backend
        read = tensor_reader(backend, request)
        canary = partial(_text_tensors, lambda part: part.text, CANARY_PART)
        if serving.answer_canary(request, read, "max_tokens", canary, backend):
            return
        responder = serving.responder(request, backend)
        try:
            parsed = parse_text_request(read, serving, self._excludes_input, as_tensorrt_llm=True)
        except Exception as error:
            responder.fail(error)
            return
        reply = partial(_text_tensors, ShownText(read, parsed).of, log_probs=LogProbs(parsed))
        serving.submit(parsed, AnswerListener(responder, reply, parsed.stream, serving.stream_interval_s))

    def _stop(self, request_id: str) -> None:
        with self._lock:
            number = self._numbers.pop(request_id, 0)
        self._stop_answer(number)

    def _stop_answer(self, number: int) -> None:
        with self._lock:
            listener = self._running.get(number)
        if listener is not None:
            listener.stop()

    def _forget(self, request_id: str, number: int) -> None:
        with self._lock:
            self._running.pop(number, None)
            if self._numbers.get(request_id) == number:  # a later request may have the same id
                del self._numbers[request_id]

    def _parse(self, read: ReadTensor) -> ParsedRequest:
        input_ids, length = read("input_ids"), scalar(read, "input_lengths")
        if input_ids is None:
            raise RequestError("input_ids is missing; give the prompt's token ids")
        if not 0 <= length <= input_ids.size:
            raise RequestError(f"input_lengths is {length}; input_ids has {input_ids.size}")
        if unpack_word_lists(read("bad_words_list"), "bad_words_list"):
            raise RequestError("bad_words_list has words; this engine cannot forbid words: leave it out")
        words = unpack_word_lists(read("stop_words_list"), "stop_words_list")
        ids = [word[0] for word in words if self._is_stop_id(word)]
        return parse_request(
            read,
            input_ids.reshape(-1)[:length].tolist(),
            self._stop_words([word for word in words if not self._is_stop_id(word)]),
            self._serving.session.eos_token_ids,
            self._serving.session.limits.vocab_size,
            stop_token_ids=ids,
            excludes_input=self._excludes_input,
            as_tensorrt_llm=True,
            tensor_names=_TENSOR_NAMES,
        )

    def _is_stop_id(self, word: list[int]) -> bool:
        """Return whether a stop word is one token that has no text to look for."""
        tokenizer = self._serving.session.tokenizer
        return len(word) == 1 and (tokenizer is None or not tokenizer.decode(word))

    def _stop_words(self, words: list[list[int]]) -> list[str]:
        """Return the text of the stop words of several tokens, in which special tokens have their names."""
        tokenizer = self._serving.session.tokenizer
        if words and tokenizer is None:
            raise RequestError("stop words need a tokenizer; this engine was built without one")
        texts = [] if tokenizer is None else [tokenizer.decode(word, skip_special_tokens=False) for word in words]
        return [text for text in texts if text]

    def _echoed(self, request: ParsedRequest) -> tuple[list[int], str]:
        """Return the token ids and the text of the prompt that come before the answer; a stream repeats nothing."""
        if not request.echo or request.stream:
            return [], ""
        tokenizer = self._serving.session.tokenizer
        ids = [int(token) for token in cast("list[int]", request.prompt)]
        return ids, "" if tokenizer is None else tokenizer.decode(ids)


class LogProbs:
    """The log probabilities in the responses of one request; nothing where it does not ask for them.

    Parameters
    ----------
    request : what it asks for.
    """

    def __init__(self, request: ParsedRequest) -> None:
        self._is_asked, self._sum = request.sampling.logprobs, 0.0

    def of(self, part: ResponsePart) -> dict[str, np.ndarray]:
        """Return those of a response's own tokens [1,1,n], and the sum of all so far [1,1]."""
        if not self._is_asked:
            return {}
        own = [choice.logprob for choice in part.choices if choice.logprob is not None]
        self._sum += math.fsum(own)
        return {
            "output_log_probs": np.array([[own]], np.float32),
            "cum_log_probs": np.array([[self._sum]], np.float32),
        }


def _output_tensors(
    echoed_ids: list[int],
    echoed_text: str,
    part: ResponsePart,
    number: int = 0,
    log_probs: LogProbs | None = None,
) -> list[PbTensor]:
    """Return the outputs of one response; `echoed` is what the first one repeats of the prompt."""
    ids, text = part.token_ids, part.text
    if part.is_first:
        ids, text = [*echoed_ids, *ids], echoed_text + text
    values = {
        "output_ids": np.array([[ids]], np.int32),
        ENGINE_TEXT: np.array([[text.encode()]], dtype=object),
        "sequence_length": np.array([[len(ids)]], np.int32),
        ENGINE_ANSWER: np.array([[number]], np.int64),
        **_report(part),
        **(log_probs.of(part) if log_probs else {}),
    }
    return [pb_utils.Tensor(name, value) for name, value in values.items()]


def _text_tensors(
    shown: Callable[[ResponsePart], str], part: ResponsePart, log_probs: LogProbs | None = None
) -> list[DoorTensor]:
    """Return the outputs of one response of tensorrt_llm_bls; `shown` returns its text."""
    values = {"text_output": np.array([[shown(part).encode()]], dtype=object), **_report(part)}
    values |= log_probs.of(part) if log_probs else {}
    return [DoorTensor(name, value) for name, value in values.items()]


def _report(part: ResponsePart) -> dict[str, np.ndarray]:
    """Return the outputs that tell about a response; as in TensorRT-LLM, tokens are counted per response."""
    finish_reason = "" if part.result is None else part.result.finish_reason
    counts = {
        "batch_index": 0,
        "sequence_index": 0,
        "num_input_tokens": part.request.prompt_tokens,
        "num_output_tokens": len(part.token_ids),
        "kept_tokens": part.request.kept_tokens,
    }
    return {
        "finish_reason": np.array([[finish_reason.encode()]], dtype=object),
        **{name: np.array([[count]], np.int32) for name, count in counts.items()},
    }
