"""The Triton model of layout `single`: text in, streamed text out, around a ChunkKV engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # its classes exist only after this module was imported

from chunkkv.errors import RequestError
from chunkkv.requests import Prompt
from chunkkv.results import StreamEvent
from chunkkv.triton.models.inputs import Wish, prompt_text, refuse_unknown, wish, words
from chunkkv.triton.models.serving import Client, Serving
from chunkkv.triton.repository.write import SINGLE_INPUTS

KNOWN_INPUTS = tuple(name for name, _, _ in SINGLE_INPUTS)


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that config.pbtxt names."""
        self._serving = Serving(pb_utils, args)

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; answers are sent from the batcher's thread."""
        for request in requests:
            client = Client(self._serving, request, pb_utils, _tensors)
            self._serving.submit(client, lambda request=request, client=client: self._read(request, client))

    def finalize(self) -> None:
        """End what is open."""
        self._serving.close()

    def _read(self, request: Any, client: Client) -> tuple[Prompt, Wish]:
        def read(name: str) -> np.ndarray | None:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        refuse_unknown(request.parameters(), KNOWN_INPUTS)
        session = self._serving.session
        prompt = prompt_text(read, "text_input", self._serving.max_prompt_bytes)
        if bad := words(read, "bad_words"):
            raise RequestError(f"bad_words has {bad[0]!r}; this engine cannot forbid words: leave it out")
        asked = wish(read, words(read, "stop_words"), session.eos_token_ids)
        client.prompt = prompt if asked.echo else ""
        return prompt, asked


def _tensors(client: Client, events: list[StreamEvent]) -> list[Any]:
    """Return the outputs of one response; those of the whole answer come with its last."""
    text = client.prompt + "".join(event.text for event in events)
    client.prompt = ""
    ids = [token for event in events for token in event.token_ids]
    values: dict[str, np.ndarray] = {
        "text_output": np.array([[text.encode()]], dtype=object),
        "output_ids": np.array([ids], np.int32),
    }
    if (result := events[-1].finished) is not None:
        costs = result.statistics
        values["finish_reason"] = np.array([[result.finish_reason.encode()]], dtype=object)
        for name, number in (
            ("num_input_tokens", costs.prompt_tokens),
            ("num_output_tokens", costs.new_tokens),
            ("kept_tokens", costs.kept_tokens),
        ):
            values[name] = np.array([[number]], np.int32)
        values["kv_cache_bytes"] = np.array([[costs.cache_bytes]], np.int64)
        for name, seconds in (
            ("ttft_ms", costs.ttft_s),
            ("tpot_ms", costs.tpot_s or 0.0),
            ("prefill_ms", costs.prefill_s),
            ("compress_ms", costs.compress_s),
        ):
            values[name] = np.array([[seconds * 1e3]], np.float32)
    return [pb_utils.Tensor(name, value) for name, value in values.items()]
