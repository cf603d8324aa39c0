"""docs/cpu.md, its pictures and README's table say what docs/benchmarks/cpu/*.json give, a peer's lead included."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cpu import page
from benchmarks.cpu.contract import Case
from benchmarks.cpu.machine import QUIET_CORES
from benchmarks.cpu.picture import draw
from benchmarks.cpu.results import FOLDER, Measurements, all_measurements, compact, file_of, newest_first
from benchmarks.cpu.variants import ALL, FLOAT32, FULL, PART, PRODUCT, QUICK, REDUCED, VARIANTS, Cell

CELL = Cell(1024, 1, 1)
COMMITTED = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def row(variant: str, **values: Any) -> dict[str, Any]:
    """Return a measurement."""
    times = {"first_token_s": 3.0, "first_token_cpu_s": 3.0, "compress_s": None, "step_ms": 40.0, "step_cpu_ms": 40.0}
    memory = {"peak_mb": 900.0, "loaded_mb": 500.0, "other_cores": 0.0}
    head = {"variant": variant, **vars(CELL), "round": 0, "answer": list(range(16))}
    return {**head, **times, **memory, **values}


def measured(*rows: dict[str, Any]) -> Measurements:
    """Return measurements as in the JSON file."""
    machine = {"processor": "a processor", "cores": 2, "memory_gb": 8.0, "system": "Linux x86_64"}
    head = {"date": "2026-01-01", "machine": machine, "model": "model.gguf", "steps": 48}
    return Measurements({**head, "versions": {PRODUCT: "1"}, "missing": {}, "measurements": list(rows)})


OURS = (row("product|float32|100"), row("product|float32|20", compress_s=0.05, first_token_s=3.05))
PEER = row("openvino|float32|100", first_token_s=2.0, step_ms=50.0, peak_mb=1200.0)


def test_page_pictures_and_readme_say_what_the_json_files_give() -> None:
    every = all_measurements()
    assert page.PAGE.read_text(encoding="utf-8") == page.render(every)
    readme = page.README.read_text(encoding="utf-8")
    assert readme == page.with_readme_table(readme, every[0])
    for found in every:
        assert found.picture.read_bytes().startswith(b"\x89PNG") and draw(found, CELL).startswith(b"\x89PNG")
        assert found.file.is_file()


def test_the_json_text_holds_what_was_measured() -> None:
    for committed in COMMITTED:
        assert json.loads(compact(committed)) == committed
        assert all(row["variant"] in {one.key for one in VARIANTS} for row in committed["measurements"])


def test_a_number_that_changes_changes_the_page() -> None:
    for number in range(len(COMMITTED)):
        changed = copy.deepcopy(COMMITTED)
        changed[number]["measurements"][0]["peak_mb"] += 111
        assert page.render(newest_first(map(Measurements, changed))) != page.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Core(TM) i7-1185G7 CPU @ 3.00GHz", "intel-core-i7-1185g7"),
        ("unknown processor", "unknown"),
    ],
)
def test_each_kind_of_processor_has_a_file(processor: str, name: str) -> None:
    assert file_of({"processor": processor}) == FOLDER / f"{name}.json"


def test_a_peer_that_is_ahead_is_named_with_its_lead() -> None:
    found = measured(*OURS, PEER)
    assert [(one.quantity, one.peer.engine, round(one.ratio, 2)) for one in page.behind(found)] == [
        ("prefill", "openvino", 0.67),
        ("first token", "openvino", 0.66),
    ]
    rendered = page.render([found])
    line = "OpenVINO GenAI float32, full cache | 2.00 s | ChunkKV-TRT float32, 20 % kept | 3.00 s | 0.67 |"
    assert f"prefill | {line}" in rendered
    assert "ahead in 3, level within 5% in 0 and behind in 2" in rendered


def test_ratios_are_of_neighbours_in_one_round() -> None:
    second = {**OURS[0], "round": 1, "step_ms": 80.0}, {**PEER, "round": 1, "step_ms": 160.0}
    alone = row("openvino|float32|100", round=2, step_ms=1.0)
    found = measured(*OURS, PEER, *second, alone)
    ours, peer = (one for one in VARIANTS if one.group == FLOAT32 and one.key in (OURS[0]["variant"], PEER["variant"]))
    assert found.ratio(CELL, peer, ours, lambda row: float(row["step_ms"])) == pytest.approx((50 / 40 + 160 / 80) / 2)


def test_the_rounds_of_every_cell_are_said() -> None:
    assert page.rounds(measured(*OURS, PEER)) == "1 in every cell"
    elsewhere = [row("product|float32|100", tokens=2048), row("product|float32|100", tokens=4096)]
    found = measured(*OURS, {**OURS[0], "round": 1}, *elsewhere)
    assert page.rounds(found) == "2 at 1,024 tokens, one thread, one prompt, and 1 in every other cell"


def test_the_processor_that_was_measured_last_comes_first() -> None:
    found = [measured(*OURS), measured(*OURS), measured(*OURS)]
    for one, date in zip(found, ("2026-01-02", "2026-01-03T07:30+00:00", "2026-01-03"), strict=True):
        one.result["date"] = date
    assert newest_first(found) == [found[1], found[2], found[0]]
    assert page.machine(found[1]).startswith("Measured on 2026-01-03, on 2 cores of")


def test_a_virtual_machine_is_said() -> None:
    found = measured(*OURS, PEER)
    assert "virtual" not in page.machine(found)
    found.result["machine"]["is_virtual"] = True
    assert "It is a virtual machine" in page.machine(found)


def test_a_busy_machine_is_said() -> None:
    busy = {**PEER, "other_cores": QUIET_CORES + 0.5}
    assert "The machine was quiet" in page.quiet(measured(*OURS, PEER))
    assert "during 1 of 3 measurements other work took more than 0.1 cores, at most 0.6" in page.quiet(
        measured(*OURS, busy)
    )


def test_a_missing_engine_costs_only_its_own_rows() -> None:
    found = measured(*OURS)
    found.result["missing"] = {"llama_cpp": "npm is not installed"}
    rendered = page.render([found])
    assert "Not measured: llama.cpp, because npm is not installed." in rendered
    assert "ChunkKV-TRT float32, full cache" in rendered and "No peer was ahead" in rendered


def test_answers_are_compared_token_by_token() -> None:
    other = {**PEER, "answer": [*range(7), 99, *range(8, 16)]}
    assert measured(*OURS, PEER).agreeing_tokens(CELL, FLOAT32) == 16
    assert measured(*OURS, other).agreeing_tokens(CELL, FLOAT32) == 7


def test_every_cell_has_all_engines_and_both_shares() -> None:
    assert {cell.tokens for cell in ALL} == {1024, 2048, 4096, 7500}
    assert {(cell.threads, cell.rows) for cell in ALL} == {(t, r) for t in (1, 2) for r in (1, 4, 8)}
    assert set(QUICK) < set(ALL) and len({one.key for one in VARIANTS}) == len(VARIANTS)
    for group in (FLOAT32, REDUCED):
        peers = {one.engine for one in VARIANTS if one.group == group}
        assert peers >= {PRODUCT, "onnxruntime_genai", "openvino", "llama_cpp"}
        for engine in (PRODUCT, "openvino"):
            assert {one.keep for one in VARIANTS if (one.engine, one.group) == (engine, group)} == {FULL, PART}


def test_a_case_survives_its_file(tmp_path: Any) -> None:
    case = Case(tmp_path, tmp_path / "model.gguf", "int4", PART, 1, 4, ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10)))
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert (case.length, case.kept, case.array().shape) == (5, 1, (2, 5))
    assert replace(case, keep=FULL).kept == 5
