"""The plugin registries of TensorRT 10, of TensorRT 11 and of TensorRT for RTX take our libraries.

The first two are those of lean runtimes, which have no builder. No header of NVIDIA is used: that our own declarations
fit the registries is part of what is tested.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from native.plugin_build import registry_probe
from native.plugin_host import CHAR, INT32, node_fields
from native.tensorrt_headers import own_headers

from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv.gpu.tensorrt_plugins import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS, TENSORRT_LLM_PLUGINS
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.onnx_graph.functions import compact_attributes, select_attributes

ROOT = Path(__file__).resolve().parents[2]
NAMES = (*PLUGINS, *TENSORRT_LLM_PLUGINS)
KEYS = {f"{PLUGIN_NAMESPACE}::{name}:{PLUGIN_VERSION}" for name in NAMES}
PROBE = """
import ctypes, importlib, sys
library, tensorrt, plugins, package = sys.argv[1:]
if package:
    importlib.import_module(package)
probe = ctypes.CDLL(library).probe
probe.restype = ctypes.c_char_p
print(probe(tensorrt.encode(), plugins.encode()).decode())
"""


class Registry(NamedTuple):
    """Where a registry is, what fits it, and which layouts it has."""

    tensorrt: str
    plugins: str
    layouts: int
    package: str = ""  # the Python package that brings the library, where its own name does not find it


class Probed(NamedTuple):
    """What a registry held after each step: a line for each of our creators."""

    before: list[str]
    loaded: list[str]
    loaded_again: list[str]
    unloaded: list[str]
    registered: list[str]
    added: str
    stderr: str


def lean(major: int) -> str:
    found = sorted((ROOT / "build" / "tensorrt-lean").glob(f"*/tensorrt_lean_libs/libnvinfer_lean.so.{major}"))
    if not found:
        pytest.skip(f"no lean runtime of TensorRT {major}: make test-tensorrt fetches it")
    return str(found[-1])


@pytest.fixture(params=["10", "11", "rtx"])
def registry(request: pytest.FixtureRequest, rtx: TensorRT) -> Registry:
    if request.param == "rtx":
        return Registry("libtensorrt_rtx.so.1", "libchunkkv_tensorrt_rtx.so.1", 11, rtx.module.__name__)
    major = int(request.param)
    return Registry(lean(major), f"libchunkkv_tensorrt.so.{major}", major)


@cache
def probe(registry: Registry, plugins: Path) -> Probed:
    """Load and register the library `plugins` in a new process."""
    library = registry_probe(own_headers(registry.layouts))
    command = [sys.executable, "-c", PROBE, str(library), registry.tensorrt, str(plugins), registry.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *steps, added = done.stdout.split("--\n")
    return Probed(*(step.splitlines() for step in steps), added.strip(), done.stderr)


def documented_types() -> dict[str, int]:
    """Return the type of every field that the page of the plugins names."""
    page = (ROOT / "docs" / "tensorrt-plugins.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| (INTS?|STRING) \|", page, re.MULTILINE)
    types = {name: CHAR if kind == "STRING" else INT32 for names, kind in rows for name in names.split(", ")}
    (listed,) = re.findall(r"Its fields are all INT: (.*?)\.\n", page, re.DOTALL)
    return types | dict.fromkeys(re.findall(r"[a-z_]{4,}", listed), INT32)


def test_all_creators_appear_with_the_documented_fields(registry: Registry, library_folder: Path) -> None:
    held = probe(registry, library_folder / registry.plugins)
    assert held.before == [] and held.stderr == ""
    fields = {key: dict(field.split(":") for field in names) for key, *names in map(str.split, held.loaded)}
    assert fields.keys() == KEYS, "one has another name, version or namespace, or getCreator does not find it"
    select, compact = (fields[f"{PLUGIN_NAMESPACE}::{name}:{PLUGIN_VERSION}"] for name in PLUGINS)
    words = {"window_reduce": "max", "head_reduce": "max", "value_norm": "on", "heads": "each"}
    settings = ChunkKVSettings(**words)  # of a node that leaves no field to its default
    of_nodes = {field.name for field in node_fields(select_attributes(settings, request_window=True))}
    assert select.keys() == {
        *of_nodes,
        "max_kept",
        "head_class",
        "all_heads",
        "all_reading_heads",
        "reading_share_per_10k",
    }
    assert compact.keys() == {field.name for field in node_fields(compact_attributes(settings))}
    types = documented_types()
    wrong = [name for names in fields.values() for name, kind in names.items() if str(types.get(name)) != kind]
    assert wrong == []


def test_a_second_load_is_harmless_and_unloading_takes_everything_away(
    registry: Registry, library_folder: Path
) -> None:
    held = probe(registry, library_folder / registry.plugins)
    assert held.loaded_again == held.loaded != []
    assert held.unloaded == []


def test_the_loaders_way_registers_each_creator_once(registry: Registry, library_folder: Path) -> None:
    held = probe(registry, library_folder / registry.plugins)
    assert held.registered == held.loaded
    assert held.added == f"{len(NAMES)} 0"


def test_plugins_of_another_tensorrt_are_not_taken(registry: Registry, library_folder: Path) -> None:
    """A logger or registry of another layout would crash, so such a library offers nothing and says which one fits."""
    other = "libchunkkv_tensorrt.so.10" if registry.layouts == 11 else "libchunkkv_tensorrt.so.11"
    held = probe(registry, library_folder / other)
    assert held.loaded == held.loaded_again == held.registered == []
    assert held.added == "0 0" and f"load {registry.plugins}" in held.stderr


def test_the_loader_library_registers_in_tensorrt_for_rtx(rtx: TensorRT, library_folder: Path) -> None:
    """As under LD_PRELOAD; TensorRT's own Python bindings see the result."""
    program = f"""
import ctypes, importlib
trt = importlib.import_module({rtx.module.__name__!r})
ctypes.CDLL({str(library_folder / "libchunkkv_tensorrt_loader.so")!r})
registry = trt.get_plugin_registry()
for name in {NAMES!r}:
    creator = registry.get_creator(name, {PLUGIN_VERSION!r}, {PLUGIN_NAMESPACE!r})
    print(creator.name, creator.plugin_version, creator.plugin_namespace, len(creator.field_names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 1)[0] for line in done.stdout.splitlines()]
    assert lines == [f"{name} {PLUGIN_VERSION} {PLUGIN_NAMESPACE}" for name in NAMES]
    assert done.stderr == ""
