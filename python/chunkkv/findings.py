"""The result of a check: ok, warning or would break, what was found, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, BREAKS = "ok", "warning", "would break"


@dataclass(frozen=True)
class Finding:
    """One check; `change` is empty where nothing needs to be done."""

    check: str
    state: str
    found: str
    change: str = ""


def ok(check: str, found: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, OK, found)


def warning(check: str, found: str, change: str) -> Finding:
    """Return a finding of something that works, but probably not as intended."""
    return Finding(check, WARNING, found, change)


def breaks(check: str, found: str, change: str) -> Finding:
    """Return a finding of something that would fail, or give wrong answers."""
    return Finding(check, BREAKS, found, change)
