"""Runs a Triton python model without a server: contract as read of `triton_python_backend_utils`, for one process.

    python -m support.triton_backend_double MODEL_DIR < requests.json > responses.json

MODEL_DIR is the folder of a model in a repository. Each request is {"id": …, "inputs": {name: values}}; values become
the arrays that the configuration declares. The answer holds, for each request, its responses up to the last: text as
text, numbers as lists, errors by their message. What a real server does with all this is tests/serving's to show.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from chunkkv.triton.repository.config_text import read_config

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
_TYPES = {"STRING": object, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": bool, "UINT64": np.uint64}


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL = range(3)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self.problem = output_tensors, error

    def as_json(self) -> dict[str, Any]:
        if self.problem is not None:
            return {"error": self.problem.message()}
        return {tensor.name: _plain(tensor.as_numpy()) for tensor in self.tensors}


class Sender:
    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.ended = threading.Event()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "nothing may follow the last response"
        if response is not None:
            self.responses.append(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return False


class Request:
    def __init__(self, request_id: str, inputs: dict[str, np.ndarray], parameters: dict[str, Any]) -> None:
        self.inputs, self.sender = inputs, Sender()
        self._id, self._parameters = request_id, parameters

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        return False


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, name: str, description: str, kind: int) -> None:
        pass

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Any:
        return SimpleNamespace(increment=lambda value: None, set=lambda value: None, observe=lambda value: None)


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def _plain(values: np.ndarray) -> Any:
    if values.dtype == object:
        return [value.decode() for value in values.reshape(-1)]
    return values.tolist()


def run(folder: Path, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the responses to each request, all sent to the model at once."""
    sys.modules["triton_python_backend_utils"] = sys.modules[__name__]
    config = read_config(folder / "config.pbtxt")
    kinds = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    types = {tensor.name: _TYPES[kinds[tensor.data_type].name.removeprefix("TYPE_")] for tensor in config.input}
    parameters = {name: {"string_value": value.string_value} for name, value in config.parameters.items()}
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model_config = json.dumps({"parameters": parameters})
    model.initialize({"model_config": model_config, "model_name": folder.name, "model_version": "1"})
    asked = []
    for request in requests:
        arrays = {}
        for name, value in request["inputs"].items():
            encoded = [text.encode() for text in value] if types[name] is object else value
            array = np.array(encoded, types[name])
            arrays[name] = array[None] if array.ndim > 1 else array.reshape(1, -1)
        asked.append(Request(request.get("id", ""), arrays, request.get("parameters", {})))
    responses = model.execute(asked)
    if responses is not None:
        return [[response.as_json()] for response in responses]
    for request in asked:
        assert request.sender.ended.wait(60), "an answer never ended"
    if hasattr(model, "finalize"):  # Triton, too, calls it only where there is one
        model.finalize()
    return [[response.as_json() for response in request.sender.responses] for request in asked]


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), json.load(sys.stdin))))
