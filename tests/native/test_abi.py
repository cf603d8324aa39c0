"""The C ABI: structs, messages, refusals, exported names, and the rules the sources keep."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.messages import naming

from chunkkv.errors import BackendUnavailableError, NativeArgumentError
from chunkkv.native import BatchRows, Chunks, NativeLibrary, RawArray, contiguous_kv, packed_kv, paged_kv
from chunkkv.native import structs as abi
from chunkkv.native.arrays import as_raw
from chunkkv.settings import ChunkKVSettings
from native.build import ROOT, compiler
from native.memory import Memory

PLUGINS = ROOT / "plugins"
HEADERS = sorted((PLUGINS / "include" / "chunkkv").glob("*.h"))
SETTINGS = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9)


def test_structs_are_those_of_the_header(library: NativeLibrary) -> None:
    text = (PLUGINS / "include" / "chunkkv" / "params.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    declared = {
        name: re.findall(r"(\w+);", body)
        for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, flags=re.DOTALL)
    }
    structs = (abi.Settings, abi.Rows, abi.Layout, abi.Layer, *abi.PARAMS)
    bound = {struct.__doc__.rstrip("."): [name for name, _ in struct._fields_] for struct in structs if struct.__doc__}
    assert bound == declared
    for op, struct in zip(abi.OP_CODES, abi.PARAMS, strict=True):
        assert library.params_size(op) == ctypes.sizeof(struct)


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_every_header_stands_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "chunkkv/{header.name}"\n#include "chunkkv/{header.name}"\n')
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{PLUGINS / 'include'}"]
    subprocess.run([compiler(), "-std=c++17", *flags, str(source)], check=True)
    if header.name in ("chunkkv.h", "params.h"):
        subprocess.run([compiler(), "-x", "c", "-std=c99", *flags, str(source)], check=True)


def test_nothing_but_the_abi_is_exported(library: NativeLibrary) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines() if " A " not in line}
    declared = set(re.findall(r"CHUNKKV_API [\w* ]+?(chunkkv_\w+)\(", HEADERS[1].read_text(encoding="utf-8")))
    assert len(declared) == 18
    assert {name for name in names if not name.startswith("chunkkv_emulator_")} == declared


def test_kernels_keep_to_the_device_vocabulary() -> None:
    """Kernels include nothing but dev.h and the project's headers, and launch in one place."""
    allowed = {
        "dev.h",
        "launch.cuh",
        "scan.cuh",
        "ops.h",
        "cstddef",
        "cstdint",
        "cstdlib",
        "cstring",
        "cmath",
        "type_traits",
    }
    for path in (PLUGINS / "kernels").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "<<<" not in text, path
        if path.name != "memory.cu":
            assert "cudaMalloc" not in text and "Synchronize" not in text, path
        if path.name != "dev.h":
            found = set(re.findall(r'#include [<"]([^">]+)[">]', text))
            own = {other.name for other in (PLUGINS / "kernels").iterdir()}
            assert {name for name in found if not name.startswith("chunkkv/")} <= allowed | own, path
        if path.name not in ("dev.h", "launch.cuh", "launch.cu", "memory.cu"):
            assert "__CUDACC__" not in text and "cudaLaunch" not in text and "asm" not in text, path


