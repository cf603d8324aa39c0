"""How other models reach the engine: a local socket of the process that holds it, without calls through Triton.

Triton crashes under many concurrent calls from one model to another, and each call holds a process. Here a request is a
connection to a name that only this server's model processes know: one line of JSON with its inputs, answered by one
line per response. Closing the connection cancels it. `tensorrt_llm_bls` asks so, and `postprocessing` has answers
stopped whose clients have left an ensemble. The name is in Linux's abstract namespace, so no file is left
behind, and connections of other users are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkkv.errors import RequestError
from chunkkv.logs import fields
from chunkkv.triton.models.backend import PbMetricFamilies, ReadTensor
from chunkkv.triton.repository.tensors import TensorSpec

NUMPY_TYPES: Mapping[str, Any] = {
    "STRING": object,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
MOST_BYTES = 1 << 28  # of one request, far above what Triton takes; the model refuses long prompts by itself
_LINE_END = b"\n"
_log = logging.getLogger(__name__)


def door_address(model: str) -> str:
    """Return the socket's name for a model of the tritonserver that started this process."""
    namespace = Path("/proc/self/ns/pid")
    container = namespace.stat().st_ino if namespace.exists() else 0
    return f"\0chunkkv-{container}-{os.getppid()}-{model}"


@dataclass(frozen=True)
class DoorTensor:
    """A named array, as PbTensor has it."""

    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        """Return the values."""
        return self.values


class DoorError:
    """An error of a response, with the codes that PbErrors has."""

    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        """Return its text."""
        return self._message


@dataclass(frozen=True)
class DoorResponse:
    """Output tensors or an error, as PbResponse has them."""

    output_tensors: Sequence[DoorTensor]
    error: DoorError | None = None


class DoorBackend:
    """What an AnswerListener needs of PythonBackend, for responses that go through the door."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError: Any = DoorError

    @property
    def MetricFamily(self) -> PbMetricFamilies:
        """Refuse; metrics belong to the process's own model."""
        raise NotImplementedError("the door makes no metrics")

    def Tensor(self, name: str, values: np.ndarray) -> DoorTensor:
        """Return a named array."""
        return DoorTensor(name, values)

    def InferenceResponse(self, *, output_tensors: Sequence[Any], error: Any = None) -> Any:
        """Return a response."""
        return DoorResponse(output_tensors, error)

    def get_input_tensor_by_name(self, request: Any, name: str) -> DoorTensor | None:
        """Return an input of a DoorRequest."""
        tensors: Mapping[str, DoorTensor] = request.tensors
        return tensors.get(name)


class DoorSender:
    """Sends the responses of one request from the connection's own thread, so that the batcher waits for nobody."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, response: Any = None, flags: int = 0) -> None:
        """Queue a DoorResponse."""
        is_last = flags == DoorBackend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        line: dict[str, Any] = {"last": is_last}
        if response is not None and response.error is not None:
            line |= {"error": response.error.message(), "code": response.error.code}
        elif response is not None:
            line["outputs"] = {tensor.name: _plain(tensor.values) for tensor in response.output_tensors}
        self.lines.put(json.dumps(line).encode() + _LINE_END)
        if is_last:
            self.lines.put(None)

    def is_cancelled(self) -> bool:
        """Return whether the other side has closed the connection; it sends nothing else after its request."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        return bool(readable)


@dataclass(frozen=True)
class DoorRequest:
    """A request that came through the door, as PbRequest has it."""

    id: str
    tensors: Mapping[str, DoorTensor]
    sender: DoorSender

    def request_id(self) -> str:
        """Return the id that the client chose, or an empty string."""
        return self.id

    def parameters(self) -> str:
        """Return an empty object: fields that are no inputs do not come through the door."""
        return "{}"

    def get_response_sender(self) -> DoorSender:
        """Return the sender for this request."""
        return self.sender

    def is_cancelled(self) -> bool:
        """Return whether the client has gone."""
        return self.sender.is_cancelled()


class EngineDoor:
    """Accepts connections and hands each one's request to the engine's model.

    Parameters
    ----------
    address : name of the socket.
    inputs : the inputs that a request may have.
    queue_request : takes a request; whatever is wrong with it becomes its client's answer.
    stop_answer : ends the answer of a number, if it is still open.
    """

    def __init__(
        self,
        address: str,
        inputs: Sequence[TensorSpec],
        queue_request: Callable[[DoorRequest], None],
        stop_answer: Callable[[int], None],
    ) -> None:
        self._inputs, self._queue_request, self._stop_answer = inputs, queue_request, stop_answer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(address)
        self._socket.listen(512)
        threading.Thread(target=self._accept, name="chunkkv-door", daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone does not
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), name="chunkkv-door", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        sender = DoorSender(connection)
        try:
            with connection:
                if _peer_user(connection) != os.getuid():
                    return
                content = _content(connection)
                if "stop" in content:
                    self._stop_answer(int(content["stop"]))
                    return
                self._queue_request(self._request(content, sender))
                while (line := sender.lines.get()) is not None:
                    connection.sendall(line)
        except OSError:  # the other side has gone, which the batcher notices, too
            return
        except Exception as error:  # of a request that is not as it should be: nobody else may suffer
            _log.warning("door_failed", extra=fields(message=f"{type(error).__name__}: {error}"))

    def _request(self, content: Mapping[str, Any], sender: DoorSender) -> DoorRequest:
        kinds = {tensor.name: tensor.data_type for tensor in self._inputs}
        tensors = {name: DoorTensor(name, _array(values, kinds[name])) for name, values in content["inputs"].items()}
        return DoorRequest(str(content["id"]), tensors, sender)


def request_line(request_id: str, inputs: Sequence[TensorSpec], read: ReadTensor) -> bytes:
    """Return the line that sends a request through the door; `read` reads its tensors."""
    arrays = ((tensor.name, read(tensor.name)) for tensor in inputs)
    values = {name: _plain(array.reshape(-1)) for name, array in arrays if array is not None}
    return json.dumps({"id": request_id, "inputs": values}).encode() + _LINE_END


def stop_answer(address: str, number: int) -> None:
    """Have the engine's process end the answer of that number; where it cannot be reached, nothing is left to end."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        connection.sendall(json.dumps({"stop": number}).encode() + _LINE_END)


def _content(connection: socket.socket) -> dict[str, Any]:
    """Return the JSON object that the other side sends first."""
    with connection.makefile("rb") as file:
        line = file.readline(MOST_BYTES)
    if not line.endswith(_LINE_END):
        raise RequestError(f"a request has more than {MOST_BYTES} bytes")
    content: dict[str, Any] = json.loads(line)
    return content


def _plain(array: np.ndarray) -> list[Any]:
    """Return an array as JSON has it; text that is not UTF-8 keeps its bytes as surrogates."""
    if array.dtype != object:
        values: list[Any] = array.tolist()
        return values
    return [_text(value) for value in array.reshape(-1)]


def _array(values: list[Any], data_type: str) -> np.ndarray:
    """Return the array of values that _plain made."""
    if data_type == "STRING":
        values = [value.encode(errors="surrogateescape") for value in values]
    return np.array(values, dtype=NUMPY_TYPES[data_type])


def _text(value: object) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def _peer_user(connection: socket.socket) -> int:
    """Return the user id of the process on the other side."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)
