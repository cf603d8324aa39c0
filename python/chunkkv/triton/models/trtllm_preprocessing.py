"""The Triton model `preprocessing` of layout `trtllm`: text to token ids."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.errors import ChunkKVError
from chunkkv.text.tokenizer import Tokenizer
from chunkkv.triton.models.answers import ERROR_CODES
from chunkkv.triton.models.backend import PbRequest, PbResponse, ReadTensor, tensor_reader
from chunkkv.triton.models.inputs import pack_word_lists, prompt_text, scalar, strings
from chunkkv.triton.models.serving import Parameters

MAX_PROMPT_BYTES = 1 << 20


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that config.pbtxt names."""
        parameters = Parameters(args["model_config"])
        self._tokenizer = Tokenizer.from_dir(parameters.text("tokenizer_dir"))
        self._max_bytes = parameters.number("max_prompt_bytes", int, MAX_PROMPT_BYTES)

    def execute(self, requests: list[PbRequest]) -> list[PbResponse]:
        """Return token ids and word lists for each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: PbRequest) -> PbResponse:
        try:
            values = self._output_values(tensor_reader(pb_utils, request))
        except ChunkKVError as error:
            message = f"{ERROR_CODES['invalid']}: {error}"
            return pb_utils.InferenceResponse(
                output_tensors=[], error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
            )
        outputs = [pb_utils.Tensor(name, value) for name, value in values.items()]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _output_values(self, read: ReadTensor) -> dict[str, np.ndarray]:
        prompt = prompt_text(read, "QUERY", self._max_bytes)
        ids = self._tokenizer.encode_prompt(prompt) if prompt.strip() else []
        end_id = scalar(read, "END_ID", next(iter(self._tokenizer.eos_token_ids), -1))
        return {
            "INPUT_ID": np.array([ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": np.array([[scalar(read, "REQUEST_OUTPUT_LEN")]], np.int32),
            "BAD_WORDS_IDS": self._word_lists(read, "BAD_WORDS_DICT")[None],
            "STOP_WORDS_IDS": self._word_lists(read, "STOP_WORDS_DICT")[None],
            "OUT_END_ID": np.array([[end_id]], np.int32),
            "OUT_PAD_ID": np.array([[scalar(read, "PAD_ID", end_id)]], np.int32),
        }

    def _word_lists(self, read: ReadTensor, name: str) -> np.ndarray:
        return pack_word_lists([self._tokenizer.encode(word, add_special_tokens=False) for word in strings(read, name)])
