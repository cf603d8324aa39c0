"""The Triton model `tensorrt_llm` of layout `trtllm`: token ids in, token ids out, around a ChunkKV engine."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.errors import RequestError
from chunkkv.requests import Prompt
from chunkkv.results import StreamEvent
from chunkkv.triton.models.inputs import Wish, one, wish
from chunkkv.triton.models.serving import Client, Parameters, Serving
from chunkkv.triton.models.words import unpack
from chunkkv.triton.repository.write_trtllm import TEXT

NAMES = {
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
        self._clients: dict[str, Client] = {}
        self._lock = threading.Lock()

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; one with `stop` ends the running request of the same id."""
        for request in requests:
            if one(_reader(request), "stop", False):
                with self._lock:
                    running = self._clients.pop(request.request_id(), None)
                if running is not None:
                    running.stopped.set()
                request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            client = _EngineClient(self._serving, request, pb_utils, _tensors)
            client.on_end = self._forget
            if request.request_id():
                with self._lock:
                    self._clients[client.name] = client
            self._serving.submit(client, lambda request=request, client=client: self._read(request, client))

    def finalize(self) -> None:
        """End what is open."""
        self._serving.close()

    def _forget(self, client: Client) -> None:
        with self._lock:
            if self._clients.get(client.name) is client:
                del self._clients[client.name]

    def _read(self, request: Any, client: Client) -> tuple[Prompt, Wish]:
        read, session = _reader(request), self._serving.session
        given = read("input_ids")
        if given is None:
            raise RequestError("input_ids is missing; give the prompt's token ids")
        ids, length = given.reshape(-1), one(read, "input_lengths")
        if not 0 <= length <= ids.size:
            raise RequestError(f"input_lengths is {length}; input_ids has {ids.size}")
        ids = ids[:length].tolist()
        if unpack(read("bad_words_list"), "bad_words_list"):
            raise RequestError("bad_words_list has words; this engine cannot forbid words: leave it out")
        stop = []
        for word in unpack(read("stop_words_list"), "stop_words_list"):
            if session.tokenizer is None:
                raise RequestError("stop words need a tokenizer; this engine was built without one")
            stop.append(session.tokenizer.decode(word))
        asked = wish(read, [text for text in stop if text], session.eos_token_ids, NAMES)
        excludes = one(read, "exclude_input_in_output", self._excludes_input)
        if not excludes and not asked.stream:
            client.prompt_ids = ids
            client.prompt = session.tokenizer.decode(ids) if session.tokenizer is not None else ""
        return ids, asked


class _EngineClient(Client):
    prompt_ids: list[int] = []  # noqa: RUF012 - replaced, never changed
    sent = 0

    def on_end(self, client: Client) -> None:
        """Called with this client once its answer has ended."""

    def on_event(self, event: StreamEvent) -> None:
        """Send and, at the end, forget."""
        try:
            super().on_event(event)
        finally:
            if event.finished is not None:
                self.on_end(self)

    def on_error(self, error: Exception) -> None:
        """Send and forget."""
        try:
            super().on_error(error)
        finally:
            self.on_end(self)


def _reader(request: Any) -> Any:
    def read(name: str) -> np.ndarray | None:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return read


def _tensors(client: _EngineClient, events: list[StreamEvent]) -> list[Any]:
    """Return the outputs of one response; the counts are those so far."""
    new = [token for event in events for token in event.token_ids]
    ids, text = [*client.prompt_ids, *new], client.prompt + "".join(event.text for event in events)
    client.prompt_ids, client.prompt = [], ""
    client.sent += len(new)
    finished = events[-1].finished
    reason = finished.finish_reason if finished is not None else ""
    request = client.request
    numbers = {
        "sequence_length": np.array([[len(ids)]], np.int32),
        "batch_index": np.zeros((1, 1), np.int32),
        "sequence_index": np.zeros((1, 1), np.int32),
        "num_input_tokens": np.array([[len(request.ids)]], np.int32),
        "num_output_tokens": np.array([[client.sent]], np.int32),
        "kept_tokens": np.array([[request.kept_tokens]], np.int32),
    }
    return [
        pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
        pb_utils.Tensor(TEXT, np.array([[text.encode()]], dtype=object)),
        pb_utils.Tensor("finish_reason", np.array([[reason.encode()]], dtype=object)),
        *(pb_utils.Tensor(name, value) for name, value in numbers.items()),
    ]
