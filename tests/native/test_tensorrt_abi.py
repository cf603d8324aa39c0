"""The project's declarations of TensorRT's plugin interface against NVIDIA's headers, wherever those are present."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from native.build import ROOT, compiler
from native.tensorrt_headers import OWN, Headers, own_headers, real_headers

PROBE = ROOT / "tests" / "native" / "plugin_host" / "abi_probe.cc"
REAL = real_headers()
INTERFACES = (
    "IVersionedInterface",
    "INoCopy",
    "apiv::VRoot",
    "apiv::VDimensionExpr",
    "apiv::VExprBuilder",
    "IDimensionExpr",
    "IExprBuilder",
    "ILogger",
    "ILoggerFinder",
    "IPluginCapability",
    "IPluginV3",
    "IPluginV3OneCore",
    "IPluginV3OneBuild",
    "IPluginV3OneRuntime",
    "IPluginCreatorInterface",
    "IPluginCreatorV3One",
    "IPluginResourceContext",
    "IPluginRegistry",
)


def layout(headers: Headers, folder: Path) -> tuple[str, dict[str, list[str]]]:
    """Return the probe's output, and per interface its size and what each slot of its vtable holds."""
    program, dump = folder / f"probe-{headers.name}", folder / f"classes-{headers.name}"
    command = [compiler(), "-std=c++17", *headers.flags, str(PROBE), "-o", str(program), f"-fdump-lang-class={dump}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    constants = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    classes: dict[str, list[str]] = {}
    for block in dump.read_text(encoding="utf-8").split("\n\n"):
        head = re.match(r"(Vtable for|Class) nvinfer1::(?:v_1_0::)?([\w:]+)\n", block)
        if head and head[2] in INTERFACES:
            name = head[2]
            if head[1] == "Class":
                classes.setdefault(name, []).extend(re.findall(r"size=\d+ align=\d+", block)[:1])
            else:
                slots = re.findall(r"^(\d+ +\S.*)$", block, re.MULTILINE)
                classes.setdefault(name, []).extend(slot.replace("v_1_0::", "") for slot in slots)
    return constants, classes


@pytest.mark.skipif(not REAL, reason="no TensorRT headers: set TENSORRT_INCLUDE_DIR to compare with them")
@pytest.mark.parametrize("real", REAL, ids=[headers.name for headers in REAL])
def test_own_declarations_equal_the_headers(real: Headers, tmp_path: Path) -> None:
    constants, classes = layout(real, tmp_path)
    own_constants, own_classes = layout(own_headers(real.major), tmp_path)
    assert own_constants == constants
    assert sorted(classes) == sorted(INTERFACES)
    for name in INTERFACES:
        assert own_classes[name] == classes[name], name


def test_only_the_plugins_see_tensorrt() -> None:
    sources = [path for path in (ROOT / "plugins").rglob("*.*") if path.suffix in (".h", ".cc", ".cu", ".cuh")]
    seers = {path for path in sources if "#include <NvInfer" in path.read_text(encoding="utf-8")}
    assert seers and all(OWN.parent in path.parents for path in seers)
    includes = re.findall(r"#include <(NvInfer\w*)", "".join(path.read_text(encoding="utf-8") for path in seers))
    assert set(includes) == {"NvInferRuntime"}


def test_majors_differ_where_they_are_known_to(tmp_path: Path) -> None:
    (_, ten), (_, eleven) = (layout(own_headers(major), tmp_path) for major in (10, 11))
    moved = {name for name in INTERFACES if len(ten[name]) != len(eleven[name])}
    assert moved == {"ILogger", "ILoggerFinder", "IPluginRegistry"}


def test_a_swapped_function_is_noticed(tmp_path: Path) -> None:
    text = (OWN / "NvInferRuntime.h").read_text(encoding="utf-8")
    first, second = (f"virtual AsciiChar const* {name}() const noexcept = 0;" for name in ("getPluginName", "getTag"))
    assert text.count(first) == 2
    (tmp_path / "NvInferRuntime.h").write_text(text.replace(first, second + first, 1), encoding="utf-8")
    changed = Headers("changed", 11, (f"-I{tmp_path}", "-DNV_TENSORRT_MAJOR=11"))
    own = layout(own_headers(11), tmp_path)[1]
    assert {name for name in INTERFACES if layout(changed, tmp_path)[1][name] != own[name]} == {"IPluginV3OneCore"}
