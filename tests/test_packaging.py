"""What `pip install .` installs: every module and data file, nothing else, and none of the heavy packages."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"chunkkv": ROOT / "python" / "chunkkv", "chunkkv_builder": ROOT / "builder" / "chunkkv_builder"}
HEAVY = ("torch", "transformers", "tensorrt", "tensorrt_llm", "kvpress", "matplotlib", "pydantic")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("python", "builder"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(copy)]
    subprocess.run(command, check=True)
    (found,) = output.glob("chunkkv_trt-*.whl")
    return zipfile.ZipFile(found)


def test_the_wheel_has_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".html", ".typed")
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_default_install_asks_for_no_heavy_package(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    wanted = re.findall(r"^Requires-Dist: (.+)$", wheel.read(name).decode(), re.MULTILINE)
    default = {re.split(r"[^\w.-]", line)[0] for line in wanted if "extra ==" not in line}
    assert "onnxruntime" in default and not default & set(HEAVY)
    documented = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert [package for package in default if f"| {package} |" not in documented] == []


def test_both_commands_are_installed() -> None:
    scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
    assert {"chunkkv", "chunkkv-build"} <= scripts


def test_importing_either_package_stays_cheap() -> None:
    program = "import sys, chunkkv, chunkkv_builder; print(sorted({'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
