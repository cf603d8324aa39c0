"""The kernels under nvcc: no new spill, machine code that is as good as the table says; and what CMake finds to build.

tests/test_native_wheel.py compiles every kernel for sm_90a and loads the library.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chunkkv.native import BatchRows, NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native import compile_check, machine_code
from native.build import ROOT, Mutation, source_tree

pytestmark = pytest.mark.deep

PLUGINS = ("libchunkkv_tensorrt.so.10", "libchunkkv_tensorrt.so.11", "libchunkkv_tensorrt_rtx.so.1")
TABLE = json.loads(compile_check.TABLE.read_text(encoding="utf-8"))
needs_nvcc = pytest.mark.skipif(compile_check.find_nvcc() is None, reason="nvcc is not installed")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


@needs_nvcc
@pytest.mark.timeout(900)
def test_no_kernel_uses_more_than_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    """On the oldest architecture, whose code differs most from sm_90a's; bfloat16 differs from float16 by a type."""
    names = [path.stem for path in compile_check.sources() if path.stem not in ("score_float", "score_bfloat16")]
    assert compile_check.main(["--architectures", "80", "--sources", *names]) == 0, capsys.readouterr().err


def test_the_table_holds_every_architecture_and_no_spill() -> None:
    for name, places in TABLE["kernels"].items():
        assert set(places) == {f"sm_{architecture}" for architecture in compile_check.ARCHITECTURES}, name
        assert all(place["spills"] == 0 and place["registers"] <= 255 for place in places.values()), name


def test_whatever_got_worse_is_named() -> None:
    known = {"nvcc": "13.0", "kernels": TABLE["kernels"]}
    name = "selectKernel"
    spilled = copy.deepcopy(known["kernels"])
    spilled[name]["sm_90a"]["spills"] = 4
    larger = copy.deepcopy(known["kernels"])
    larger[name]["sm_80"]["registers"] += 1
    for release in ("13.0", "14.1"):
        assert compile_check.complaints(known["kernels"], known, release) == []
        assert compile_check.complaints(spilled, known, release) == [f"{name} on sm_90a: 4 spills, the table says 0"]
    assert len(compile_check.complaints(larger, known, "13.0")) == 1
    wide = copy.deepcopy(known["kernels"])
    wide["boundariesKernel"]["sm_86"]["registers"] = 72
    assert compile_check.complaints(wide, known, "14.1") == [
        "boundariesKernel on sm_86: 72 registers, its block leaves room for fewer"
    ]
    assert compile_check.complaints(larger, known, "14.1") == [], "another compiler may use other registers"
    fewer = {other: places for other, places in known["kernels"].items() if other != name}
    assert compile_check.complaints(fewer, known, "14.1") == [f"{name}: in the table, but no longer compiled"]
    assert compile_check.complaints(known["kernels"], {"nvcc": "13.0", "kernels": fewer}, "14.1") == [
        f"{name}: not in the table"
    ]
    assert compile_check.complaints(fewer, known, "14.1", complete=False) == []


CODE = json.loads(machine_code.TABLE.read_text(encoding="utf-8"))


@needs_nvcc
@pytest.mark.timeout(900)
def test_the_machine_code_is_as_good_as_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_code.main([]) == 0, capsys.readouterr().err


SLOWER = {
    "compact in place": Mutation(
        "kernels/compact.cu", "kInPlace ? blocksThatFit(kBlocksPerMultiprocessor) : 3", "kInPlace ? 2 : 3"
    ),
    "select": Mutation("kernels/select.cu", "__launch_bounds__(kThreads, 1)", "__launch_bounds__(kThreads, 2)"),
}


@needs_nvcc
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SLOWER)
def test_a_planted_regression_is_found(name: str) -> None:
    """One that gives the kernel fewer blocks per multiprocessor, and one that makes it spill."""
    nvcc, nvdisasm = compile_check.find_nvcc(), machine_code.find_nvdisasm()
    assert nvcc is not None and nvdisasm is not None
    (kernel,) = (kernel for kernel in machine_code.MAIN if kernel.name == name)
    tree = source_tree((SLOWER[name],)) / "plugins"
    table = machine_code.measure_all(nvcc, nvdisasm, (kernel,), ("90a",), tree)
    known = {**CODE, "kernels": {name: CODE["kernels"][name]}}
    assert machine_code.complaints(table, known, CODE["nvcc"]) != []


def test_the_table_of_the_machine_code_meets_its_aims() -> None:
    """No spill, no generic or local access in a main loop, and no narrow one but lookups of pages, used later."""
    for name, places in CODE["kernels"].items():
        lookups = 2 if name.endswith("paged") else 0
        for architecture, row in places.items():
            waits = [row.get(kind, 0) for kind in ("spills", "narrow loads", "generic loads", "local")]
            assert waits == [0, lookups, 0, 0], (name, architecture)
            assert row.get("slots before a lookup is used", 200) >= 200, (name, architecture)
    kernels = {name: places["sm_90a"] for name, places in CODE["kernels"].items()}
    for case, most in (("", 830), (", paged", 830), (", 128 query rows", 950), (", 128 query rows, paged", 1110)):
        passes = [kernels[f"score {which} nv_bfloat16 x nv_bfloat16 D 128{case}"] for which in machine_code.BOTH]
        assert sum(one["slots"] for one in passes) <= most, "per warp and 64 keys"
    assert [one["evict first"] for one in passes] == [0, 1], (
        "what the first pass reads last, the second finds in the cache"
    )
    assert [one["blocks"] for one in passes] == [3, 3] and kernels["compact in place"]["blocks"] >= 4


