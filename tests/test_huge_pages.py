"""Huge pages: which memory is moved to them, and that what a graph's weights lie in is."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from chunkkv.executors import huge_pages
from chunkkv.executors.huge_pages import HUGE_PAGE_BYTES, is_anonymous, on_huge_pages
from chunkkv.executors.mappings import mappings, own_mappings

SMAPS = """\
55d0c0000000-55d0c0400000 rw-p 00000000 00:00 0                          [heap]
Size:               4096 kB
Rss:                4000 kB
Pss:                4000 kB
7f0000000000-7f0000800000 rw-p 00000000 00:00 0 
Rss:                   8 kB
7f0001000000-7f0001100000 r--p 00000000 00:00 0 
Rss:                1024 kB
7f0002000000-7f0002100000 rw-p 00001000 fe:00 5341471                    /usr/lib/library.so
Rss:                1024 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
Rss:                 132 kB
VmFlags: rd wr mr mw me gd ac
"""  # noqa: W291 - the kernel ends lines without a name with a blank
HEAP, RESERVED = (0x55D0C0000000, 0x55D0C0400000), (0x7F0000000000, 0x7F0000800000)


def test_only_writable_memory_without_a_file_counts() -> None:
    found = [(mapping.place, mapping.resident) for mapping in mappings(SMAPS) if is_anonymous(mapping)]
    assert found == [(HEAP, 4000 << 10), (RESERVED, 8 << 10)]


def huge_bytes(start: int, size: int) -> int:
    """Return how many bytes of the mappings that meet an address range lie on huge pages."""
    total, meets = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            meets = low < start + size and high > start
        elif meets and first == "AnonHugePages:":
            total += int(line.split()[1]) << 10
    return total


def mapped(size: int) -> tuple[mmap.mmap, np.ndarray]:
    """Return new memory of the system, which no other block shares."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, np.frombuffer(memory, np.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these calls")
def test_filled_memory_is_moved_and_keeps_its_content() -> None:
    size = 8 * HUGE_PAGE_BYTES
    with on_huge_pages():
        memory, filled = mapped(size)
        filled[:] = np.arange(size, dtype=np.uint8)
    assert np.array_equal(filled, np.arange(size, dtype=np.uint8))
    if not huge_bytes(filled.ctypes.data, size):
        pytest.skip("this system gives no huge pages")
    assert huge_bytes(filled.ctypes.data, size) >= size - 2 * HUGE_PAGE_BYTES
    del filled, memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these calls")
def test_reserved_memory_takes_no_pages() -> None:
    size = 64 * HUGE_PAGE_BYTES
    before = sum(mapping.resident or 0 for mapping in filter(is_anonymous, own_mappings()))
    with on_huge_pages():
        memory, reserved = mapped(size)
        reserved[:: size // 4] = 1
    after = sum(mapping.resident or 0 for mapping in filter(is_anonymous, own_mappings()))
    assert after - before < size // 4
    del reserved, memory


def test_a_system_without_huge_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_move", lambda start, stop: pytest.fail("asked for huge pages"))
    for setting in ("always madvise [never]\n", None):
        place = tmp_path / "enabled"
        if setting is None:
            place.unlink()
        else:
            place.write_text(setting, encoding="ascii")
        monkeypatch.setattr(huge_pages, "_SETTING", place)
        with on_huge_pages():
            array = np.ones(4 * HUGE_PAGE_BYTES, np.uint8)
        assert array.all()
