"""What `pip install .` installs, what a source archive holds, and the wheel with native code that make wheel writes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"chunkkv": ROOT / "python" / "chunkkv", "chunkkv_builder": ROOT / "builder" / "chunkkv_builder"}
HEAVY = ("torch", "transformers", "tensorrt", "tensorrt_llm", "kvpress", "matplotlib", "pydantic")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the checkout, built where no compiler is on the path."""
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(ROOT)]
    subprocess.run(command, env=os.environ | {"PATH": str(output)}, check=True)
    (path,) = output.glob("chunkkv_trt-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


def shipped_python() -> set[str]:
    """Return every module and data file of both packages, by its name in a wheel."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".html", ".typed", ".txt", ".md")
    }


def content(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert content(wheel) == shipped_python()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_source_archive_is_the_checkout(tmp_path: Path) -> None:
    """Native code, tests, docs and examples included: what it builds can be tested and tried."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    program = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", maxsplit=1)[1] for name in archive.getnames()}
    assert names == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} | {"PKG-INFO"}


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


def test_make_plugins_without_a_compiler_says_so_in_one_line(tmp_path: Path) -> None:
    """Before it installs anything: pip has a CUDA compiler, but no C++ compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "plugins" / "build.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("g++ was not found") and "CXX" in line
