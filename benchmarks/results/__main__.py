"""The results page in one command: measures what is missing, then writes JSON, tables and pictures.

python -m benchmarks.results                # measure (a run that was cut off goes on), then write the page
python -m benchmarks.results --page_only    # write the page and its pictures from the JSON there is
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks.results.measure import measure, text
from benchmarks.results.runs import ROOT
from chunkkv.files import write_whole

JSON_FILE = ROOT / "docs" / "benchmarks" / "results.json"


def _machine() -> str:
    """Return how many processors there are, and of what kind where Linux says it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} processors ({names[0] if names else platform.machine()})"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "results", help="engine and records so far")
    parser.add_argument("--device", default=_machine(), help="what the page says about the machine")
    parser.add_argument("--page_only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.page_only:
        write_whole(JSON_FILE, text(measure(arguments.work_dir, arguments.device)))
    measured = json.loads(JSON_FILE.read_text(encoding="utf-8"))
    from benchmarks.results.page import write_page

    for path in write_page(measured):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
