"""NVTX ranges as a profiler gets them, from Python and from C++: names, order, nesting, payloads; and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from support import engines

from chunkkv.profiling import payload
from native.build import BuildError, emulated_library, nvtx_include, nvtx_recorder
from native.nvtx_capture import capture

GENERATE = """
import sys
from chunkkv import SamplingParams
from chunkkv.session import ChunkKVSession
session = ChunkKVSession.from_dir(sys.argv[1], threads=1)
session.generate(list(range(3, 63)), SamplingParams(max_new_tokens=3, ignore_eos=True))
"""
STAGES = """
import dataclasses
import sys
import numpy as np
from chunkkv import profiling
from chunkkv.native import NativeLibrary, BatchRows, contiguous_kv
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory
from native.native_op import NativeOp
library = NativeLibrary(sys.argv[1])
memory = Memory(library.device)
settings = ChunkKVSettings(
    layer_groups=((0,),), window=4, chunk_size=3, sinks=2, min_tokens=10, boundaries="delimiter", keep_per_10k=4000
)
op, random = NativeOp(library, memory), np.random.default_rng(1)
query, key = (random.standard_normal((2, heads, tokens, 64)).astype(np.float32) for heads, tokens in ((4, 4), (2, 50)))
flags = random.random((2, 50)) < 0.2
with profiling.range("prefill", request_id=3, kept_tokens=40):
    kept, counts, _ = op.select(query, key, np.int32([50, 50]), settings, is_delimiter=flags)
cache, out = memory.put(key), memory.empty((2, 2, 20, 64), "float32")
rows = BatchRows(memory.put(np.int32([50, 50])), 50)
layers = [contiguous_kv(cache, cache)], [contiguous_kv(out, memory.empty((2, 2, 20, 64), "float32"))]
library.compact(rows, memory.put(kept), memory.put(counts), *layers)
qkv, table = memory.put(np.zeros((3, 4 * 64), np.float32)), memory.put(np.zeros((9, 32, 2), np.float32))
library.rope(qkv, qkv, memory.put(np.arange(3, dtype=np.int32)), table, heads=2, kv_heads=1, head_dim=64)
lengths = memory.put(np.int32([50]))
names = ("attention_lengths", "kept_lengths", "row_starts")
found = {name: memory.empty((1,), "int32") for name in names} | {"positions": memory.empty((50,), "int32")}
settings = dataclasses.replace(settings, boundaries="fixed")
library.prepare(settings, lengths, lengths, contexts=1, max_length=50, **found)
"""


@pytest.fixture(scope="module", autouse=True)
def needs_nvtx_headers() -> None:
    try:
        nvtx_recorder()
    except BuildError as error:
        pytest.skip(str(error))


def test_a_generation_from_python(tmp_path: Path) -> None:
    events = capture(GENERATE, str(engines.engine_dir("llama3")), out=tmp_path / "out.jsonl")
    assert {event.domain for event in events} == {"chunkkv"}
    load, request, *stages = events
    assert (load.name, load.payload, load.nested) == ("load", 0, True)
    assert (request.name, request.nested) == ("request", False)
    assert sum(event.name == "prefill" for event in stages) == 4, "one for each block of 16 of 60 tokens"
    names = [name for name, _ in groupby(event.name for event in stages)]
    assert names == ["prefill", "compress", "sample", *["decode", "sample"] * 2]
    assert {event.payload for event in (request, *stages)} == {payload(1, 24)}
    times = [request.start, *(time for event in stages for time in (event.start, event.end)), request.end]
    assert times == sorted(times) and load.end <= request.start


def test_the_native_stages_lie_inside_the_callers_range(tmp_path: Path) -> None:
    events = capture(STAGES, str(emulated_library()), out=tmp_path / "out.jsonl")
    prefill, *inside, compact, rope, prepare = events
    assert (prefill.name, prefill.payload) == ("prefill", payload(3, 40))
    assert [event.name for event in inside] == ["boundaries", "score", "select"]
    assert all(prefill.start <= event.start <= event.end <= prefill.end for event in inside)
    assert all(one.end <= other.start for one, other in pairwise(inside))
    assert [event.payload for event in inside] == [0, 40, 40]  # two rows that keep 20 of 50
    assert (compact.name, compact.payload) == ("compact", 40) and compact.start >= prefill.end
    assert [(one.name, one.payload) for one in (rope, prepare)] == [("rope", 0), ("prepare", 0)]
    assert {event.thread for event in events} == {prefill.thread}
    assert {event.domain for event in events} == {"chunkkv"}


def test_ranges_compile_to_nothing_without_the_headers(tmp_path: Path) -> None:
    source = tmp_path / "a.cc"
    source.write_text(
        '#include "nvtx.h"\n#ifdef NVTX_VERSION\n#error\n#endif\n'
        'int main() { chunkkv::StageRange range("score", 1); return sizeof(range) == 1 ? 0 : 1; }\n',
        encoding="utf-8",
    )
    folders = [f"-I{Path(__file__).parents[2] / 'plugins' / name}" for name in (".", "include")]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *folders, str(source), "-o", str(tmp_path / "a")]
    subprocess.run(command, check=True)
    subprocess.run([str(tmp_path / "a")], check=True)
    assert nvtx_include() is not None


@pytest.mark.parametrize("tool", ["/no/such/tool.so", None])
def test_a_tool_that_is_not_there_changes_nothing(tmp_path: Path, tool: str | None) -> None:
    program = "from chunkkv import profiling\nprint(profiling.enable_nvtx(), profiling._sinks)"
    environment = os.environ | ({"NVTX_INJECTION64_PATH": tool} if tool else {})
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False ()\n", "")


def test_a_tool_without_the_python_package_warns(tmp_path: Path) -> None:
    program = "import sys; sys.modules['nvtx'] = None\nfrom chunkkv import profiling"
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(nvtx_recorder()), "NVTX_RECORDER_OUT": os.devnull}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "a profiler is attached, but NVTX ranges need the Python package 'nvtx'" in done.stderr
    assert "pip install 'chunkkv-trt[profile]'" in done.stderr
