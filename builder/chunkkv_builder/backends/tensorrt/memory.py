"""How much memory this process has taken at most."""

from __future__ import annotations

import sys

if sys.platform == "win32":

    def peak_memory() -> int | None:
        """Return None: this system does not say."""
        return None

else:
    import resource

    def peak_memory() -> int | None:
        """Return the peak resident memory of this process in bytes, None where the system does not say."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
