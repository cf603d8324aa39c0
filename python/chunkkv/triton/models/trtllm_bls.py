"""The Triton model `tensorrt_llm_bls` of layout `trtllm`: text in, streamed text out, with cancelling.

It hands each request to the process of the engine's model through its door (engine_door.py) and the responses back, so
it serves any number at once and calls no other model through Triton. BLS, business logic scripting, is what Triton
calls a model that uses other models; TensorRT-LLM's model of this name does.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.triton.models.backend import PbRequest, PbTensor, ResponseSender, tensor_reader
from chunkkv.triton.models.engine_door import NUMPY_TYPES, door_address, request_line
from chunkkv.triton.models.serving import Parameters, watch_parent
from chunkkv.triton.repository.tensors import BLS_INPUTS, LOG_PROB_OUTPUTS, TEXT_OUTPUTS

CANCEL_POLL_S = 0.05
CONNECT_S = 5.0  # the engine's model may still load
_KINDS = {tensor.name: NUMPY_TYPES[tensor.data_type] for tensor in (*TEXT_OUTPUTS, *LOG_PROB_OUTPUTS)}


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters."""
        parameters = Parameters(args["model_config"])
        self._engine = parameters.text("tensorrt_llm_model_name", "tensorrt_llm")
        self._accumulates = parameters.text("accumulate_tokens", "false") == "true"
        watch_parent()

    def execute(self, requests: list[PbRequest]) -> None:
        """Serve each request from a thread of its own."""
        for request in requests:
            line = request_line(request.request_id(), BLS_INPUTS, tensor_reader(pb_utils, request))
            sender = request.get_response_sender()
            threading.Thread(target=self._serve, args=(line, sender), name="chunkkv-bls", daemon=True).start()

    def _serve(self, line: bytes, sender: ResponseSender) -> None:
        """Send the engine's responses to `sender`; nothing uses it after its last response."""
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        text = ""
        try:
            with _connection(door_address(self._engine)) as connection:
                connection.sendall(line)
                for answer in _answers(connection, sender):
                    flags = final if answer["last"] else 0
                    if "error" in answer:
                        error = pb_utils.TritonError(answer["error"], getattr(pb_utils.TritonError, answer["code"]))
                        sender.send(pb_utils.InferenceResponse(output_tensors=[], error=error), flags=flags)
                    elif "outputs" in answer:
                        text = text + answer["outputs"]["text_output"][0] if self._accumulates else ""
                        response = pb_utils.InferenceResponse(output_tensors=_tensors(answer["outputs"], text))
                        sender.send(response, flags=flags)
                    else:
                        sender.send(flags=flags)
                    if answer["last"]:
                        return
            sender.send(flags=final)  # the client has gone
        except (OSError, ValueError) as problem:
            message = f"CHUNKKV_INTERNAL: model {self._engine} does not answer ({problem}); ask again later"
            error = pb_utils.TritonError(message)
            sender.send(pb_utils.InferenceResponse(output_tensors=[], error=error), flags=final)


def _connection(address: str) -> socket.socket:
    """Return a connection to the engine's process; raises OSError where there is none after CONNECT_S seconds."""
    until = time.monotonic() + CONNECT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(CANCEL_POLL_S)


def _answers(connection: socket.socket, sender: ResponseSender) -> Iterator[dict[str, Any]]:
    """Yield the engine's responses as they come; ends early where the client has gone."""
    connection.settimeout(CANCEL_POLL_S)
    received, asked_at = b"", time.monotonic()
    while True:
        try:
            piece = connection.recv(1 << 16)
        except TimeoutError:
            piece = None
        if (now := time.monotonic()) - asked_at >= CANCEL_POLL_S:
            asked_at = now
            if sender.is_cancelled():
                return
        if piece is None:
            continue
        if not piece:
            raise ConnectionResetError("its process closed the connection")
        *lines, received = (received + piece).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _tensors(outputs: dict[str, list[Any]], text: str) -> list[PbTensor]:
    """Return the output tensors of a response; `text` takes the place of its own where it is not empty.

    The door keeps the shape of numbers, and hands over text as a list.
    """
    arrays = {
        name: np.array([values] if _KINDS[name] is object else values, dtype=_KINDS[name])
        for name, values in outputs.items()
        if name != "text_output"
    }
    shown = text or outputs["text_output"][0]
    arrays["text_output"] = np.array([[shown.encode(errors="surrogateescape")]], dtype=object)
    return [pb_utils.Tensor(name, array) for name, array in arrays.items()]
