"""The Triton model `postprocessing` of layout `trtllm`: token ids to text."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from chunkkv.text.tokenizer import Tokenizer
from chunkkv.triton.models.backend import PbRequest, PbResponse, PbTensor
from chunkkv.triton.models.serving import Parameters
from chunkkv.triton.repository.tensors import ENGINE_TEXT


class TritonPythonModel:
    """What Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that config.pbtxt names."""
        self._tokenizer = Tokenizer.from_dir(Parameters(args["model_config"]).text("tokenizer_dir"))

    def execute(self, requests: list[PbRequest]) -> list[PbResponse]:
        """Return the text that the engine's model sent along, or else that of the ids."""
        return [pb_utils.InferenceResponse(output_tensors=[self._text(request)]) for request in requests]

    def _text(self, request: PbRequest) -> PbTensor:
        engine_text = pb_utils.get_input_tensor_by_name(request, ENGINE_TEXT)
        if engine_text is not None:
            return pb_utils.Tensor("OUTPUT", engine_text.as_numpy().reshape(1, -1))
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0]
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()[0]
        texts = [self._tokenizer.decode(ids[:length]).encode() for ids, length in zip(tokens, lengths, strict=True)]
        return pb_utils.Tensor("OUTPUT", np.array([texts], dtype=object))
