"""Traces and reports: exports of Nsight Systems in several schemas, damaged files, and no kernel counted twice."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.messages import naming
from support.nsys_exports import EXAMPLE_EVENTS, PROCESS, SCHEMAS, Event, Launch, write_export

from chunkkv.errors import ProfileError
from chunkkv.profile.nsys_export import read_export
from chunkkv.profile.picture import write_picture
from chunkkv.profile.report import as_tables, make_report
from chunkkv.profile.trace import Kernel, Range, Trace, enclosing


def stages(trace: Trace) -> dict[str, tuple[int, int, int]]:
    """Per stage: kernels, GPU time with and without that of the ranges inside."""
    return {one.name: (one.kernels, one.kernel_ns, one.own_kernel_ns) for one in make_report(trace).stages}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_kernel_belongs_to_the_innermost_stage_once(tmp_path: Path, schema: str) -> None:
    trace = read_export(write_export(tmp_path / "a.sqlite", schema=schema))
    assert trace.about == {"tool": "nsys", "schema": schema} and trace.notes == ()
    found = stages(trace)
    assert found["prefill"] == (3, 160, 10)
    assert found["score"] == (1, 100, 100) and found["compact"] == (1, 50, 50)
    assert found["decode"] == found["sample"] == (0, 0, 0)
    report = make_report(trace)
    assert (report.kernel_ns, report.outside_ns) == (160, 0)
    assert [one.name for one in report.stages] == ["prefill", "score", "compact", "decode", "sample"]
    (prefill,) = (one for one in report.stages if one.name == "prefill")
    assert (prefill.total_ns, prefill.own_ns) == (990, 990 - 80 - 100)
    (request,) = report.requests
    assert (request.request_id, request.kept_tokens, request.tokens) == (7, 399, 2)
    assert (request.ttft_ns, request.prefill_ns, request.per_token_ns) == (1000, 990, 1500)
    assert request.compress_ns == 150 and request.compress_share == 0.15  # of the GPU, not 180 on the host


def test_without_kernels_compression_is_host_time(tmp_path: Path) -> None:
    trace = read_export(write_export(tmp_path / "a.sqlite", launches=()))
    assert trace.kernels == () and trace.notes == ("no GPU kernels were traced: times are those of the host alone",)
    assert make_report(trace).requests[0].compress_ns == 80 + 100


def test_processes_and_threads_do_not_mix(tmp_path: Path) -> None:
    """Two processes with equal correlation numbers, and a thread that launches while another one's range is open."""
    other = 9 << 24
    events = [Event("prefill", 10, 1000), Event("decode", 10, 1000, process=other)]
    launches = [
        Launch("a", 100, 200, 20, number=1),
        Launch("b", 100, 101, 20, number=1, process=other),
        Launch("c", 300, 310, 20, number=2, thread=43),
    ]
    trace = read_export(write_export(tmp_path / "a.sqlite", events, launches))
    assert stages(trace) == {"prefill": (1, 100, 100), "decode": (1, 1, 1)}
    assert make_report(trace).outside_ns == 10


def test_unknown_launches_and_open_ranges_are_noted(tmp_path: Path) -> None:
    events = [Event("prefill", 10, None), Event("sample", 20, 30)]
    launches = [Launch("a", 100, 200, 40, number=1), Launch("b", 300, 310, 50, number=2, has_call=False)]
    trace = read_export(write_export(tmp_path / "a.sqlite", events, launches))
    assert trace.ranges[0].end_ns == 310
    assert stages(trace)["prefill"] == (1, 100, 100) and make_report(trace).outside_ns == 10
    assert [note.split(":")[0] for note in trace.notes] == [
        "1 kernels have no launching call in the export",
        "1 ranges had not ended when the trace did; they are cut there",
    ]


