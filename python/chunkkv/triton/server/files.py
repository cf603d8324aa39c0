"""Finds a tritonserver on this machine and what it needs to start."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from chunkkv.errors import BackendUnavailableError

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
_PRINT_VERSION = (
    "import sys, sysconfig; print(f'{sys.version_info.major}.{sys.version_info.minor}'); "
    "print(sysconfig.get_config_var('LIBDIR') if sysconfig.get_config_var('Py_ENABLE_SHARED') else '')"
)
_PRINT_NUMPY = "import importlib.metadata as m; print(m.version('numpy'))"
WHEEL_VERSION = "nvidia-pytriton==0.7.0"


@dataclass(frozen=True)
class ServerFiles:
    """What it takes to start a server.

    Parameters
    ----------
    binary : the program tritonserver.
    backends : folder of its backends; None: the server's own default.
    environment : environment variables to start it in.
    """

    binary: Path
    backends: Path | None
    environment: dict[str, str]

    @classmethod
    def find(cls, work_dir: Path, python: Path, server: Path | None = None) -> ServerFiles:
        """Return the server given, else that of the wheel nvidia-pytriton in `python`'s environment, else PATH's.

        Parameters
        ----------
        work_dir : folder for what a server from the wheel needs; it must stay there while the server runs.
        python : the interpreter that runs the models.
        server : the program to use. Default: look for one.

        Raises BackendUnavailableError with what was looked for.
        """
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", os.defpath)])
        site_packages = _site_packages(python)
        if server is None and site_packages is not None:
            return _from_wheel(site_packages, python, work_dir, environment)
        on_path = shutil.which("tritonserver")
        binary = server or (Path(on_path) if on_path else CONTAINER_SERVER)
        if not binary.is_file():
            raise BackendUnavailableError(
                f"no tritonserver: {binary} does not exist, none is on PATH, and {python} has no nvidia-pytriton; run "
                "in NVIDIA's Triton container, give --server, or pip install --no-deps {WHEEL_VERSION} 'numpy<2'"
            )
        return cls(binary, None, environment)


def numpy_problem(python: Path) -> str | None:
    """Return what keeps the wheel's python backend from running models with `python`, None where nothing does.

    With NumPy 2 its model processes die when they start, and the server waits for them.
    """
    if _site_packages(python) is None:
        return None
    completed = subprocess.run([str(python), "-c", _PRINT_NUMPY], capture_output=True, text=True, check=False)
    version = completed.stdout.strip()
    if completed.returncode == 0 and version.split(".")[0] in ("0", "1"):
        return None
    return (
        f"{python} has numpy {version or 'not at all'}, and the server of nvidia-pytriton takes numpy below 2: make an "
        f"environment of its own with pip install --no-deps {WHEEL_VERSION} 'numpy<2', or serve from NVIDIA's container"
    )


def _site_packages(python: Path) -> Path | None:
    """Return the folder that holds the wheel's server, in this interpreter's or `python`'s environment."""
    if python.resolve() == Path(sys.executable).resolve() and python.parent == Path(sys.executable).parent:
        spec = importlib.util.find_spec("pytriton")
        places = list(spec.submodule_search_locations or []) if spec else []
    else:
        program = "import importlib.util as u; s = u.find_spec('pytriton'); print(s.submodule_search_locations[0])"
        completed = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False)
        places = completed.stdout.split() if completed.returncode == 0 else []
    folders = [Path(place).parent for place in places]
    return next((folder for folder in folders if (folder / "pytriton/tritonserver/bin/tritonserver").is_file()), None)


def _from_wheel(site_packages: Path, python: Path, work_dir: Path, environment: dict[str, str]) -> ServerFiles:
    """Lay out the wheel's python backend with the stub for `python`'s version.

    The stub finds its libraries by a path relative to the wheel, so a copied one needs LD_LIBRARY_PATH; `python`'s own
    libpython must come before another of the same version.
    """
    completed = subprocess.run([str(python), "-c", _PRINT_VERSION], capture_output=True, text=True, check=True)
    version, library_dir = completed.stdout.split("\n")[:2]
    if problem := numpy_problem(python):
        raise BackendUnavailableError(problem)
    server = site_packages / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise BackendUnavailableError(
            f"nvidia-pytriton has no process for Python {version} ({python}); use one of "
            f"{', '.join(sorted(path.name for path in stub.parent.parent.iterdir()))}"
        )
    backend = work_dir / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    for source in (
        server / "backends" / "python" / "libtriton_python.so",
        server / "backends" / "python" / "triton_python_backend_utils.py",
        stub,
    ):
        shutil.copy(source, backend)
    libraries = [library_dir, str(site_packages / "nvidia_pytriton.libs"), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    return ServerFiles(server / "bin" / "tritonserver", backend.parent, environment)
