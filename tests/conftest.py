"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from chunkkv.executors.onnxruntime import graphs

LONGEST = "test_native_wheel.py"  # one fixture of minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first: at the end it would run alone while the other worker has nothing left to do."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(autouse=True, scope="session")
def one_thread_beside_others() -> Iterator[None]:
    """Give a graph one thread where a test asks for no number and other workers need the other cores.

    ONNX Runtime's default is a thread for each core, and threads of two processes on one core wait for each other.
    """
    options = graphs.session_options

    def with_one_thread(threads: int, repacks: bool = True) -> Any:
        return options(threads or 1, repacks)

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr(graphs, "session_options", with_one_thread)
        yield