def test_the_page_says_what_the_table_says() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    kernels = {name: places["sm_90a"]["slots"] for name, places in CODE["kernels"].items() if name.startswith("score")}
    for row, keys, cases in (
        ("both", "nv_bfloat16", ("", ", 128 query rows")),
        ("both, keys in pages", "nv_bfloat16", (", paged", ", 128 query rows, paged")),
        ("both, fp8 keys", "Fp8", ("", ", 128 query rows")),
    ):
        names = [[f"score {which} nv_bfloat16 x {keys} D 128{case}" for which in machine_code.BOTH] for case in cases]
        slots = [f"{sum(kernels[name] for name in both):,}" for both in names]
        assert f"| {row} | {' | '.join(slots)} |" in page.replace("**", ""), row


def test_a_worse_machine_code_is_named() -> None:
    known = {"nvcc": "13.0", "kernels": CODE["kernels"]}
    name = "score columns nv_bfloat16 x nv_bfloat16 D 128"
    worse = copy.deepcopy(known["kernels"])
    worse[name]["sm_90a"]["slots"] += 1
    worse["compact in place"]["sm_90a"]["blocks"] -= 1
    assert machine_code.complaints(known["kernels"], known, "13.0") == []
    assert len(machine_code.complaints(worse, known, "13.0")) == 2
    assert machine_code.complaints(worse, known, "14.0") == [], "another compiler may make other code"
    worse[name]["sm_90a"]["local"] = 1
    assert machine_code.complaints(worse, known, "14.0") == [f"{name} on sm_90a: 1 local, the table says 0"]


LISTING = """
.L_x_1:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/              @P0 BRA `(.L_x_2) ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/                   FADD R3, R3, R4 ;
        /*0040*/                   FADD R3, R3, R4 ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R3, R4 ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0080*/              @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""


def test_the_shortest_turn_does_all_the_work() -> None:
    code, labels = machine_code.parse(LISTING)
    wanted = machine_code.Main("m", "f", "i", 128, products=1, exponentials=1, copies=1)
    turn = machine_code.shortest_turn(code, labels, wanted)
    assert turn is not None and len(turn) == 5 and all(one.mnemonic != "FADD" for one in turn)
    assert machine_code.shortest_turn(code, labels, replace(wanted, exponentials=2)) is None


LOOKUP = """
.L_x_1:
        /*0000*/                   IMAD R5, R7, R8, R9 ;
        /*0010*/                   LDG.E R7, desc[UR4][R2.64] ;
        /*0020*/                   FADD R3, R3, R4 ;
        /*0030*/                   IADD3 R70, R71, R7, RZ ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
"""


def test_what_waits_for_a_lookup_is_counted() -> None:
    code, _ = machine_code.parse(LOOKUP)
    assert machine_code.slots_before_use(code, "LDG") == 2
    later = [one for one in code if one.mnemonic != "IADD3"]
    assert machine_code.slots_before_use(later, "LDG") == 3, "the next turn uses it"


def build_with_cmake(folder: Path, *options: str, source: Path = ROOT) -> None:
    subprocess.run(["cmake", "-S", source, "-B", folder, *options], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", folder, "-j2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


@needs_nvcc
@needs_cmake
def test_cmake_finds_nvcc(tmp_path: Path) -> None:
    """Without an architecture it is for one GPU; plugins/build.py, which the test of the wheel runs, names its own."""
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], check=True, capture_output=True)
    assert (tmp_path / "architectures.txt").read_text(encoding="utf-8") == "90a-real\n"


@needs_cmake
def test_cmake_works_without_nvcc(tmp_path: Path) -> None:
    """CMake needs plugins/ alone and builds the emulated library, which keeps what the reference keeps."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "plugins", source / "plugins")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    quick = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"
    build_with_cmake(tmp_path, "-DCMAKE_CUDA_COMPILER=NOTFOUND", quick, source=source)
    assert [path.name for path in tmp_path.glob("*.so*")] == ["libchunkkv_emulated.so"]
    assert {path.name for path in (tmp_path / "emulated").glob("*.so*")} == {*PLUGINS, "libchunkkv_tensorrt_loader.so"}
    assert (tmp_path / "emulated" / "rtx" / "libtensorrt_rtx.so").is_file()
    for name in PLUGINS:
        assert hasattr(ctypes.CDLL(str(tmp_path / "emulated" / name)), "getCreators")
        by_name = ctypes.CDLL(name, os.RTLD_NOLOAD | os.RTLD_LAZY)  # as docker/tensorrt_llm_patch finds it
        assert hasattr(by_name, "chunkkv_last_kept_tokens")
    library = NativeLibrary(tmp_path / "libchunkkv_emulated.so")
    assert library.device == "emulated"
    lengths, kept = np.array([100], np.int32), np.zeros((1, 64), np.int32)
    counts = np.zeros(1, np.int32)
    settings = ChunkKVSettings(window=32, boundaries="fixed", chunk_size=10)
    library.select(settings, BatchRows(lengths, 100), np.zeros((1, 7), np.float32), kept, counts)
    assert counts[0] == 64 and list(kept[0]) == [*range(32), *range(68, 100)]
