"""The Triton model `preprocessing` of layout `trtllm`: text to token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.errors import ChunkKVError
from chunkkv.text.tokenizer import Tokenizer
from chunkkv.triton.models.inputs import one, prompt_text, words
from chunkkv.triton.models.serving import CODES, Parameters
from chunkkv.triton.models.words import pack

MAX_PROMPT_BYTES = 1 << 20


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that config.pbtxt names."""
        parameters = Parameters(args["model_config"])
        self._tokenizer = Tokenizer.from_dir(parameters.text("tokenizer_dir"))
        self._max_bytes = parameters.number("max_prompt_bytes", int, MAX_PROMPT_BYTES)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return token ids and word lists for each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        def read(name: str) -> np.ndarray | None:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        try:
            outputs = self._outputs(read)
        except ChunkKVError as error:
            message = f"{CODES['invalid']}: {error}"
            return pb_utils.InferenceResponse(
                output_tensors=[], error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            )
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(*pair) for pair in outputs.items()])

    def _outputs(self, read: Any) -> dict[str, np.ndarray]:
        prompt = prompt_text(read, "QUERY", self._max_bytes)
        ids = self._tokenizer.encode(prompt) if prompt.strip() else []
        first_end = next(iter(self._tokenizer.eos_token_ids), -1)
        end = one(read, "END_ID", first_end)
        lists = {
            kind: pack([self._tokenizer.encode(word, add_special_tokens=False) for word in words(read, f"{kind}_DICT")])
            for kind in ("BAD_WORDS", "STOP_WORDS")
        }
        return {
            "INPUT_ID": np.array([ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": np.array([[one(read, "REQUEST_OUTPUT_LEN")]], np.int32),
            "BAD_WORDS_IDS": lists["BAD_WORDS"][None],
            "STOP_WORDS_IDS": lists["STOP_WORDS"][None],
            "OUT_END_ID": np.array([[end]], np.int32),
            "OUT_PAD_ID": np.array([[one(read, "PAD_ID", end)]], np.int32),
        }
