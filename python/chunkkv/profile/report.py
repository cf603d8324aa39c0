"""From a trace to what people ask: time per stage, compression's share of the first token's time, time per token."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from chunkkv.profile.trace import Trace, Tree, enclosing

ORDER = (
    "load",
    "warmup",
    "prefill",
    "compress",
    "prepare",
    "boundaries",
    "score",
    "select",
    "compact",
    "rope",
    "decode",
    "sample",
)
COMPRESSION = frozenset({"compress", "prepare", "boundaries", "score", "select", "compact"})


@dataclass(frozen=True)
class Stage:
    """The ranges of one name; times are nanoseconds.

    `total_ns` is the host's time in them, `own_ns` without the ranges inside; `kernel_ns` is the time of the GPU
    kernels launched in them, `own_kernel_ns` of those launched in no range inside. Own times of all stages add up.
    """

    name: str
    calls: int
    total_ns: int
    own_ns: int
    median_ns: float
    kernels: int
    kernel_ns: int
    own_kernel_ns: int


@dataclass(frozen=True)
class RequestTimes:
    """One request; times are nanoseconds, None where the trace does not say.

    `ttft_ns` runs from the call to its first sampled token. `compress_ns` is the part of it that compression took: time
    of its GPU kernels where kernels were traced, else host time.
    """

    request_id: int
    kept_tokens: int
    ttft_ns: int | None
    prefill_ns: int | None
    compress_ns: int | None
    tokens: int
    per_token_ns: float | None

    @property
    def compress_share(self) -> float | None:
        """Compression's share of the time to the first token."""
        return self.compress_ns / self.ttft_ns if self.ttft_ns and self.compress_ns is not None else None


