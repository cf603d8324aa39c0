"""The Triton model `postprocessing` of layout `trtllm`: token ids to text.

When a client leaves an ensemble, Triton does not tell the step that runs, which is the engine's, but cancels the next
one, which is this. So this model has the engine's stop the answer.
"""

from __future__ import annotations

import math
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.text.tokenizer import Tokenizer
from chunkkv.triton.models.backend import PbRequest, PbResponse, PbTensor
from chunkkv.triton.models.engine_door import door_address, stop_answer
from chunkkv.triton.models.serving import Parameters
from chunkkv.triton.repository.tensors import ENGINE_ANSWER, ENGINE_TEXT

CANCEL_POLL_S = 0.05
_MOST_ANSWERS = 1024  # far above those that are open at once; a forgotten one is only asked about earlier


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that config.pbtxt names."""
        parameters = Parameters(args["model_config"])
        self._tokenizer = Tokenizer.from_dir(parameters.text("tokenizer_dir"))
        self._engine = door_address(parameters.text("tensorrt_llm_model_name", "tensorrt_llm"))
        self._ask_again: dict[int, float] = {}  # by the number of an answer, in the order in which they came

    def execute(self, requests: list[PbRequest]) -> list[PbResponse]:
        """Return the text that the engine's model sent along, or else that of the ids."""
        for request in requests:
            self._stop_if_left(request)
        return [pb_utils.InferenceResponse(output_tensors=[self._text(request)]) for request in requests]

    def _stop_if_left(self, request: PbRequest) -> None:
        """Have the engine stop the answer to which a response belongs, if its client has left.

        Asking is a message to the server, so it is asked now and then.
        """
        answer = pb_utils.get_input_tensor_by_name(request, ENGINE_ANSWER)
        if answer is None:
            return
        number, now = int(answer.as_numpy().reshape(-1)[0]), time.monotonic()
        if now < self._ask_again.get(number, 0.0):
            return
        self._ask_again[number] = now + CANCEL_POLL_S
        if len(self._ask_again) > _MOST_ANSWERS:
            del self._ask_again[next(iter(self._ask_again))]
        if request.is_cancelled():
            self._ask_again[number] = math.inf  # more responses of it may be on their way
            stop_answer(self._engine, number)

    def _text(self, request: PbRequest) -> PbTensor:
        engine_text = pb_utils.get_input_tensor_by_name(request, ENGINE_TEXT)
        if engine_text is not None:
            return pb_utils.Tensor("OUTPUT", engine_text.as_numpy().reshape(1, -1))
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0]
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()[0]
        texts = [self._tokenizer.decode(ids[:length]).encode() for ids, length in zip(tokens, lengths, strict=True)]
        return pb_utils.Tensor("OUTPUT", np.array([texts], dtype=object))
