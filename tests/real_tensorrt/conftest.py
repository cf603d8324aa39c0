"""The TensorRT for RTX that is installed and our plugins for it; without it these tests are skipped by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkkv.errors import BackendUnavailableError
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import RTX, TensorRT, find_tensorrt
from chunkkv.gpu.tensorrt_plugins import PLUGINS, TENSORRT_LLM_PLUGINS, load_plugins, prepare_parser

from . import plugin_folder

HERE = Path(__file__).parent


def missing() -> str | None:
    """Return why nothing can be built here, None where it can."""
    try:
        find_tensorrt(RTX)
    except BackendUnavailableError as error:
        return f"needs {error}"
    if lacks := plugin_folder.missing_tools():
        return f"needs {lacks[0]}, with which the plugins are built"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs TensorRT for RTX where there is none; give the rest time to build plugins."""
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:  # the first of a process compiles the kernels, or waits for another process that does
        item.add_marker(pytest.mark.timeout(1200))
    if mine and (reason := missing()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    """Say what is tested."""
    return missing() or f"{find_tensorrt(RTX).title}; its plugins call {plugin_folder.kernels()}"


@pytest.fixture(scope="session")
def rtx() -> TensorRT:
    """The TensorRT for RTX that is installed."""
    return find_tensorrt(RTX)


@pytest.fixture(scope="session")
def library_folder() -> Path:
    """The folder of the plugin library for TensorRT for RTX."""
    return plugin_folder.plugin_folder()


@pytest.fixture(scope="session")
def found_plugins(library_folder: Path) -> Iterator[None]:
    """Builds of this process and of its children find the plugins."""
    before = os.environ.get("CHUNKKV_LIB")
    os.environ["CHUNKKV_LIB"] = str(library_folder / "libchunkkv.so")
    yield
    if before is None:
        del os.environ["CHUNKKV_LIB"]
    else:
        os.environ["CHUNKKV_LIB"] = before


@pytest.fixture(scope="session")
def plugins(rtx: TensorRT, found_plugins: None) -> None:
    """The plugins are registered, and the ONNX parser can import them."""
    errors = ErrorLog()
    logger = errors.logger(rtx.module)
    builder = start(rtx, rtx.module.Builder, logger, errors)
    prepare_parser(rtx)
    load_plugins(rtx, rtx.module.get_plugin_registry(), errors, (*PLUGINS, *TENSORRT_LLM_PLUGINS))
    del builder
