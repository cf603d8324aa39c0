"""What the models use of `triton_python_backend_utils`, the module that Triton's python backend brings along.

It exists only in the processes that tritonserver starts, and it ships without types; Pb in a name here stands for the
python backend, under whose own name the module has the class. Its classes are set after it was
imported, so use `pb_utils.Tensor` and not `from triton_python_backend_utils import Tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

ReadTensor = Callable[[str], "np.ndarray | None"]  # an input tensor by name, None where the request has none


class PbTensor(Protocol):
    """A named array."""

    def as_numpy(self) -> np.ndarray:
        """Return the values; strings are an array of bytes objects."""


class PbError(Protocol):
    """An error as a response carries it."""

    def message(self) -> str:
        """Return its text."""


class PbResponse(Protocol):
    """One of the responses to a request: output tensors, or an error."""

    def error(self) -> PbError:
        """Return that error."""

    def output_tensors(self) -> Sequence[PbTensor]:
        """Return the tensors; a response that only ends an answer has none."""


class ResponseSender(Protocol):
    """Sends any number of responses to the client of one request, from any thread."""

    def send(self, response: PbResponse | None = None, flags: int = 0) -> None:
        """Send a response; the flag TRITONSERVER_RESPONSE_COMPLETE_FINAL says that it is the last."""

    def is_cancelled(self) -> bool:
        """Return whether the client has gone."""


class PbRequest(Protocol):
    """A request that tritonserver hands to execute()."""

    def request_id(self) -> str:
        """Return the id that the client chose, or an empty string."""

    def parameters(self) -> str:
        """Return as a JSON object what the client sent beside tensors."""

    def get_response_sender(self) -> ResponseSender:
        """Return the sender for this request."""

    def is_cancelled(self) -> bool:
        """Return whether the client has gone, of a request with one response."""


class PbMetric(Protocol):
    """One time series of the server's metrics page."""

    def increment(self, value: float) -> None:
        """Add to a counter."""

    def set(self, value: float) -> None:
        """Set a gauge."""

    def observe(self, value: float) -> None:
        """Add a value to a histogram."""


class PbMetricFamily(Protocol):
    """A metric's name and kind, with one PbMetric for each set of labels."""

    def Metric(self, *, labels: dict[str, str], buckets: Sequence[float] = ...) -> PbMetric:
        """Return the time series with these labels; a histogram needs its buckets."""


class PbMetricFamilies(Protocol):
    """Makes metric families."""

    COUNTER: int
    GAUGE: int
    HISTOGRAM: int

    def __call__(self, *, name: str, description: str, kind: int) -> PbMetricFamily:
        """Return a new family; its metrics are removed when it is."""


class PbErrors(Protocol):
    """Makes errors; the attributes are codes that Triton maps to HTTP and gRPC statuses."""

    INVALID_ARG: int
    UNAVAILABLE: int
    INTERNAL: int

    def __call__(self, message: str, code: int = ...) -> PbError:
        """Return an error."""


class PythonBackend(Protocol):
    """The module `triton_python_backend_utils` itself."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL: int

    @property
    def TritonError(self) -> PbErrors:
        """Makes errors."""

    @property
    def MetricFamily(self) -> PbMetricFamilies:
        """Makes metric families."""

    def Tensor(self, name: str, values: np.ndarray) -> PbTensor:
        """Return a named array."""

    def InferenceResponse(self, *, output_tensors: Sequence[PbTensor], error: PbError | None = None) -> PbResponse:
        """Return a response."""

    def get_input_tensor_by_name(self, request: PbRequest, name: str) -> PbTensor | None:
        """Return an input of a request, None where it has none of this name."""


def tensor_reader(backend: PythonBackend, request: PbRequest) -> ReadTensor:
    """Return a function that reads the request's tensors by name."""

    def read(name: str) -> np.ndarray | None:
        tensor = backend.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return read