def test_a_graph_launch_counts_each_of_its_kernels(tmp_path: Path) -> None:
    launches = [Launch("a", 2100, 2110, 2050, number=5), Launch("b", 2110, 2130, 2050, number=5)]
    trace = read_export(write_export(tmp_path / "a.sqlite", EXAMPLE_EVENTS, launches))
    assert stages(trace)["decode"] == (2, 30, 30)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("CUPTI_ACTIVITY_KIND_KERNEL", "no GPU kernels were traced"),
        ("CUPTI_ACTIVITY_KIND_RUNTIME", "3 kernels have no launching call"),
        ("META_DATA_EXPORT", None),
    ],
)
def test_tables_that_may_be_missing(tmp_path: Path, table: str, told: str | None) -> None:
    trace = read_export(write_export(tmp_path / "a.sqlite", without=[table]))
    assert len(trace.ranges) == len(EXAMPLE_EVENTS)
    assert len(trace.kernels) == (0 if "KERNEL" in table else 3)
    assert [note for note in trace.notes if told and told in note] == list(trace.notes)
    assert trace.about["schema"] == ("unknown" if table.startswith("META") else "3.13.2")


@pytest.mark.parametrize("table", ["CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"])
def test_a_table_with_a_version_in_its_name_is_named(tmp_path: Path, table: str) -> None:
    path = write_export(tmp_path / "a.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_V3")
        connection.commit()
    if table == "NVTX_EVENTS":
        with pytest.raises(ProfileError, match=naming("NVTX_EVENTS NVTX_EVENTS_V3")):
            read_export(path)
    else:
        assert any(f"{table}_V3" in note for note in read_export(path).notes)


def test_an_export_without_ranges_says_what_to_do(tmp_path: Path) -> None:
    for without, events, told in (
        (["NVTX_EVENTS"], EXAMPLE_EVENTS, "NVTX --trace=cuda,nvtx"),
        ([], [Event("x", 1, 2, domain="other"), Event("y", 1, 2, domain="")], "domains (default) other"),
    ):
        path = tmp_path / f"{len(without)}.sqlite"
        write_export(path, events, without=without)
        with pytest.raises(ProfileError, match=naming(told)):
            read_export(path)


def test_missing_columns_and_foreign_values_are_refused(tmp_path: Path) -> None:
    path = write_export(tmp_path / "a.sqlite")
    changes = [
        ("ALTER TABLE NVTX_EVENTS DROP COLUMN globalTid", "NVTX_EVENTS has no column 'globalTid'"),
        ("UPDATE NVTX_EVENTS SET start = 'soon' WHERE eventType = 59", "'soon' where a number belongs"),
        ("UPDATE NVTX_EVENTS SET int64Value = -5 WHERE eventType = 59", "-5 where a number belongs"),
        ('UPDATE NVTX_EVENTS SET "end" = 1 WHERE eventType = 59', "an event from 10 to 1"),
        (
            'UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET "end" = 9223372036854775807',
            "an event from 500 to 9223372036854775807",
        ),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET globalPid = NULL", "None where a number belongs"),
        ("UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET globalTid = x'00'", "where a number belongs"),
    ]
    for number, (change, told) in enumerate(changes):
        damaged = tmp_path / f"{number}.sqlite"
        damaged.write_bytes(path.read_bytes())
        with sqlite3.connect(damaged) as connection:
            connection.execute(change)
        connection.close()
        with pytest.raises(ProfileError) as caught:
            read_export(damaged)
        assert told in str(caught.value)