class Refused:
    """Valid arguments of every op, as parameter structs, to be spoiled one at a time."""

    def __init__(self, library: NativeLibrary, memory: Memory) -> None:
        self.lib = library._lib
        self.integers = memory.put(np.full(400, 20, np.int32)).pointer
        self.floats = memory.put(np.zeros(4096, np.float32)).pointer
        self.settings = abi.Settings(window=4, sinks=2, chunk_size=3, pooling=1, keep_per_10k=5_000, min_tokens=9)
        self.rows = abi.Rows(lengths=self.integers, batch=1, max_length=20)
        self.layout = abi.Layout(stride_row=0, stride_head=5120, stride_token=256, extent=20)
        self.layer = (abi.Layer * 2)(abi.Layer(self.floats, self.floats), abi.Layer(self.floats, self.floats))

    def params(self, op: str) -> Any:
        integers, floats = self.integers, self.floats
        if op == "boundaries":
            p = abi.BoundariesParams(self.settings, self.rows, integers, integers, 32, 14, integers, integers)
            p.settings.boundaries = 1
            return p
        if op == "score":
            sizes = {"heads": 2, "kv_heads": 1, "head_dim": 64, "max_chunks": 6}
            layouts = {"query_layout": self.layout, "key_layout": self.layout}
            pointers = dict.fromkeys(("query", "key", "chunk_scores"), floats)
            return abi.ScoreParams(settings=self.settings, rows=self.rows, **layouts, **pointers, **sizes)
        if op == "select":
            outputs = dict.fromkeys(("kept_indices", "kept_lengths"), integers)
            sizes = {"choices": 1, "max_chunks": 6, "max_kept": 20}
            return abi.SelectParams(settings=self.settings, rows=self.rows, chunk_scores=floats, **outputs, **sizes)
        if op == "compact":
            layouts = {"layout": self.layout, "layout_out": self.layout, "layers": self.layer}
            chosen = dict.fromkeys(("kept_indices", "kept_lengths"), integers)
            sizes = {"num_layers": 1, "max_kept": 20, "kv_heads": 1, "choices": 1, "row_bytes": 256}
            return abi.CompactParams(rows=self.rows, **layouts, **chosen, **sizes)
        if op == "prepare":
            pointers = (integers,) * 9
            return abi.PrepareParams(self.settings, *pointers, 20, 1, 1, 20, 32)
        return abi.RopeParams(floats, floats, integers, floats, 2, 9, 2, 1, 64, 64, 0, 0, 0)

    def message(self, op: str, change: Callable[[Any], None]) -> tuple[int, str]:
        params = self.params(op)
        change(params)
        extra = (ctypes.c_void_p(None), ctypes.c_size_t(0)) if op == "score" else ()
        status = getattr(self.lib, f"chunkkv_{op}")(ctypes.byref(params), *extra, ctypes.c_void_p(None))
        return status, self.lib.chunkkv_last_error().decode()


@pytest.fixture
def refused(library: NativeLibrary, memory: Memory) -> Refused:
    return Refused(library, memory)


ALL_WITH_SETTINGS = ("boundaries", "score", "select", "prepare")
ALL_WITH_ROWS = ("boundaries", "score", "select", "compact")
BAD_SETTINGS = [
    ("window", 0, "window is 0; allowed is 1 to 128"),
    ("window", 129, "window is 129; allowed is 1 to 128"),
    ("sinks", -1, "sinks is -1; allowed is 0 to 65536"),
    ("chunk_size", 257, "chunk_size is 257; allowed is 1 to 256"),
    ("boundaries", 2, "boundaries is 2; allowed is 0 to 1"),
    ("pooling", 4, "pooling is 4; allowed are odd values"),
    ("pooling", 65, "pooling is 65; allowed is 1 to 63"),
    ("score", -1, "score is -1; allowed is 0 to 2"),
    ("window_reduce", 2, "window_reduce is 2; allowed is 0 to 1"),
    ("head_reduce", -1, "head_reduce is -1; allowed is 0 to 1"),
    ("value_norm", 2, "value_norm is 2; allowed is 0 to 1"),
    ("heads", 2, "heads is 2; allowed is 0 to 1"),
    ("budget_split", 2, "budget_split is 2; allowed is 0 to 1"),
    ("budget_split", 1, "reading_share_per_10k is 0; allowed is 10000 to 1000000"),
    ("keep_per_10k", 0, "keep_per_10k is 0; allowed is 1 to 10000"),
    ("budget_tokens", -1, "budget_tokens is -1; allowed is 0 to"),
    ("min_tokens", 8, "min_tokens is 8; it must be at least 9, window + sinks + chunk_size"),
]


@pytest.mark.parametrize("op", ALL_WITH_SETTINGS)
@pytest.mark.parametrize(("name", "value", "text"), BAD_SETTINGS)
def test_bad_settings_are_named(refused: Refused, op: str, name: str, value: int, text: str) -> None:
    status, message = refused.message(op, lambda p: setattr(p.settings, name, value))
    assert status == 1 and message.startswith(f"chunkkv_{op}: {text}")


