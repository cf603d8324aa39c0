"""The Triton model of layout `single`: text in, streamed text out, around a ChunkKV engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import triton_python_backend_utils as pb_utils  # its classes exist only after this module was imported

from chunkkv.results import GenerationResult
from chunkkv.triton.models.answers import CANARY_PART, AnswerListener, ResponsePart
from chunkkv.triton.models.backend import PbRequest, PbTensor, tensor_reader
from chunkkv.triton.models.inputs import refuse_unknown_fields
from chunkkv.triton.models.serving import Serving
from chunkkv.triton.models.text_requests import ShownText, parse_text_request
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
            read = tensor_reader(pb_utils, request)
            canary = partial(_output_tensors, lambda part: part.text, CANARY_PART)
            if self._serving.answer_canary(request, read, "max_tokens", canary):
                continue
            responder = self._serving.responder(request)
            try:
                refuse_unknown_fields(request.parameters(), _INPUT_NAMES)
                parsed = parse_text_request(read, self._serving)
            except Exception as error:
                responder.fail(error)
                continue
            shown = ShownText(read, parsed)
            listener = AnswerListener(
                responder, partial(_output_tensors, shown.of), parsed.stream, self._serving.stream_interval_s
            )
            self._serving.submit(parsed, listener)

    def finalize(self) -> None:
        """End what is open."""
        self._serving.close()


def _output_tensors(shown: Callable[[ResponsePart], str], part: ResponsePart) -> list[PbTensor]:
    """Return the outputs of one response; `shown` returns its text."""
    values = {
        "text_output": np.array([[shown(part).encode()]], dtype=object),
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
