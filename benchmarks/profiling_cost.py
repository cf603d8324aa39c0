"""What a range costs: without a tool, with the recorder, and in C++ without a tool.

Prints the result as one JSON line. --nvtx_include names the CUDA toolkit's include folder, for the C++ number (g++).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chunkkv import profiling

ROOT = Path(__file__).resolve().parent.parent
LOOP = """
#include <chrono>
#include <cstdio>
#include "nvtx.h"
int main() {
    constexpr int kRounds = 10000000;
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < kRounds; ++i) const chunkkv::StageRange range("score", i);
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - began;
    std::printf("%.2f", spent.count() / kRounds);
}
"""


def one_range() -> None:
    """Open and close a range as the session does in every decode step."""
    with profiling.range("decode", request_id=7, kept_tokens=399):
        pass


def nothing() -> None:
    """What calling a function costs by itself."""


def cost(function: Callable[[], None], number: int) -> float:
    """Return nanoseconds per call, the best of five, less those of an empty call."""
    spent, empty = (min(timeit.repeat(call, number=number, repeat=5)) for call in (function, nothing))
    return (spent - empty) / number * 1e9


def native_cost(include: Path) -> float:
    """Return nanoseconds per C++ range without a tool."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "loop.cc"), Path(folder, "loop")
        source.write_text(LOOP, encoding="utf-8")
        folders = [f"-I{ROOT / 'plugins'}", f"-I{ROOT / 'plugins' / 'include'}", f"-I{include}"]
        subprocess.run(["g++", "-std=c++17", "-O2", *folders, str(source), "-o", str(program), "-ldl"], check=True)
        return float(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvtx_include", type=Path, metavar="DIR", help="such as /usr/local/cuda/include")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    result["without_tool_ns"] = round(cost(one_range, 200_000))
    with profiling.recording() as recorder:
        result["recorder_ns"] = round(cost(one_range, 20_000))
        assert recorder.ranges
    if arguments.nvtx_include is not None:
        result["native_without_tool_ns"] = native_cost(arguments.nvtx_include)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
