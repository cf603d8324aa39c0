"""Planted bugs: each must make the probe fail, or the tests prove nothing."""

from __future__ import annotations

import pytest

from native import probe
from native.build import ROOT, BuildError, Mutation, emulated_library, mutant_library
from native.devices import LARGE, SMALL
from native.mutants import PRUNED, RACE, SCORE, Bug
from native.planted_bugs import BUGS


@pytest.mark.deep
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    library = mutant_library(bug.flavour, PRUNED, bug.mutation, bug.units)
    preload = "" if bug.flavour == "quick" else f"lib{bug.flavour}.so"
    for size in bug.multiprocessors:
        how = {"order": bug.order, "copies": bug.copies, "preload": preload}
        outcome = probe.run(library, bug.check, multiprocessors=size, **how)
        assert outcome.status != 0, f"the bug was not noticed on {size} multiprocessors"
        if bug.flavour == "tsan":
            assert outcome.status == RACE and "data race" in outcome.text
        elif bug.flavour == "asan":
            assert "AddressSanitizer" in outcome.text
        else:
            assert outcome.status == 1, outcome.text
        assert bug.says in outcome.text


@pytest.mark.deep
@pytest.mark.parametrize("flavour", ["quick", "asan"])
def test_without_a_bug_nothing_is_found(flavour: str) -> None:
    """The mutants leave out most of score; what is left must be right, or every bug would seem to be found.

    test_races.py shows it of every check under ThreadSanitizer.
    """
    preload = "" if flavour == "quick" else f"lib{flavour}.so"
    checks = {bug.check for bug in BUGS if bug.flavour == flavour}
    for multiprocessors in (SMALL, LARGE):
        sizes = {"multiprocessors": multiprocessors}
        outcome = probe.run(emulated_library(flavour, PRUNED), *sorted(checks), preload=preload, **sizes)
        assert outcome.status == 0, outcome.text


def test_every_planted_bug_fits_the_sources() -> None:
    """Without compiling anything: whoever changes a line that a bug replaces learns it here."""
    plugins = ROOT / "plugins"
    for mutation in {*PRUNED, *(bug.mutation for bug in BUGS)}:
        assert (plugins / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation


def test_a_bug_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BuildError, match="holds 0 times"):
        emulated_library("plain", (Mutation(SCORE, "no such text", ""),))
