"""Where the compiled libraries of this project lie, and how to get them: libchunkkv and the plugins for TensorRT."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parents[1]  # of an editable install; elsewhere some folder of the Python installation
_IS_CHECKOUT = (_SOURCES / "plugins" / "build.py").is_file()

# A wheel with native code fills the first one, make plugins and CMake the second one.
LIBRARY_FOLDERS = (_PACKAGE / "lib", *((_SOURCES / "build" / "native",) if _IS_CHECKOUT else ()))
HOW_TO_GET = (
    "run make plugins" if _IS_CHECKOUT else "install the wheel with native code, which make wheel writes in the sources"
)
