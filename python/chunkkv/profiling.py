"""Named ranges around the stages of a generation: for Nsight and other NVTX tools, and for a recorder in this process.

With neither enabled, a range costs one function call. NVTX is switched on by a tool (which sets
NVTX_INJECTION64_PATH before the process starts) or by enable_nvtx(); recording() needs no tool.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

from chunkkv.errors import BackendUnavailableError

DOMAIN = "chunkkv"
PAYLOAD_SHIFT = 10**9  # decimal, so that both numbers can be read off in a tool's window
TOOL_VARIABLE = "NVTX_INJECTION64_PATH"
_COLOURS = {"request": "darkgreen", "load": "gray", "prefill": "blue", "decode": "orange", "sample": "yellow"}
_COMPRESSION_COLOUR = "red"


class Identified(Protocol):
    """A request, as far as ranges are marked with it."""

    @property
    def request_id(self) -> int:
        """Number of the request, from 1."""

    @property
    def kept_tokens(self) -> int:
        """Prompt tokens that stay in its cache."""


class Sink(Protocol):
    """Takes ranges; called from any thread."""

    def open(self, name: str, request_id: int, kept_tokens: int, nested: bool) -> Any:
        """Begin a range and return what close() needs."""

    def close(self, handle: Any) -> None:
        """End a range; a nested one ends on the thread that opened it, and the last one opened ends first."""


_sinks: tuple[Sink, ...] = ()
_lock = threading.Lock()
_NOTHING = nullcontext()


def range(name: str, *, request_id: int = 0, kept_tokens: int = 0) -> AbstractContextManager[None]:
    """Return a context that marks a stage of this thread; ranges nest, so a generator must not yield inside one.

    Parameters
    ----------
    name : str
        The stage, such as "prefill"; docs/profiling.md lists them.
    request_id : int, default 0
        The request that the stage serves; 0 where it serves several, or none.
    kept_tokens : int, default 0
        Prompt tokens that stay in the cache, summed over the requests that the stage serves.
    """
    return _Range(_sinks, name, request_id, kept_tokens, True) if _sinks else _NOTHING


def span(name: str, *, request_id: int = 0, kept_tokens: int = 0) -> AbstractContextManager[None]:
    """Return a context that marks a time of the process, such as a request's life; parameters as for range().

    Spans may overlap and may end on another thread; a generator may yield inside one.
    """
    return _Range(_sinks, name, request_id, kept_tokens, False) if _sinks else _NOTHING


def range_of(name: str, requests: Sequence[Identified], nested: bool = True) -> AbstractContextManager[None]:
    """Return the range of a stage that serves `requests` (at least one) together, or its span if not `nested`."""
    if not _sinks:
        return _NOTHING
    request_id = requests[0].request_id if len(requests) == 1 else 0
    return _Range(_sinks, name, request_id, sum(request.kept_tokens for request in requests), nested)


def payload(request_id: int, kept_tokens: int) -> int:
    """Return the one number that an NVTX range carries: request_id · 10⁹ + kept_tokens."""
    return request_id * PAYLOAD_SHIFT + kept_tokens


def split_payload(value: int) -> tuple[int, int]:
    """Return request_id and kept_tokens of a range's payload."""
    return divmod(value, PAYLOAD_SHIFT)


class _Range:
    __slots__ = ("_handles", "_kept_tokens", "_name", "_nested", "_request_id", "_sinks")

    def __init__(self, sinks: tuple[Sink, ...], name: str, request_id: int, kept_tokens: int, nested: bool) -> None:
        self._sinks = sinks  # a range ends where it began, also when sinks come and go meanwhile
        self._name, self._request_id, self._kept_tokens, self._nested = name, request_id, kept_tokens, nested

    def __enter__(self) -> None:
        self._handles = [
            sink.open(self._name, self._request_id, self._kept_tokens, self._nested) for sink in self._sinks
        ]

    def __exit__(self, *error: object) -> None:
        for sink, handle in zip(reversed(self._sinks), reversed(self._handles), strict=True):
            sink.close(handle)


