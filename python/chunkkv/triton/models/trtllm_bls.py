"""The Triton model `tensorrt_llm_bls` of layout `trtllm`: the ensemble's work, with cancelling that reaches the engine.

Triton does not hand a cancelled ensemble request on to the step that runs; this model sends that step a stop request.
BLS, business logic scripting, is Triton's name for a model that calls other models of its server.
"""

from __future__ import annotations

import threading
import uuid

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.triton.models.answers import ERROR_CODES
from chunkkv.triton.models.backend import PbModelRequest, PbRequest, PbTensor, ResponseSender
from chunkkv.triton.models.serving import Parameters
from chunkkv.triton.repository.tensors import (
    ENGINE_FROM_PREPROCESSING,
    ENGINE_FROM_REQUEST,
    ENGINE_TEXT,
    PREPROCESSING_FROM_REQUEST,
    REPORT_OUTPUTS,
    TensorMap,
)

CANCEL_POLL_S = 0.05
_REPORT_NAMES = tuple(tensor.name for tensor in REPORT_OUTPUTS)


class TritonPythonModel:
    """What Triton's python backend calls; each instance serves one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters."""
        parameters = Parameters(args["model_config"])
        self._engine = parameters.text("tensorrt_llm_model_name", "tensorrt_llm")
        self._accumulates = parameters.text("accumulate_tokens", "false") == "true"

    def execute(self, requests: list[PbRequest]) -> None:
        """Serve the requests, one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                problem = self._serve(request, sender)
            except Exception as error:
                problem = f"{ERROR_CODES['error']}: {type(error).__name__}: {error}"
            if problem is not None:
                response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(problem))
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _serve(self, request: PbRequest, sender: ResponseSender) -> str | None:
        """Stream the engine's answer to `sender`; returns what went wrong."""
        preprocessed = pb_utils.InferenceRequest(
            model_name="preprocessing",
            requested_output_names=[source for _, source in ENGINE_FROM_PREPROCESSING],
            inputs=_renamed_inputs(request, PREPROCESSING_FROM_REQUEST),
        ).exec()
        if preprocessed.has_error():
            return preprocessed.error().message()
        inputs = _renamed_inputs(request, ENGINE_FROM_REQUEST)
        for name, source in ENGINE_FROM_PREPROCESSING:
            inputs.append(pb_utils.Tensor(name, _output_array(preprocessed, source)))
        # Two clients may choose the same id, and a stop request must end the answer of one of them only.
        unique_id = f"{request.request_id()}-{uuid.uuid4().hex[:8]}".lstrip("-")
        engine_id = unique_id
        engine_request = pb_utils.InferenceRequest(
            model_name=self._engine,
            request_id=engine_id,
            requested_output_names=[ENGINE_TEXT, *_REPORT_NAMES],
            inputs=inputs,
        )
        ended = threading.Event()
        threading.Thread(target=self._stop_when_cancelled, args=(sender, engine_id, ended), daemon=True).start()
        try:
            return self._stream(engine_request, sender)
        finally:
            ended.set()

    def _stream(self, engine_request: PbModelRequest, sender: ResponseSender) -> str | None:
        """Send each response of the engine's model on; returns what went wrong."""
        text = b""
        for response in engine_request.exec(decoupled=True):
            if response.has_error():
                return response.error().message()
            if not response.output_tensors():
                continue
            new_text = _output_array(response, ENGINE_TEXT).reshape(-1)[0]
            text = text + new_text if self._accumulates else new_text
            outputs = [pb_utils.Tensor("text_output", np.array([[text]], dtype=object))]
            outputs += [pb_utils.Tensor(name, _output_array(response, name)) for name in _REPORT_NAMES]
            sender.send(pb_utils.InferenceResponse(output_tensors=outputs))
        return None

    def _stop_when_cancelled(self, sender: ResponseSender, engine_id: str, ended: threading.Event) -> None:
        """Stop the engine's request once the client has gone; repeated, because it may not have reached the engine."""
        while not ended.wait(CANCEL_POLL_S):
            if sender.is_cancelled():
                self._stop(engine_id)

    def _stop(self, engine_id: str) -> None:
        """Ask the engine's model to end the request of this id."""
        # The engine's model requires these three inputs, but does not read them in a stop request.
        unread = np.ones((1, 1), np.int32)
        inputs = [pb_utils.Tensor(name, unread) for name in ("input_ids", "input_lengths", "request_output_len")]
        inputs.append(pb_utils.Tensor("stop", np.array([[True]])))
        request = pb_utils.InferenceRequest(
            model_name=self._engine, request_id=engine_id, requested_output_names=[], inputs=inputs
        )
        for _ in request.exec(decoupled=True):
            pass


def _renamed_inputs(request: PbRequest, names: TensorMap) -> list[PbTensor]:
    """Return those inputs of a request that it has, under the names of the model they go to."""
    tensors = [(name, pb_utils.get_input_tensor_by_name(request, source)) for name, source in names]
    return [pb_utils.Tensor(name, tensor.as_numpy()) for name, tensor in tensors if tensor is not None]


def _output_array(response: object, name: str) -> np.ndarray:
    return pb_utils.get_output_tensor_by_name(response, name).as_numpy()