@pytest.mark.parametrize("op", ALL_WITH_ROWS)
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("batch", -1, "batch is -1; allowed is 0 to 65535"),
        ("batch", 65_536, "batch is 65536"),
        ("max_length", 2**22 + 1, "max_length is 4194305; allowed is 0 to 4194304"),
        ("lengths", None, "lengths is NULL"),
        ("row_starts", 1, "num_tokens is 0; allowed is 1 to 2147483647"),
    ],
)
def test_bad_rows_are_named(refused: Refused, op: str, name: str, value: Any, text: str) -> None:
    status, message = refused.message(op, lambda p: setattr(p.rows, name, value))
    assert status == 1 and text in message


# op, path of the field, value, status, text
BAD_FIELDS: list[tuple[str, str, Any, int, str]] = [
    ("boundaries", "chunk_starts", None, 1, "chunk_starts is NULL"),
    ("boundaries", "num_chunks", None, 1, "num_chunks is NULL"),
    ("boundaries", "token_ids", None, 1, "token_ids is NULL"),
    ("boundaries", "delimiter_bitmap", None, 1, "delimiter_bitmap is NULL"),
    ("boundaries", "max_chunks", 13, 1, "max_chunks is 13; it must be at least 14"),
    ("score", "query", None, 1, "query is NULL"),
    ("score", "key", None, 1, "key is NULL"),
    ("score", "chunk_scores", None, 1, "chunk_scores is NULL"),
    ("score", "max_chunks", 4, 1, "max_chunks is 4; it must be at least 5"),
    ("score", "heads", 3, 0, ""),
    ("score", "kv_heads", 2, 0, ""),
    ("score", "kv_heads", 0, 1, "kv_heads is 0; allowed is 1 to 2"),
    ("score", "heads", 17, 2, "heads / kv_heads is 17; allowed is 1 to 16"),
    ("score", "head_dim", 72, 2, "head_dim is 72; there are kernels for 64, 80, 96, 128, 256"),
    ("score", "query_dtype", 3, 2, "query_dtype is 3"),
    ("score", "key_dtype", 1, 2, "key_dtype is 1 with query_dtype 0"),
    ("score", "query_is_window", 2, 1, "query_is_window is 2"),
    ("score", "key_layout.stride_token", 255, 1, "key_layout.stride_token is 255; it must be at least 256"),
    ("score", "query_layout.extent", 19, 1, "query_layout.extent is 19; it must be at least 20"),
    ("score", "key_layout.stride_token", 264, 1, "key is at 0x"),
    ("score", "query_layout.stride_head", 8, 1, "query is at 0x"),
    ("score", "query_layout.block_offsets", 1, 1, "query_layout is paged"),
    ("select", "kept_indices", None, 1, "kept_indices is NULL"),
    ("select", "kept_lengths", None, 1, "kept_lengths is NULL"),
    ("select", "chunk_scores", None, 1, "chunk_scores is NULL"),
    ("select", "max_kept", 9, 1, "max_kept is 9; it must be at least 10, N of max_length"),
    ("select", "num_chunks", 1, 1, "boundaries is fixed, but chunk_starts or num_chunks is given"),
    ("compact", "layers", None, 1, "layers is NULL"),
    ("compact", "num_layers", 0, 1, "num_layers is 0"),
    ("compact", "row_bytes", 0, 1, "row_bytes is 0"),
    ("compact", "kv_heads", 0, 1, "kv_heads is 0"),
    ("compact", "kept_indices", None, 1, "kept_indices is NULL"),
    ("compact", "layout.row_starts", 1, 0, ""),
    ("compact", "layout.block_offsets", 1, 1, "layout.tokens_per_block is 0; it must be a power of two"),
    ("prepare", "batch", 65_536, 1, "batch is 65536; allowed is 0 to 65535"),
    ("prepare", "contexts", 2, 1, "contexts is 2; allowed is 0 to 1"),
    ("prepare", "contexts", -1, 1, "contexts is -1; allowed is 0 to 1"),
    ("prepare", "max_length", 2**22 + 1, 1, "max_length is 4194305"),
    ("prepare", "num_tokens", 0, 1, "num_tokens is 0; allowed is 1 to 2147483647"),
    ("prepare", "num_tokens", 2**31, 1, "num_tokens is 2147483648"),
    ("prepare", "vocab_size", 0, 1, "vocab_size is 0; allowed is 1 to"),
    ("prepare", "sequence_lengths", None, 1, "sequence_lengths is NULL"),
    ("prepare", "context_lengths", None, 1, "context_lengths is NULL"),
    ("prepare", "attention_lengths", None, 1, "attention_lengths is NULL"),
    ("prepare", "kept_lengths", None, 1, "kept_lengths is NULL"),
    ("prepare", "row_starts", None, 1, "row_starts is NULL"),
    ("prepare", "positions", None, 1, "positions is NULL"),
    ("prepare", "token_ids", None, 1, "token_ids is NULL"),
    ("prepare", "delimiter_bitmap", None, 1, "delimiter_bitmap is NULL"),
    (
        "prepare",
        "is_delimiter",
        None,
        1,
        "is_delimiter is NULL, but token_ids, delimiter_bitmap or vocab_size is given",
    ),
    ("rope", "head_dim", 258, 2, "head_dim is 258; allowed are even values from 2 to 256"),
    ("rope", "rotary_dim", 66, 1, "rotary_dim is 66; allowed is 2 to 64"),
    ("rope", "rotary_dim", 33, 1, "rotary_dim is 33; it must be even"),
    ("rope", "positions", None, 1, "positions is NULL"),
    ("rope", "cos_sin", None, 1, "cos_sin is NULL"),
    ("rope", "dtype", 4, 2, "dtype is 4"),
    ("rope", "style", 2, 1, "style is 2"),
    ("rope", "num_tokens", 2**31, 1, "num_tokens is 2147483648"),
]


