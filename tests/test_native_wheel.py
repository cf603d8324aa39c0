"""The wheel with native code: built with the compiler from pip, installed and used where no compiler is.

It is built for one architecture, which takes a fifth of the time of the real one. This is the one place where the tests
compile every kernel for a GPU, so what the compiler says of them is looked at here too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from native import compile_check
from support.messages import naming
from test_packaging import ROOT, content, shipped_python

from chunkkv.errors import NativeError
from chunkkv.native import BatchRows, NativeLibrary, RawArray
from chunkkv.settings import ChunkKVSettings

pytestmark = [pytest.mark.deep, pytest.mark.timeout(1200)]

PLUGINS = ("libchunkkv_tensorrt.so.10", "libchunkkv_tensorrt.so.11", "libchunkkv_tensorrt_rtx.so.1")
ALIAS = "rtx/libtensorrt_rtx.so"
LIBRARIES = {"libchunkkv.so", *PLUGINS, "libchunkkv_tensorrt_loader.so", ALIAS}
SYSTEM = {"libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
LOAD = """
import ctypes
from chunkkv.gpu.tensorrt_plugins import find_plugin_library, find_registry_alias
from chunkkv.native import NativeLibrary
library = NativeLibrary()
print(library.path, library.device)
for flavour, version in ("standard", "10.16.1"), ("standard", "11.4.0"), ("rtx", "1.7.1"):
    path = find_plugin_library(flavour, version)
    print(path, hasattr(ctypes.CDLL(str(path)), "getCreators"))
print(find_registry_alias())
"""


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Pythons of two new virtual environments: the one that builds, and the one that only installs."""
    folder = tmp_path_factory.mktemp("environments")
    for name in ("build", "use"):
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    return folder / "build" / "bin" / "python", folder / "use" / "bin" / "python"


class Built(NamedTuple):
    """A wheel, and what its build wrote."""

    path: Path
    log: str


@pytest.fixture(scope="module")
def built(environments: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of one architecture, as `make wheel` builds it where there is no CUDA toolkit."""
    folder = tmp_path_factory.mktemp("native")
    command = [environments[0], ROOT / "plugins" / "build.py", "--pip_nvcc", "--architectures", "90a-real"]
    command += ["--build_dir", folder / "build", "--wheel", folder]
    told = {**os.environ, "CUDAFLAGS": "-Xptxas=-v"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=told)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return Built(path, done.stdout)


@pytest.fixture(scope="module")
def wheel(built: Built) -> Path:
    return built.path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the libraries in the unpacked wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "chunkkv" / "lib"


def test_no_kernel_uses_more_than_the_table_says(built: Built) -> None:
    table = json.loads(compile_check.TABLE.read_text(encoding="utf-8"))
    pinned = re.search(r"nvidia-cuda-nvcc==(\d+\.\d+)", (ROOT / "plugins" / "nvcc.txt").read_text(encoding="utf-8"))
    usage = compile_check.usage_of(built.log)
    assert all(list(places) == ["sm_90a"] for places in usage.values())
    assert pinned is not None and compile_check.complaints(usage, table, pinned[1]) == []


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU: make gpu-check runs the library")
def test_the_library_loads_and_names_a_missing_driver(unpacked: Path) -> None:
    """Without a driver every launch fails with CUDA's own words, and nothing crashes."""
    library = NativeLibrary(unpacked / "libchunkkv.so")
    assert library.device == "cuda"
    settings = ChunkKVSettings()
    assert library.kept_tokens(settings, 1000) == settings.kept_tokens(1000)
    rows = BatchRows(RawArray(4096, "int32", (1,)), 100)
    scores, kept = RawArray(4096, "float32", (1, 20)), RawArray(4096, "int32", (1, 100))
    with pytest.raises(NativeError, match=naming("chunkkv_select CUDA driver")):
        library.select(settings, rows, scores, kept, RawArray(4096, "int32", (1,)))


def dynamic(library: Path, entry: str) -> set[str]:
    """Return the values of a kind of entry of a library's dynamic section."""
    told = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf"\({entry}\).*\[(.*)\]", told))


def test_it_holds_the_packages_and_the_libraries(wheel: Path) -> None:
    assert re.fullmatch(r"chunkkv_trt-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = {*LIBRARIES, "libchunkkv.architectures"}
        assert content(archive) == shipped_python() | {f"chunkkv/lib/{name}" for name in files}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()


def test_the_libraries_need_nothing_that_a_system_lacks(unpacked: Path) -> None:
    """Nothing of CUDA or TensorRT is linked; the plugins find the kernels beside themselves."""
    for name in LIBRARIES - {ALIAS}:
        kernels = {"libchunkkv.so"} if name in PLUGINS else set()
        assert dynamic(unpacked / name, "NEEDED") <= SYSTEM | kernels, name
        assert dynamic(unpacked / name, "RUNPATH") == ({"$ORIGIN"} if name in PLUGINS else set()), name
    assert dynamic(unpacked / ALIAS, "SONAME") == {"libtensorrt_rtx.so"}
    assert dynamic(unpacked / ALIAS, "NEEDED") == {"libtensorrt_rtx.so.1"}
    assert dynamic(unpacked / ALIAS, "RUNPATH") == set()


def test_installed_without_a_compiler_its_libraries_are_found(
    wheel: Path, environments: tuple[Path, Path], tmp_path: Path
) -> None:
    python = str(environments[1])
    bare = {name: value for name, value in os.environ.items() if name not in ("CHUNKKV_LIB", "PYTHONPATH")}
    bare["PATH"] = str(tmp_path)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--prefer-binary", str(wheel)], env=bare, check=True)
    done = subprocess.run([python, "-c", LOAD], env=bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = environments[1].parents[1].glob("lib/python3*/site-packages/chunkkv/lib")
    plugins = [f"{folder / name} True" for name in PLUGINS]
    assert done.stdout.splitlines() == [f"{folder / 'libchunkkv.so'} cuda", *plugins, str(folder / ALIAS)]