class RecordedRange(NamedTuple):
    """A finished range; times are monotonic nanoseconds, `depth` counts the nested ranges around it on its thread."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    depth: int
    nested: bool
    request_id: int
    kept_tokens: int


class Recorder:
    """Keeps the finished ranges of all threads, at most `limit`; those that end later are counted in `dropped`."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self._limit = limit
        self._ranges: list[RecordedRange] = []
        self._lock = threading.Lock()
        self._depths = threading.local()
        self.dropped = 0

    @property
    def ranges(self) -> tuple[RecordedRange, ...]:
        """The ranges that have ended so far, by start; a range comes before those inside it."""
        with self._lock:
            return tuple(sorted(self._ranges, key=lambda recorded: (recorded.start_ns, -recorded.end_ns)))

    def of_request(self, request_id: int) -> tuple[RecordedRange, ...]:
        """Return the ranges of one request."""
        return tuple(recorded for recorded in self.ranges if recorded.request_id == request_id)

    def open(self, name: str, request_id: int, kept_tokens: int, nested: bool) -> tuple:
        """Begin a range; see Sink."""
        depth = getattr(self._depths, "value", 0)
        if nested:
            self._depths.value = depth + 1
        return name, request_id, kept_tokens, nested, threading.get_native_id(), depth, time.perf_counter_ns()

    def close(self, handle: tuple) -> None:
        """End a range; see Sink."""
        end = time.perf_counter_ns()
        name, request_id, kept_tokens, nested, thread, depth, start = handle
        if nested:
            self._depths.value = depth
        with self._lock:
            if len(self._ranges) < self._limit:
                self._ranges.append(RecordedRange(name, start, end, thread, depth, nested, request_id, kept_tokens))
            else:
                self.dropped += 1


@contextmanager
def recording(limit: int = 1_000_000) -> Iterator[Recorder]:
    """Record the ranges of the whole process while the context is open; yields the Recorder, which keeps `limit`."""
    recorder = Recorder(limit)
    _install(recorder)
    try:
        yield recorder
    finally:
        _remove(recorder)


@contextmanager
def muted() -> Iterator[None]:
    """Begin no ranges in the whole process while the context is open; ranges that are open already go on."""
    global _sinks  # noqa: PLW0603 - as in _install
    with _lock:
        before, _sinks = _sinks, ()
    try:
        yield
    finally:
        with _lock:
            _sinks = (*before, *_sinks)


class _Nvtx:
    """Hands ranges to the tool that listens to NVTX."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def open(self, name: str, request_id: int, kept_tokens: int, nested: bool) -> Any:
        attributes = self._domain.get_event_attributes(
            message=name,
            color=_COLOURS.get(name, _COMPRESSION_COLOUR),
            payload=payload(request_id, kept_tokens),
        )
        if not nested:
            return self._domain.start_range(attributes)
        self._domain.push_range(attributes)
        return None

    def close(self, handle: Any) -> None:
        if handle is None:
            self._domain.pop_range()
        else:
            self._domain.end_range(handle)


def enable_nvtx() -> bool:
    """Send ranges to NVTX from now on; returns False, and changes nothing, where no tool listens.

    Raises BackendUnavailableError without the package nvtx.
    """
    try:
        import nvtx
    except ImportError as error:
        raise BackendUnavailableError(
            f"NVTX ranges need the Python package 'nvtx' ({error}): pip install 'chunkkv-trt[profile]'"
        ) from None
    domain = nvtx.get_domain(DOMAIN)
    if not isinstance(domain, nvtx.Domain):  # the package hands out a dummy where nothing listens
        return False
    if not any(isinstance(sink, _Nvtx) for sink in _sinks):
        _install(_Nvtx(domain))
    return True


def _install(sink: Sink) -> None:
    global _sinks  # noqa: PLW0603 - read without a lock by every range, replaced as a whole
    with _lock:
        _sinks = (*_sinks, sink)


def _remove(sink: Sink) -> None:
    global _sinks  # noqa: PLW0603
    with _lock:
        _sinks = tuple(other for other in _sinks if other is not sink)


if os.environ.get(TOOL_VARIABLE):
    try:
        enable_nvtx()
    except BackendUnavailableError as error:
        warnings.warn(f"a profiler is attached, but {error}", RuntimeWarning, stacklevel=2)