@pytest.mark.parametrize(("op", "field", "value", "status", "text"), [case for case in BAD_FIELDS if case[3]])
def test_bad_arguments_are_named(refused: Refused, op: str, field: str, value: Any, status: int, text: str) -> None:
    def change(params: Any) -> None:
        *parents, name = field.split(".")
        for parent in parents:
            params = getattr(params, parent)
        setattr(params, name, value)

    got, message = refused.message(op, change)
    assert got == status and message.startswith(f"chunkkv_{op}: {text}")


def test_a_group_of_layers_is_in_place_as_a_whole(refused: Refused) -> None:
    def change(params: Any) -> None:
        params.num_layers = 2
        refused.layer[1].key_out = refused.layer[1].value_out = refused.floats

    status, message = refused.message("compact", change)
    assert status == 1 and "layers[1]" in message


def test_score_asks_for_its_workspace(refused: Refused) -> None:
    params, size = refused.params("score"), ctypes.c_size_t()
    assert refused.lib.chunkkv_score_workspace(ctypes.byref(params), ctypes.byref(size)) == 0 and size.value > 0
    status, message = refused.message("score", lambda p: None)
    assert status == 3 and f"pass {size.value} bytes, aligned to 256" in message


def test_null_structs_are_refused(library: NativeLibrary) -> None:
    lib = library._lib
    for op in ("boundaries", "select", "compact", "rope", "prepare"):
        assert getattr(lib, f"chunkkv_{op}")(None, None) == 1
    assert lib.chunkkv_score(None, None, ctypes.c_size_t(0), None) == 1
    assert lib.chunkkv_kept_tokens(None, ctypes.c_int64(5)) == -1


def test_a_packed_list_needs_its_lengths(refused: Refused) -> None:
    def change(params: Any) -> None:
        params.rows.row_starts, params.rows.num_tokens, params.kept_lengths = refused.integers, 20, None

    status, message = refused.message("compact", change)
    assert status == 1 and "kept_lengths is NULL with row_starts" in message