@given(data=st.data())
def test_damaged_bytes_never_crash(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.sqlite"
    if not whole.exists():
        write_export(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(16, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = folder / "damaged.sqlite"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        make_report(read_export(damaged))
    except ProfileError as error:
        assert str(damaged) in str(error)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.sqlite"
    text.write_text("no database", encoding="utf-8")
    for path, told in ((text, "nsys export --type sqlite"), (tmp_path, tmp_path), (tmp_path / "b", tmp_path / "b")):
        with pytest.raises(ProfileError, match=naming(told)):
            read_export(path)
    for content in ("[]", "{}", '{"format": "chunkkv-profile", "version": 2}', "x", "\x00"):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        with pytest.raises(ProfileError):
            Trace.read(tmp_path / "a.json")


def test_json_gives_the_same_trace_and_refuses_other_types(tmp_path: Path) -> None:
    trace = read_export(write_export(tmp_path / "a.sqlite"))
    trace.write(tmp_path / "a.json")
    assert Trace.read(tmp_path / "a.json") == trace
    sound = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    for key, value in (
        ("ranges", [["prefill", 5, 4, 1, True, 0, 0]]),
        ("ranges", [["prefill", 5, 6.5, 1, True, 0, 0]]),
        ("ranges", [["prefill", 5, 6, 1, 1, 0, 0]]),
        ("ranges", [[]]),
        ("ranges", None),
        ("kernels", [["k", 1, 2, 3, 4, True]]),
        ("notes", [1]),
        ("about", []),
    ):
        (tmp_path / "a.json").write_text(json.dumps({**sound, key: value}), encoding="utf-8")
        with pytest.raises(ProfileError, match=naming("a.json")):
            Trace.read(tmp_path / "a.json")


@st.composite
def nested_traces(draw) -> Trace:
    """Properly nested ranges on two threads, and kernels launched anywhere."""
    ranges: list[Range] = []

    def fill(thread: int, start: int, end: int, depth: int) -> None:
        if end - start < 2 or depth > 4:
            return
        cuts = sorted(draw(st.lists(st.integers(start, end), max_size=4)))
        for low, high in zip(cuts[::2], cuts[1::2], strict=False):
            ranges.append(Range(draw(st.sampled_from(["prefill", "score", "x"])), low, high, thread, True, 0, 0))
            fill(thread, low, high, depth + 1)

    for thread in (1, 2):
        fill(thread, 0, 60, 0)
    calls = st.tuples(st.integers(0, 70), st.integers(0, 5), st.integers(1, 3), st.integers(0, 9))
    kernels = [
        Kernel("k", 100, 100 + time, at, at + size, on) for at, size, on, time in draw(st.lists(calls, max_size=8))
    ]
    return Trace(tuple(draw(st.permutations(ranges))), tuple(kernels))


@given(trace=nested_traces())
def test_own_times_add_up_and_the_sweep_equals_a_search(trace: Trace) -> None:
    report = make_report(trace)
    assert sum(one.own_kernel_ns for one in report.stages) + report.outside_ns == report.kernel_ns
    assert all(one.own_ns >= 0 and one.own_kernel_ns <= one.kernel_ns <= report.kernel_ns for one in report.stages)
    for kernel, launcher in zip(trace.kernels, enclosing(trace).launchers, strict=True):
        around = [
            one
            for one in trace.ranges
            if one.thread == kernel.thread
            and one.start_ns <= kernel.launch_start_ns
            and kernel.launch_end_ns <= one.end_ns
        ]
        if launcher is None:
            assert around == []
        else:
            # Of ranges that touch where a launch takes no time, it belongs to the one that begins there.
            innermost = min(around, key=lambda one: (-one.start_ns, one.end_ns))
            best = trace.ranges[launcher]
            assert best in around and (best.start_ns, best.end_ns) == (innermost.start_ns, innermost.end_ns)


def test_the_table_and_the_picture_hold_the_numbers(tmp_path: Path) -> None:
    trace = read_export(write_export(tmp_path / "a.sqlite"))
    odd = Range("<&\x00'\">", 300, 400, PROCESS + 42, True, 0, 0)
    trace = dataclasses.replace(trace, ranges=(*trace.ranges, odd), notes=("something is missing",))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(as_tables(make_report(trace)))
    text = captured.get()
    assert "15.0%" in text and "Note: something is missing." in text and "prefill" in text
    write_picture(trace, make_report(trace), tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "GPU kernel time by stage, all requests" in words and "prefill" in words and "<&'\">" in words
    lanes = [element for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "score: 0.000 ms" in [lane.text for lane in lanes]
    assert not list(tmp_path.glob("*.partial"))


def test_more_requests_than_fit_are_summed_up() -> None:
    ranges = [Range("request", at, at + 50, 1, False, at, 3) for at in range(1, 13)]
    ranges += [Range("sample", at + 10 + at, at + 20 + at, 1, True, at, 3) for at in range(1, 13)]
    report = make_report(Trace(tuple(ranges)))
    assert len(report.requests) == 12 and report.medians()["ttft_ns"] == 26.5
    assert report.medians()["prefill_ns"] is None and report.requests[0].compress_share == 0.0
    console = Console(width=120)
    with console.capture() as captured:
        console.print(as_tables(report))
    assert "median of 12" in captured.get() and "26.5" not in captured.get()
    assert json.loads(json.dumps(report.to_dict()))["requests"][0]["compress_share"] == 0.0
