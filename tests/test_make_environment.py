"""The virtual environments that make sets up: which Pythons are taken, and that a failure leaves nothing in the way."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def python_of(folder: Path, version: str, has_venv: bool = True) -> Path:
    """Write a Python of another version: it runs the real one, with another sys.version_info."""
    path = folder / "python"
    changed = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0, 'final', 0)"
    missing = "" if has_venv else "; sys.modules['ensurepip'] = None"
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then exec {sys.executable} -c "{changed}{missing}\n$2"; fi\n'
        'if [ "$2" = venv ]; then mkdir -p "$3"; exit 0; fi\n'
    )
    path.chmod(0o755)
    return path


def make(folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={python}", ".venv/.created"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_make_takes_the_pythons_of_the_package(tmp_path: Path) -> None:
    stated = re.search(
        r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert stated is not None
    first, end = map(int, stated.groups())
    for minor in range(first - 1, end + 1):
        done = make(tmp_path, python_of(tmp_path, f"3.{minor}.1"))
        assert (done.returncode == 0) is (first <= minor < end), done.stderr
        if done.returncode:
            line = done.stderr.splitlines()[0]
            assert f"is 3.{minor}.1" in line and f"3.{first} to 3.{end - 1}" in line
        shutil.rmtree(tmp_path / ".venv", ignore_errors=True)


def test_make_recovers_after_a_wrong_python(tmp_path: Path) -> None:
    assert make(tmp_path, python_of(tmp_path, "3.9.1")).returncode != 0
    done = make(tmp_path, python_of(tmp_path, "3.12.1", has_venv=False))
    assert done.returncode != 0 and "python3-venv" in done.stderr
    assert make(tmp_path, python_of(tmp_path, "3.12.1")).returncode == 0
    assert (tmp_path / ".venv" / ".created").is_file()
