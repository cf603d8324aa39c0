"""chunkkv version: prints the versions of this program and of what it runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import chunkkv
from chunkkv.command_line import CommandParser

_PACKAGES = ("onnxruntime", "onnx", "numpy", "tokenizers")


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    program.add_command("version", "Print the versions of this program and of the packages it runs on.", run)


def run(args: argparse.Namespace) -> None:
    """Print one line per package."""
    print(f"chunkkv {chunkkv.__version__}")
    for name in _PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    print(f"python {platform.python_version()}")
