"""Sizes of the emulated device: how many multiprocessors the kernels divide their work among."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from chunkkv.native import NativeLibrary

SMALL, LARGE = 2, 132  # what the emulator has by itself, so that a block has several tiles; what an H200 has
# For a test or a module: everything runs on both.
on_both_devices = (
    pytest.mark.usefixtures("multiprocessors"),
    pytest.mark.parametrize("multiprocessors", (SMALL, LARGE), indirect=True),
)


def on_every_device(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on both, without an argument for it."""
    for mark in on_both_devices:
        test = mark(test)
    return test


@contextmanager
def device_of(library: NativeLibrary, multiprocessors: int) -> Iterator[None]:
    """Size the launches of the emulated library for a device of this size."""
    set_size = ctypes.CDLL(str(library.path)).chunkkv_emulator_multiprocessors
    set_size(multiprocessors)
    try:
        yield
    finally:
        set_size(SMALL)
