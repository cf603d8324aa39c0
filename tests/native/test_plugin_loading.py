"""How the plugin libraries get into a process: what they export, who registers them, and which TensorRT they fit."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from native.build import emulated_library
from native.plugin_build import host_library, loader_library, plugin_library, stub_tensorrt
from native.tensorrt_headers import own_headers


class Host(NamedTuple):
    """A TensorRT, and the plugin library that fits it."""

    title: str
    tensorrt: str
    plugins: str
    layouts: int

    @property
    def is_rtx(self) -> bool:
        return "RTX" in self.title


HOSTS = {
    "10": Host("TensorRT 10", "libnvinfer.so.10", "libchunkkv_tensorrt.so.10", 10),
    "11": Host("TensorRT 11", "libnvinfer.so.11", "libchunkkv_tensorrt.so.11", 11),
    "rtx1": Host("TensorRT for RTX 1", "libtensorrt_rtx.so.1", "libchunkkv_tensorrt_rtx.so.1", 11),
}
EVERY = "".join(f"chunkkv::ChunkKV{name}:1\n" for name in ("Select", "Compact", "Prepare", "Rope", "Score", "Compress"))
LOAD = """
import ctypes, os, sys
stub = None
for path in sys.argv[1:]:
    library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    stub = library if "libnvinfer" in path or "libtensorrt_rtx" in path else stub
if stub is not None:
    stub.stub_registered.restype = ctypes.c_char_p
    print(stub.stub_registered().decode(), end="")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the build makes it: the loader beside the plugin libraries of every TensorRT."""
    folder = tmp_path_factory.mktemp("plugins")
    libraries = [
        plugin_library(emulated_library(), own_headers(host.layouts), rtx=host.is_rtx) for host in HOSTS.values()
    ]
    for library in (loader_library(), *libraries):
        shutil.copy(library, folder / library.name)
    return folder


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stand-in for each TensorRT in a folder of its own."""
    copies = {}
    for name, host in HOSTS.items():
        stub = stub_tensorrt(own_headers(host.layouts), host.tensorrt)
        copies[name] = tmp_path_factory.mktemp(f"trt{name}") / stub.name
        shutil.copy(stub, copies[name])
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
    for host in HOSTS.values():
        library = folder / host.plugins
        assert symbols(library, "--defined-only") == {
            *("getCreators", "setLoggerFinder"),
            *("chunkkv_register_creators", "chunkkv_last_kept_tokens"),
        }
        needed = symbols(library, "--undefined-only")
        assert not [name for name in needed if re.match(r"(?i)cu|nv|.*nvinfer|.*registry", name)]
    assert symbols(loader(folder), "--defined-only") == set()


@pytest.mark.parametrize("host", HOSTS)
def test_the_loader_picks_the_tensorrt_that_is_loaded(folder: Path, tensorrt: dict[str, Path], host: str) -> None:
    assert load(tensorrt[host], loader(folder)) == (EVERY, "")


def test_the_loader_loads_tensorrt_where_it_comes_first(folder: Path, tensorrt: dict[str, Path]) -> None:
    for stub in tensorrt.values():
        path = str(stub.parent)
        assert load(loader(folder), stub, LD_LIBRARY_PATH=path) == (EVERY, "")
        assert load(stub, LD_LIBRARY_PATH=path, LD_PRELOAD=str(loader(folder))) == (EVERY, "")
    every = os.pathsep.join(str(path.parent) for path in tensorrt.values())
    assert load(loader(folder), tensorrt["11"], LD_LIBRARY_PATH=every) == (EVERY, "")
    assert load(loader(folder), tensorrt["10"], LD_LIBRARY_PATH=every) == ("", "")
    assert load(loader(folder), tensorrt["rtx1"], LD_LIBRARY_PATH=every) == ("", "")


def test_the_loader_says_why_nothing_is_registered(folder: Path, tensorrt: dict[str, Path], tmp_path: Path) -> None:
    assert "none of libnvinfer.so.11, libnvinfer.so.10, libtensorrt_rtx.so.1 was found" in load(loader(folder))[1]
    alone = tmp_path / "alone.so"
    shutil.copy(loader(folder), alone)
    for name, host in HOSTS.items():
        taken, message = load(tensorrt[name], alone)
        assert taken == "" and f"cannot load {tmp_path}/{host.plugins}" in message
    again = folder / "again.so"
    shutil.copy(loader(folder), again)
    taken, message = load(tensorrt["10"], loader(folder), again)
    assert taken == EVERY and "TensorRT 10 has taken no plugin; are they registered already?" in message


@pytest.mark.parametrize(("own", "other"), list(itertools.permutations(HOSTS, 2)))
def test_plugins_of_another_tensorrt_give_nothing(
    folder: Path, tensorrt: dict[str, Path], own: str, other: str
) -> None:
    """A logger or registry of another layout would crash, so the library stays away from both."""
    script = f"""
import ctypes
from pathlib import Path
from native.plugin_host import PluginHost
stub = ctypes.CDLL({str(tensorrt[other])!r})
plugins = {str(folder / HOSTS[own].plugins)!r}
host = PluginHost(Path({str(host_library(own_headers(HOSTS[own].layouts)))!r}), Path(plugins))
assert host.creators() == [] and host.take_log() == []
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = f"made for {HOSTS[own].title}, but {HOSTS[other].title} is loaded; load {HOSTS[other].plugins}"
    assert told in done.stderr
