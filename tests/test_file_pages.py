"""Memory of a loaded engine: pages of the weights' file, memory that was freed, and packages that nothing needs."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import engines

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.executors import file_pages as module
from chunkkv.executors.file_pages import can_be_released, file_pages
from chunkkv.executors.mappings import Mapping, advise, give_back_freed, mappings, own_mappings, without
from chunkkv.executors.onnxruntime import graphs
from chunkkv.executors.onnxruntime.products import has_vnni

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped where")
SIZE = 4 << 20
SMAPS = """\
7f0000000000-7f0000400000 rw-p 00005000 fe:00 61791                      /engines/one/weights.safetensors
Size:               4096 kB
Rss:                4000 kB
Anonymous:             8 kB
VmFlags: rd wr mr mw me ac 
7f0001000000-7f0001400000 rw-p 00000000 00:00 0 
Rss:                  12 kB
"""  # noqa: W291 - the kernel ends lines without a name with a blank


def resident(folder: Path) -> int:
    """Return how many bytes of the files in a folder lie in the memory of this process."""
    return sum(one.resident or 0 for one in own_mappings() if one.name.startswith(f"{folder.resolve()}/"))


def mapped(path: Path) -> tuple[mmap.mmap, np.ndarray]:
    """Return a private mapping of a file as an engine makes it, all of which was read."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    array = np.frombuffer(memory, np.uint8)
    assert array.sum() >= 0
    return memory, array


@pytest.fixture
def content(tmp_path: Path) -> np.ndarray:
    """Write the file `weights` and return what is in it."""
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    (tmp_path / "weights").write_bytes(content.tobytes())
    return content


def test_mappings_are_read_as_the_system_writes_them() -> None:
    file = Mapping((0x7F0000000000, 0x7F0000400000), "rw-p", True, "/engines/one/weights.safetensors")
    other = Mapping((0x7F0001000000, 0x7F0001400000), "rw-p", False, "")
    amounts = replace(file, resident=4000 << 10, own_copies=8 << 10), replace(other, resident=12 << 10)
    assert mappings(SMAPS) == list(amounts)
    maps = "".join(line for line in SMAPS.splitlines(keepends=True) if line.startswith("7f"))
    assert mappings(maps) == [file, other]


@pytest.mark.parametrize(
    ("is_file", "size", "own_copies", "can_be"),
    [
        (True, SIZE, 0, True),
        (True, SIZE, 4096, False),
        (True, SIZE, None, False),
        (False, SIZE, 0, False),
    ],
    ids=["as in the file", "written to", "not told", "no file"],
)
def test_only_what_the_file_still_has_is_released(
    is_file: bool, size: int, own_copies: int | None, can_be: bool
) -> None:
    assert can_be_released(Mapping((SIZE, SIZE + size), "rw-p", is_file, "/name", size, own_copies)) is can_be


@on_linux
def test_pages_leave_the_process_and_come_back_from_the_file(tmp_path: Path, content: np.ndarray) -> None:
    with file_pages(tmp_path) as pages:
        memory, array = mapped(tmp_path / "weights")
        assert resident(tmp_path) == SIZE
    assert len(pages.places) == 1 and resident(tmp_path) == 0
    assert np.array_equal(array, content) and resident(tmp_path) == SIZE
    pages.release()
    assert resident(tmp_path) == 0 and np.array_equal(array[::4096], content[::4096])
    del array, memory


@on_linux
def test_small_tensors_are_released_once_where_there_are_large_ones(tmp_path: Path, content: np.ndarray) -> None:
    """An engine reads them while it packs them, and seldom again."""
    (tmp_path / "small").write_bytes(content[:65536].tobytes())
    with file_pages(tmp_path) as pages:
        memory, array = mapped(tmp_path / "small")
    assert pages.places == () and resident(tmp_path) == 65536
    with file_pages(tmp_path) as pages:
        also_small, other = mapped(tmp_path / "small")
        large, whole = mapped(tmp_path / "weights")
    assert resident(tmp_path) == 65536
    assert other.sum() + whole.sum() >= 0 and resident(tmp_path) == 2 * 65536 + SIZE
    pages.release()
    assert resident(tmp_path) == 2 * 65536
    assert np.array_equal(other, content[:65536]) and np.array_equal(array, other)
    del array, other, whole, memory, also_small, large


@on_linux
def test_what_was_written_stays(tmp_path: Path, content: np.ndarray) -> None:
    with file_pages(tmp_path) as pages:
        memory, array = mapped(tmp_path / "weights")
        array[7] = content[7] ^ 255
    pages.release()
    assert pages.places == () and array[7] == content[7] ^ 255
    del array, memory


