"""The plugin tests again on plugins, host and kernels built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from native.build import emulated_library
from native.test_sanitizers import run_sanitized

pytestmark = pytest.mark.deep

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["test_plugins.py", "test_packed_plugins.py", "test_packed_plugin_errors.py"])
def test_no_access_outside_and_no_undefined_behaviour(file: str) -> None:
    done = run_sanitized(emulated_library("asan"), str(HERE / file), "-k", "not headers")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
