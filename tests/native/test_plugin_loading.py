"""How the plugin libraries get into a process: what they export, who registers them, and which TensorRT they fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from native.build import emulated_library
from native.plugin_build import host_library, loader_library, plugin_library, stub_tensorrt
from native.tensorrt_headers import own_headers

MAJORS = (10, 11)
EVERY = "".join(f"chunkkv::ChunkKV{name}:1\n" for name in ("Select", "Compact", "Prepare", "Rope", "Score", "Compress"))
LOAD = """
import ctypes, os, sys
stub = None
for path in sys.argv[1:]:
    library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    stub = library if "libnvinfer" in path else stub
if stub is not None:
    stub.stub_registered.restype = ctypes.c_char_p
    print(stub.stub_registered().decode(), end="")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the build makes it: the loader beside the plugin libraries of both majors."""
    folder = tmp_path_factory.mktemp("plugins")
    for library in (loader_library(), *(plugin_library(emulated_library(), own_headers(major)) for major in MAJORS)):
        shutil.copy(library, folder / library.name)
    return folder


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A libnvinfer of each major in a folder of its own."""
    copies = {}
    for major in MAJORS:
        stub = stub_tensorrt(own_headers(major))
        copies[major] = tmp_path_factory.mktemp(f"trt{major}") / stub.name
        shutil.copy(stub, copies[major])
    return copies


def load(*paths: Path, **environment: str) -> tuple[str, str]:
    """Load the libraries in order in a new process; returns what the stub took, and stderr."""
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def loader(folder: Path) -> Path:
    return folder / "libchunkkv_tensorrt_loader.so"


def symbols(library: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def test_exports_and_imports(folder: Path) -> None:
    for major in MAJORS:
        library = folder / f"libchunkkv_tensorrt.so.{major}"
        assert symbols(library, "--defined-only") == {"getCreators", "setLoggerFinder", "chunkkv_register_creators"}
        needed = symbols(library, "--undefined-only")
        assert not [name for name in needed if re.match(r"(?i)cu|nv|.*nvinfer|.*registry", name)]
    assert symbols(loader(folder), "--defined-only") == set()


@pytest.mark.parametrize("major", MAJORS)
def test_the_loader_picks_the_major_that_is_loaded(folder: Path, tensorrt: dict[int, Path], major: int) -> None:
    assert load(tensorrt[major], loader(folder)) == (EVERY, "")


def test_the_loader_loads_tensorrt_where_it_comes_first(folder: Path, tensorrt: dict[int, Path]) -> None:
    for major in MAJORS:
        path = str(tensorrt[major].parent)
        assert load(loader(folder), tensorrt[major], LD_LIBRARY_PATH=path) == (EVERY, "")
        assert load(tensorrt[major], LD_LIBRARY_PATH=path, LD_PRELOAD=str(loader(folder))) == (EVERY, "")
    both = os.pathsep.join(str(path.parent) for path in tensorrt.values())
    assert load(loader(folder), tensorrt[11], LD_LIBRARY_PATH=both) == (EVERY, "")
    assert load(loader(folder), tensorrt[10], LD_LIBRARY_PATH=both) == ("", "")


def test_the_loader_says_why_nothing_is_registered(folder: Path, tensorrt: dict[int, Path], tmp_path: Path) -> None:
    assert "no libnvinfer.so.11 or libnvinfer.so.10 was found" in load(loader(folder))[1]
    alone = tmp_path / "alone.so"
    shutil.copy(loader(folder), alone)
    taken, message = load(tensorrt[10], alone)
    assert taken == "" and f"cannot load {tmp_path}/libchunkkv_tensorrt.so.10" in message
    again = folder / "again.so"
    shutil.copy(loader(folder), again)
    taken, message = load(tensorrt[10], loader(folder), again)
    assert taken == EVERY and "TensorRT 10 has taken no plugin; are they registered already?" in message


@pytest.mark.parametrize("major", MAJORS)
def test_plugins_of_the_other_major_give_nothing(folder: Path, tensorrt: dict[int, Path], major: int) -> None:
    """A logger or registry of another major would crash, so the library stays away from both."""
    other = 21 - major
    script = f"""
import ctypes
from pathlib import Path
from native.plugin_host import PluginHost
stub = ctypes.CDLL({str(tensorrt[other])!r})
plugins = {str(folder / f"libchunkkv_tensorrt.so.{major}")!r}
host = PluginHost(Path({str(host_library(own_headers(major)))!r}), Path(plugins))
assert host.creators() == [] and host.take_log() == []
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"made for TensorRT {major}, but {other} is loaded; load libchunkkv_tensorrt.so.{other}" in done.stderr