@on_linux
def test_mappings_of_others_are_left_alone(tmp_path: Path, content: np.ndarray) -> None:
    earlier = mapped(tmp_path / "weights")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with file_pages(elsewhere) as of_other_folder:
        meanwhile = mapped(tmp_path / "weights")
    with file_pages(tmp_path) as of_later:
        pass
    assert of_other_folder.places == of_later.places == ()
    assert resident(tmp_path) == 2 * SIZE
    del earlier, meanwhile


def test_other_systems_release_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: np.ndarray) -> None:
    monkeypatch.setattr(module, "advise", lambda *_: pytest.fail("asked the system"))
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with file_pages(tmp_path) as pages:
        memory, array = mapped(tmp_path / "weights")
    pages.release()
    assert pages.places == () and np.array_equal(array, content)
    del array, memory


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], [(10, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(12, 14)], [(10, 12), (14, 20)]),
        ([(5, 11), (15, 25)], [(11, 15)]),
        ([(10, 20)], []),
        ([(0, 40)], []),
        ([(1, 2), (3, 4), (5, 12), (13, 14), (16, 17), (30, 31)], [(12, 13), (14, 16), (17, 20)]),
    ],
)
def test_what_was_there_before_is_taken_out(others: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    assert without((10, 20), others) == left


@on_linux
def test_refused_advice_changes_nothing() -> None:
    memory = np.arange(SIZE, dtype=np.uint8)
    advise((memory.ctypes.data, memory.ctypes.data + 4096), 9999)
    assert np.array_equal(memory, np.arange(SIZE, dtype=np.uint8))


@on_linux
def test_freed_memory_goes_back_to_the_system() -> None:
    library = ctypes.CDLL(None)
    if "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("only glibc has the call")
    library.malloc.restype = ctypes.c_void_p
    library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(64 << 10) for _ in range(512)]
    for block in blocks:
        library.memset(block, 1, 64 << 10)
    for block in blocks[
        :-1
    ]:  # the last one keeps them from the end of the heap, from where they would go by themselves
        library.free(block)
    before = sum(one.resident or 0 for one in own_mappings())
    give_back_freed()
    after = sum(one.resident or 0 for one in own_mappings())
    library.free(blocks[-1])
    assert before - after > 24 << 20


@pytest.fixture(scope="module", params=[{}, {"prefill_precision": "w8a8"}], ids=["one graph", "graph for prompts"])
def tied_engine(request: pytest.FixtureRequest) -> Path:
    """An engine whose table of embeddings, 8 MB, is its head as well, so that packing the head reads all of it."""
    checkpoint = engines.checkpoint_dir("llama3", vocab_size=32768, tie_word_embeddings=True)
    return engines.engine_dir("llama3", checkpoint_dir=checkpoint, **request.param)


@on_linux
def test_the_table_of_embeddings_is_not_resident_after_loading_nor_after_a_prompt(tied_engine: Path) -> None:
    session = ChunkKVSession.from_dir(tied_engine, threads=1)
    table = max(one.size for one in own_mappings() if one.name.startswith(f"{tied_engine.resolve()}/"))
    assert table >= 32768 * 32 * 4, "the engine maps its table"
    assert resident(tied_engine) < 1 << 19
    prompt = np.random.default_rng(0).integers(3, 32768, 200).tolist()
    session.generate(prompt, SamplingParams(max_new_tokens=1), keep_ratio=0.4)
    assert resident(tied_engine) < 1 << 19


def test_scratch_is_given_back_once_for_each_prompt(monkeypatch: pytest.MonkeyPatch, tied_engine: Path) -> None:
    calls: list[None] = []
    monkeypatch.setattr(graphs, "give_back_freed", lambda: calls.append(None))
    session = ChunkKVSession.from_dir(tied_engine, threads=1)
    session.generate([list(range(3, 60)), list(range(5, 90))], SamplingParams(max_new_tokens=3), keep_ratio=0.4)
    assert len(calls) == 2


def test_a_generation_imports_no_package_that_it_does_not_need() -> None:
    program = (
        "import sys; from chunkkv import ChunkKVSession, SamplingParams\n"
        "session = ChunkKVSession.from_dir(sys.argv[1], threads=1)\n"
        "session.generate(list(range(3, 60)), SamplingParams(max_new_tokens=3), keep_ratio=0.4)\n"
        "print(*sys.modules)"
    )
    words = [sys.executable, "-c", program, str(engines.engine_dir("llama3"))]
    loaded = set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    unneeded = {"jinja2", "gguf", "rich", "psutil", *(["onnx", "google.protobuf"] if has_vnni() else [])}
    assert "onnxruntime" in loaded and not loaded & unneeded