def test_messages_are_kept_per_thread(library: NativeLibrary) -> None:
    other = []

    def ask() -> None:
        other.append(library.why_unsupported("rope", "float16", "float16", 3))

    assert library.why_unsupported("score", "float16", "float16", 72)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "head_dim is 3" in str(other[0])
    assert "head_dim is 72" in library._lib.chunkkv_last_error().decode()


def test_what_is_supported(library: NativeLibrary) -> None:
    kinds = ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"]
    for query in kinds:
        for key in kinds:
            fits = query in kinds[:3] and key in (query, "int8", "float8_e4m3fn")
            assert (library.why_unsupported("score", query, key, 128, 16) is None) == fits
    for group, fits in ((0, False), (1, True), (16, True), (17, False)):
        assert (library.why_unsupported("score", "float16", "float16", 64, group) is None) == fits
    assert library.why_unsupported("compact", "float16", "int8", 80) is None
    assert "head_dim is 81" in str(library.why_unsupported("compact", "float16", "int8", 81))


def test_settings_and_lengths_out_of_range_raise(library: NativeLibrary) -> None:
    with pytest.raises(NativeArgumentError, match=naming("length -1 0 4194304")):
        library.kept_tokens(SETTINGS, -1)
    with pytest.raises(NativeArgumentError, match=naming("length 4194305")):
        library.max_chunks(SETTINGS, 2**22 + 1)


def test_arrays_of_the_wrong_kind_raise(library: NativeLibrary, memory: Memory) -> None:
    lengths, scores = memory.put(np.array([20], np.int32)), memory.put(np.zeros((1, 6), np.float32))
    kept, counts = memory.empty((1, 20), "int32"), memory.empty((1,), "int32")
    rows = BatchRows(lengths, 20)
    for bad, text in [
        (replace(scores, dtype="float16"), "chunk_scores float16"),
        (replace(scores, shape=(2, 3)), "chunk_scores float32 [2,3]"),
        (replace(scores, strides=(48, 8)), "row-major"),
        (replace(scores, on_device=not scores.on_device), "chunk_scores in"),
        ("text", "str array"),
    ]:
        with pytest.raises(NativeArgumentError, match=naming(text)):
            library.select(SETTINGS, rows, bad, kept, counts)
    delimiter = replace(SETTINGS, boundaries="delimiter")
    with pytest.raises(NativeArgumentError, match=naming("chunk_starts NULL")):
        library.select(delimiter, rows, memory.put(np.zeros((1, 14), np.float32)), kept, counts)
    with pytest.raises(NativeArgumentError, match=naming("int32 [1,7]")):
        library.select(delimiter, rows, scores, kept, counts, chunks=Chunks(kept, counts))


def test_caches_that_do_not_fit_raise() -> None:
    dense = RawArray(1 << 20, "float16", (1, 2, 8, 64))
    with pytest.raises(NativeArgumentError, match=naming("float16 bfloat16")):
        contiguous_kv(dense, replace(dense, dtype="bfloat16"))
    with pytest.raises(NativeArgumentError, match=naming("adjacent")):
        contiguous_kv(*[replace(dense, strides=(4096, 2048, 256, 4))] * 2)
    with pytest.raises(NativeArgumentError, match=naming("layer 3 0 2")):
        paged_kv(RawArray(0, "int8", (4, 3, 2, 2, 16, 64)), RawArray(0, "int32", (1, 2, 4)), 3)
    with pytest.raises(NativeArgumentError, match=naming("row_starts int64")):
        packed_kv(*[RawArray(0, "int8", (9, 2, 64))] * 2, RawArray(0, "int64", (1,)))
    with pytest.raises(NativeArgumentError, match=naming("dtype 'float64'")):
        as_raw(np.zeros(3))


def test_the_library_must_exist_and_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailableError, match=naming(tmp_path / "nowhere.so")):
        NativeLibrary(tmp_path / "nowhere.so")
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    monkeypatch.setenv("CHUNKKV_LIB", str(other))
    with pytest.raises(BackendUnavailableError, match=naming(other)):
        NativeLibrary()
