"""The Triton model `tensorrt_llm_bls` of layout `trtllm`: the ensemble's work, with cancelling that reaches the engine.

Triton does not hand a cancelled ensemble request on to the step that runs; this model sends that step a stop request.
"""

from __future__ import annotations

import threading
import uuid
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.triton.models.serving import INTERNAL, Parameters
from chunkkv.triton.repository.write_trtllm import FROM_PREPROCESSING, HANDED_ON, REPORTED, TEXT
from chunkkv.triton.server.health import CANARY_ID

WATCH_S = 0.05
_TO_PREPROCESSING = (
    ("QUERY", "text_input"),
    ("REQUEST_OUTPUT_LEN", "max_tokens"),
    ("BAD_WORDS_DICT", "bad_words"),
    ("STOP_WORDS_DICT", "stop_words"),
    ("END_ID", "end_id"),
    ("PAD_ID", "pad_id"),
)


class TritonPythonModel:
    """What Triton's python backend calls; each instance serves one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters."""
        parameters = Parameters(args["model_config"])
        self._engine = parameters.text("tensorrt_llm_model_name", "tensorrt_llm")
        self._accumulates = parameters.text("accumulate_tokens", "false") == "true"

    def execute(self, requests: list[Any]) -> None:
        """Serve the requests, one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                error = self._serve(request, sender)
            except Exception as problem:
                error = f"{INTERNAL}: {type(problem).__name__}: {problem}"
            if error is not None:
                response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error))
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _serve(self, request: Any, sender: Any) -> str | None:
        """Stream the engine's answer to `sender`; returns what went wrong."""
        found = _call("preprocessing", _renamed(request, _TO_PREPROCESSING), [name for _, name in FROM_PREPROCESSING])
        if found.has_error():
            return found.error().message()
        inputs = _renamed(request, HANDED_ON)
        for name, source in FROM_PREPROCESSING:
            tensor = pb_utils.get_output_tensor_by_name(found, source)
            inputs.append(pb_utils.Tensor(name, tensor.as_numpy()))
        own = f"{request.request_id()}-{uuid.uuid4().hex[:8]}".lstrip("-")  # clients may choose the same
        number = CANARY_ID if request.request_id() == CANARY_ID else own
        asked = pb_utils.InferenceRequest(
            model_name=self._engine,
            request_id=number,
            requested_output_names=[TEXT, *(name for name, _, _ in REPORTED)],
            inputs=inputs,
        )
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(sender, number, ended), daemon=True).start()
        try:
            return self._hand_on(asked, sender)
        finally:
            ended.set()

    def _hand_on(self, asked: Any, sender: Any) -> str | None:
        before = b""
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return response.error().message()
            if not response.output_tensors():
                continue
            text = pb_utils.get_output_tensor_by_name(response, TEXT).as_numpy().reshape(-1)[0]
            before = before + text if self._accumulates else text
            outputs = [pb_utils.Tensor("text_output", np.array([[before]], dtype=object))]
            for name, _, _ in REPORTED:
                outputs.append(pb_utils.Tensor(name, pb_utils.get_output_tensor_by_name(response, name).as_numpy()))
            sender.send(pb_utils.InferenceResponse(output_tensors=outputs))
        return None

    def _watch(self, sender: Any, number: str, ended: threading.Event) -> None:
        """Stop the engine's request once the client has gone; again and again, for it may not have got there yet."""
        while not ended.wait(WATCH_S):
            if sender.is_cancelled():
                self._stop(number)

    def _stop(self, number: str) -> None:
        """Ask the engine's model to end the request of this id."""
        one = np.ones((1, 1), np.int32)
        inputs = [pb_utils.Tensor(name, one) for name in ("input_ids", "input_lengths", "request_output_len")]
        inputs.append(pb_utils.Tensor("stop", np.array([[True]])))
        request = pb_utils.InferenceRequest(
            model_name=self._engine, request_id=number, requested_output_names=[], inputs=inputs
        )
        for _ in request.exec(decoupled=True):
            pass


def _renamed(request: Any, names: tuple[tuple[str, str], ...]) -> list[Any]:
    found = [(name, pb_utils.get_input_tensor_by_name(request, source)) for name, source in names]
    return [pb_utils.Tensor(name, tensor.as_numpy()) for name, tensor in found if tensor is not None]


def _call(model: str, inputs: list[Any], outputs: list[str]) -> Any:
    return pb_utils.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=inputs).exec()
