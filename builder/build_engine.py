"""chunkkv-build from a checkout, installed or not."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "builder"), str(_ROOT / "python")]

from chunkkv_builder.build import main  # noqa: E402

if __name__ == "__main__":
    main()
