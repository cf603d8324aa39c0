"""Fixtures of the native tests. They run on the library that CHUNKKV_LIB names, else on the emulated one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chunkkv.native import NativeLibrary
from native.build import BuildError, compiler, emulated_library
from native.devices import SMALL, device_of
from native.memory import Memory


@pytest.fixture(scope="session", autouse=True)
def needs_a_compiler() -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    return NativeLibrary(os.environ.get("CHUNKKV_LIB") or emulated_library())


@pytest.fixture
def memory(library: NativeLibrary) -> Iterator[Memory]:
    """Memory whose guard bytes are checked when the test ends."""
    memory = Memory(library.device)
    yield memory
    memory.release()


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest, library: NativeLibrary) -> Iterator[int]:
    """The size of the device for this test, by which the kernels divide their work; a GPU keeps its own."""
    count: int = request.param
    if library.device == "emulated":
        with device_of(library, count):
            yield count
    elif count == SMALL:
        yield count
    else:
        pytest.skip("a GPU has the multiprocessors that it has")