@dataclass(frozen=True)
class Report:
    """What a trace says; `outside_ns` is the time of kernels that no stage launched, a part of `kernel_ns`."""

    stages: tuple[Stage, ...]
    requests: tuple[RequestTimes, ...]
    kernel_ns: int
    outside_ns: int
    notes: tuple[str, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dataclasses.asdict(self)
        for row, request in zip(values["requests"], self.requests, strict=True):
            row["compress_share"] = request.compress_share
        return values

    def medians(self) -> dict[str, float | None]:
        """Return the medians over the requests."""
        medians: dict[str, float | None] = {}
        for name in ("ttft_ns", "prefill_ns", "compress_ns", "compress_share", "per_token_ns"):
            values = [value for request in self.requests if (value := getattr(request, name)) is not None]
            medians[name] = statistics.median(values) if values else None
        return medians


def make_report(trace: Trace) -> Report:
    """Return the report of a trace."""
    tree = enclosing(trace)
    kernel_ns = sum(kernel.end_ns - kernel.start_ns for kernel in trace.kernels)
    outside = sum(
        kernel.end_ns - kernel.start_ns
        for kernel, launcher in zip(trace.kernels, tree.launchers, strict=True)
        if launcher is None
    )
    return Report(_stages(trace, tree), _requests(trace, tree), kernel_ns, outside, trace.notes, trace.about)


def _stages(trace: Trace, tree: Tree) -> tuple[Stage, ...]:
    durations: defaultdict[str, list[int]] = defaultdict(list)
    totals: defaultdict[str, int] = defaultdict(int)
    own: defaultdict[str, int] = defaultdict(int)
    for index, stage in enumerate(trace.ranges):
        if not stage.nested:
            continue
        length = stage.end_ns - stage.start_ns
        durations[stage.name].append(length)
        own[stage.name] += length
        parent = tree.parents[index]
        if parent is not None:
            own[trace.ranges[parent].name] -= length
        if stage.name not in {trace.ranges[at].name for at in tree.path(parent)}:  # else it is in its own name's total
            totals[stage.name] += length
    counts: defaultdict[str, int] = defaultdict(int)
    kernel_totals: defaultdict[str, int] = defaultdict(int)
    kernel_own: defaultdict[str, int] = defaultdict(int)
    for kernel, launcher in zip(trace.kernels, tree.launchers, strict=True):
        if launcher is None:
            continue
        length = kernel.end_ns - kernel.start_ns
        kernel_own[trace.ranges[launcher].name] += length
        for name in {trace.ranges[at].name for at in tree.path(launcher)}:
            counts[name] += 1
            kernel_totals[name] += length
    return tuple(
        Stage(
            name,
            len(durations[name]),
            totals[name],
            own[name],
            statistics.median(durations[name]),
            counts[name],
            kernel_totals[name],
            kernel_own[name],
        )
        for name in in_order(durations)
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of stages in the order of ORDER, others by name behind them."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _requests(trace: Trace, tree: Tree) -> tuple[RequestTimes, ...]:
    """Return the requests by start; a range without an id belongs to the request of the range around it."""
    owners = [_owner(trace, tree, index) for index in range(len(trace.ranges))]
    members: dict[int, list[int]] = defaultdict(list)
    for index, owner in enumerate(owners):
        members[owner].append(index)
    kernel_times: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for kernel, launcher in zip(trace.kernels, tree.launchers, strict=True):
        if launcher is not None and any(trace.ranges[at].name in COMPRESSION for at in tree.path(launcher)):
            kernel_times[owners[launcher]].append((kernel.launch_start_ns, kernel.end_ns - kernel.start_ns))
    requests = []
    spans = (span for span in trace.ranges if span.name == "request")
    for span in sorted(spans, key=lambda span: span.start_ns):
        own = members.get(span.request_id, []) if span.request_id else []
        samples = sorted(trace.ranges[at].end_ns for at in own if trace.ranges[at].name == "sample")
        first = samples[0] if samples else None
        prefills = [trace.ranges[at] for at in own if trace.ranges[at].name == "prefill"]
        times = kernel_times[span.request_id] if trace.kernels else _host_times(trace, tree, own)
        compress = None if first is None else sum(length for start, length in times if start <= first)
        requests.append(
            RequestTimes(
                span.request_id,
                span.kept_tokens,
                None if first is None else first - span.start_ns,
                sum(prefill.end_ns - prefill.start_ns for prefill in prefills) if prefills else None,
                compress,
                len(samples),
                (samples[-1] - samples[0]) / (len(samples) - 1) if len(samples) > 1 else None,
            )
        )
    return tuple(requests)


def _owner(trace: Trace, tree: Tree, index: int) -> int:
    return next((number for at in tree.path(index) if (number := trace.ranges[at].request_id)), 0)


def _host_times(trace: Trace, tree: Tree, indices: list[int]) -> list[tuple[int, int]]:
    """Return start and length of the outermost ranges of compression among the ranges at `indices`."""
    return [
        (trace.ranges[at].start_ns, trace.ranges[at].end_ns - trace.ranges[at].start_ns)
        for at in indices
        if trace.ranges[at].name in COMPRESSION
        and not any(trace.ranges[around].name in COMPRESSION for around in tree.path(tree.parents[at]))
    ]


def as_tables(report: Report, most_requests: int = 10) -> Group:
    """Return the report for a terminal; all times in milliseconds."""
    parts: list[Any] = [_stage_table(report)]
    if report.requests:
        parts.append(_request_table(report, most_requests))
    if report.kernel_ns:
        share = report.outside_ns / report.kernel_ns
        parts.append(
            Text(f"{_ms(report.outside_ns)} ms of kernel time ({share:.1%}) were launched outside the stages.")
        )
    parts += [Text(f"Note: {note}.") for note in report.notes]
    return Group(*parts)


def _stage_table(report: Report) -> Table:
    table = Table(title="Stages (ms)")
    table.add_column("stage")
    gpu = ["kernels", "GPU", "GPU own"] if report.kernel_ns else []
    for name in ("calls", "total", "own", "median", *gpu):
        table.add_column(name, justify="right")
    for stage in report.stages:
        cells = [str(stage.calls), _ms(stage.total_ns), _ms(stage.own_ns), _ms(stage.median_ns)]
        if gpu:
            cells += [str(stage.kernels), _ms(stage.kernel_ns), _ms(stage.own_kernel_ns)]
        table.add_row(stage.name, *cells)
    return table


def _request_table(report: Report, most: int) -> Table:
    table = Table(title="Requests (ms)")
    for name in ("request", "kept", "first token", "prefill", "compress", "share", "tokens", "per token"):
        table.add_column(name, justify="right")
    for request in report.requests[:most]:
        share = request.compress_share
        times = [_ms(value) for value in (request.ttft_ns, request.prefill_ns, request.compress_ns)]
        cells = [*times, "–" if share is None else f"{share:.1%}", str(request.tokens), _ms(request.per_token_ns)]
        table.add_row(str(request.request_id), str(request.kept_tokens), *cells)
    medians = report.medians()
    share = medians["compress_share"]
    times = [_ms(medians[name]) for name in ("ttft_ns", "prefill_ns", "compress_ns")]
    title = "median" if len(report.requests) <= most else f"median of {len(report.requests)}"
    table.add_section()
    table.add_row(title, "", *times, "–" if share is None else f"{share:.1%}", "", _ms(medians["per_token_ns"]))
    return table


def _ms(nanoseconds: float | None) -> str:
    return "–" if nanoseconds is None else f"{nanoseconds / 1e6:.3f}"
