"""What holds for all tests."""

from __future__ import annotations

import pytest

LONGEST = "test_native_wheel.py"  # one fixture of minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first: at the end it would run alone while the other worker has nothing left to do."""
    items.sort(key=lambda item: item.path.name != LONGEST)
