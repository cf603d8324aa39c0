"""The Triton model of layout `single`: text in, streamed text out, around a ChunkKV engine."""

from __future__ import annotations

from functools import partial

import numpy as np
import triton_python_backend_utils as pb_utils  # its classes exist only after this module was imported

from chunkkv.errors import RequestError
from chunkkv.results import GenerationResult
from chunkkv.triton.models.answers import CANARY_PART, AnswerListener, ResponsePart
from chunkkv.triton.models.backend import PbRequest, PbTensor, tensor_reader
from chunkkv.triton.models.inputs import (
    ParsedRequest,
    parse_request,
    prompt_text,
    refuse_unknown_fields,
    scalar,
    strings,
)
from chunkkv.triton.models.serving import Serving
from chunkkv.triton.repository.tensors import SINGLE_INPUTS

_INPUT_NAMES = tuple(tensor.name for tensor in SINGLE_INPUTS)


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that config.pbtxt names."""
        self._serving = Serving(pb_utils, args)

    def execute(self, requests: list[PbRequest]) -> None:
        """Queue the requests; answers are sent from the batcher's thread."""
        for request in requests:
            max_tokens = scalar(tensor_reader(pb_utils, request), "max_tokens")
            if self._serving.answer_canary(request, max_tokens, lambda: _output_tensors("", CANARY_PART)):
                continue
            responder = self._serving.responder(request)
            try:
                parsed = self._parse(request)
            except Exception as error:
                responder.fail(error)
                continue
            reply = partial(_output_tensors, str(parsed.prompt) if parsed.echo else "")
            listener = AnswerListener(responder, reply, parsed.stream, self._serving.stream_interval_s)
            self._serving.submit(parsed, listener)

    def finalize(self) -> None:
        """End what is open."""
        self._serving.close()

    def _parse(self, request: PbRequest) -> ParsedRequest:
        read = tensor_reader(pb_utils, request)
        refuse_unknown_fields(request.parameters(), _INPUT_NAMES)
        prompt = prompt_text(read, "text_input", self._serving.max_prompt_bytes)
        if bad_words := strings(read, "bad_words"):
            raise RequestError(f"bad_words has {bad_words[0]!r}; this engine cannot forbid words: leave it out")
        return parse_request(read, prompt, strings(read, "stop_words"), self._serving.session.eos_token_ids)


def _output_tensors(echoed: str, part: ResponsePart) -> list[PbTensor]:
    """Return the outputs of one response; `echoed` is what the first one repeats of the prompt."""
    text = echoed + part.text if part.is_first else part.text
    values = {
        "text_output": np.array([[text.encode()]], dtype=object),
        "output_ids": np.array([part.token_ids], np.int32),
    }
    if part.result is not None:
        values |= _result_values(part.result)
    return [pb_utils.Tensor(name, value) for name, value in values.items()]


def _result_values(result: GenerationResult) -> dict[str, np.ndarray]:
    """Return the outputs of the whole answer, which come with its last response."""
    statistics = result.statistics
    counts = {
        "num_input_tokens": statistics.prompt_tokens,
        "num_output_tokens": statistics.new_tokens,
        "kept_tokens": statistics.kept_tokens,
    }
    seconds = {
        "ttft_ms": statistics.ttft_s,
        "tpot_ms": statistics.tpot_s or 0.0,
        "prefill_ms": statistics.prefill_s,
        "compress_ms": statistics.compress_s,
    }
    return {
        "finish_reason": np.array([[result.finish_reason.encode()]], dtype=object),
        "kv_cache_bytes": np.array([[statistics.cache_bytes]], np.int64),
        **{name: np.array([[number]], np.int32) for name, number in counts.items()},
        **{name: np.array([[time_s * 1e3]], np.float32) for name, time_s in seconds.items()},
    }
