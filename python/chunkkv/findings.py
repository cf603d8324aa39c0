"""The result of one check of an engine, a machine or a Triton repository."""

from __future__ import annotations

from dataclasses import dataclass

OK, ABSENT, WARNING, BREAKS = "ok", "absent", "warning", "would break"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Parameters
    ----------
    check : str
        What was checked.
    state : str
        OK, ABSENT for something that is not there and may not be needed, WARNING for something that works but probably
        not as intended, BREAKS for something that would fail or give wrong answers.
    found : str
        What the check found.
    change : str, default ""
        What to change; empty where nothing needs to be done.
    """

    check: str
    state: str
    found: str
    change: str = ""

    @classmethod
    def ok(cls, check: str, found: str) -> Finding:
        """Return a finding that all is well."""
        return cls(check, OK, found)

    @classmethod
    def absent(cls, check: str, found: str, change: str) -> Finding:
        """Return a finding of something that is not there; `change` says how to get it."""
        return cls(check, ABSENT, found, change)

    @classmethod
    def warning(cls, check: str, found: str, change: str) -> Finding:
        """Return a finding of something that works, but probably not as intended."""
        return cls(check, WARNING, found, change)

    @classmethod
    def breaks(cls, check: str, found: str, change: str) -> Finding:
        """Return a finding of something that would fail, or give wrong answers."""
        return cls(check, BREAKS, found, change)
