"""Builds libchunkkv and the TensorRT plugins for every supported GPU, into build/native, where the loaders look.

`make plugins` runs it in a virtual environment of its own: what the machine lacks of nvcc, CMake and Ninja is installed
there by pip, the CUDA compiler included. With --wheel DIR the libraries are also packed into a wheel of the project.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native"
NVCC_REQUIREMENTS = ROOT / "plugins" / "nvcc.txt"
OLDEST_CMAKE = (3, 24)  # as CMakeLists.txt says
OLDEST_NVCC = (12, 8)  # the first one that knows every architecture of CHUNKKV_RELEASE
Version = tuple[int, ...]


def main() -> None:
    """Find or install the tools, build the libraries and, where asked for, the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, metavar="DIR", help="also write a wheel with them, to this folder")
    parser.add_argument(
        "--architectures",
        metavar="LIST",
        help="CMAKE_CUDA_ARCHITECTURES, such as 89-real, instead of every supported GPU: a quick build for one machine",
    )
    parser.add_argument("--pip_nvcc", action="store_true", help="use the compiler from pip even where there is another")
    parser.add_argument("--build_dir", type=Path, default=BUILD, metavar="DIR", help="default: build/native")
    arguments = parser.parse_args()
    check_compiler()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)])
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    prepare_cmake()
    nvcc = prepare_nvcc(arguments.pip_nvcc)
    build_libraries(arguments.build_dir, arguments.architectures, nvcc)
    if arguments.wheel:
        build_wheel(arguments.wheel, arguments.build_dir, release=arguments.architectures is None)


def check_compiler() -> None:
    """End with one line where there is no C++ compiler: pip has none."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        sys.exit(f"{name} was not found; install it (Debian: apt-get install g++), or set CXX to a C++17 compiler")


def prepare_cmake() -> None:
    """Install CMake and Ninja where they are missing or too old."""
    if version_of("cmake", r"version (\d+)\.(\d+)") < OLDEST_CMAKE:
        install("CMake", "cmake>=3.24,<5")
    if shutil.which("ninja") is None:
        install("Ninja", "ninja>=1.11,<2")


def prepare_nvcc(pip_nvcc: bool) -> Path:
    """Return the CUDA compiler of the machine, or else the one from pip, which is installed."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not pip_nvcc and version_of(nvcc, r"release (\d+)\.(\d+)") >= OLDEST_NVCC:
        return Path(nvcc)
    install("nvcc", "--requirement", str(NVCC_REQUIREMENTS))
    (found,) = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc")
    lib64 = found.parents[1] / "lib64"
    if not lib64.exists():  # nvcc's own profile names lib64; its packages say lib
        lib64.symlink_to("lib")
    return found


def version_of(tool: str, pattern: str) -> Version:
    """Return the version that `tool --version` names, or an empty one where the tool is missing."""
    try:
        told = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    match = re.search(pattern, told)
    return tuple(map(int, match.groups())) if match else ()


def install(tool: str, *requirements: str) -> None:
    """Install packages into the environment that runs this."""
    print(f"{tool} comes from pip", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", *requirements]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"{tool} could not be installed from pip; install it on this machine, or let pip reach its index")


def build_libraries(folder: Path, architectures: str | None, nvcc: Path) -> None:
    """Configure and build; with nothing changed since the last time, this only looks."""
    # A cache of an earlier configuration may hold another nvcc, or that there was none.
    defines = [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCHUNKKV_RELEASE={'OFF' if architectures else 'ON'}",
    ]
    if architectures:
        defines.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    generator = [] if (folder / "CMakeCache.txt").exists() else ["-G", "Ninja"]
    run(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *defines])
    jobs = str(os.cpu_count() or 1)
    run(["cmake", "--build", str(folder), "--target", "plugins", "--parallel", jobs])


def build_wheel(output: Path, build: Path, *, release: bool) -> None:
    """Write the wheel; its libraries are those of the build folder."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (backend,) = re.findall(r'^requires = \["(.+)"\]$', text, re.MULTILINE)
    install("the build backend", backend)
    # In an isolated environment the backend would compile everything again.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    settings = ["wheel.cmake=true", f"build-dir={build}", f"wheel.tags=py3-none-{platform_tag(build)}"]
    settings += [] if release else ["cmake.define.CHUNKKV_RELEASE=OFF"]
    options = [f"--config-settings={setting}" for setting in settings]
    run([*command, *options, "--wheel-dir", str(output), str(ROOT)])


def platform_tag(folder: Path) -> str:
    """Return the platform of a wheel with the libraries in `folder`: the oldest C library that has what they use."""
    used = [found for path in folder.glob("*.so*") for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())]
    major, minor = max((int(major), int(minor)) for major, minor in used)
    return f"manylinux_{major}_{minor}_{platform.machine()}"


def run(command: list[str]) -> None:
    """Run a command with its output shown; end with its status where it fails."""
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
