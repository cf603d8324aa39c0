"""Which GPUs a plugin library has kernels for, by the file beside it and the rules of CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkkv.gpu.plugin_architectures import ARCHITECTURES_FILE, architectures, described, no_kernels, uncovered

GPUS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "12.1"]


def library(folder: Path, text: str) -> Path:
    (folder / ARCHITECTURES_FILE).write_text(text)
    return folder / "libchunkkv_tensorrt_rtx.so.1"


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("89-real", "8.9"),
        ("80-real", "8.0 8.6 8.9"),
        ("90a-real", "9.0"),
        ("90a", "9.0"),
        ("120", "12.0 12.1"),
        ("120f-real", "12.0 12.1"),
        ("86-virtual", "8.6 8.9 9.0 10.0 12.0 12.1"),
        ("86", "8.6 8.9 9.0 10.0 12.0 12.1"),
        ("80-real;86-real;89-real;90a-real;100-real;120\n", "8.0 8.6 8.9 9.0 10.0 12.0 12.1"),
    ],
)
def test_code_runs_where_cuda_says(tmp_path: Path, text: str, covered: str) -> None:
    path = library(tmp_path, text)
    assert [gpu for gpu in GPUS if gpu not in uncovered(path, GPUS)] == covered.split()


@pytest.mark.parametrize("text", [None, "", "native", "all-major;80", "eighty"])
def test_nothing_is_claimed_of_a_library_that_tells_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "libchunkkv_tensorrt.so.11" if text is None else library(tmp_path, text)
    assert architectures(path) == () and uncovered(path, GPUS) == [] and no_kernels(path, GPUS) == ""
    assert "no file beside it" in described(path)


def test_the_sentence_names_library_architectures_and_gpus(tmp_path: Path) -> None:
    path = library(tmp_path, "89-real;90a-real")
    expected = f"{path} was built for 89-real, 90a-real, not for GPUs of compute capability 8.6, 12.0"
    assert no_kernels(path, ["8.6", "8.9", "12.0"]) == expected and no_kernels(path, ["8.9"]) == ""
    assert described(path) == f"{path} (for 89-real, 90a-real)"
