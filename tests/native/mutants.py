"""How a bug is planted: what is replaced, which check of the probe meets it, and in which mode it shows.

A bug is a text that occurs once in the source, so one that no longer fits fails as well. Every bug runs in the mode
that finds it; races that give right results in every order are ThreadSanitizer's to find. Only the sources that the
check runs are compiled with the bug.
"""

from __future__ import annotations

from dataclasses import dataclass

from native.build import Mutation
from native.devices import LARGE, SMALL

TILES, KEYS, FETCHER, SCHEDULE, REDUCE, SCORE, PASSES = (
    "kernels/score_tiles.cuh",
    "kernels/score_keys.cuh",
    "kernels/score_fetch.cuh",
    "kernels/score_schedule.cuh",
    "kernels/score_reduce.cuh",
    "kernels/score.cu",
    "kernels/score_pass.cuh",
)
SELECT, COMPACT, SCAN, LAYOUT, BUDGET, DEVICE = (
    "kernels/select.cu",
    "kernels/compact.cu",
    "kernels/scan.cuh",
    "include/chunkkv/layout.h",
    "include/chunkkv/budget.h",
    "kernels/dev.h",
)
PREPARE, BOUNDARIES = "kernels/prepare.cu", "kernels/boundaries.cu"
RACE = 66

# The sources behind every check; a bug may be in a header that they share.
_SCORE = ("score", "score_half")
UNITS = {
    **dict.fromkeys(("score", "bands", "spread", "quantized"), _SCORE),
    "choices": (*_SCORE, "compact", "api"),
    "packed": (*_SCORE, "boundaries", "select", "compact"),
    **dict.fromkeys(("select", "select_special", "select_cut", "garbage_packed"), ("select",)),
    **dict.fromkeys(("compact", "compact_large", "compact_layers", "whole", "garbage_compact"), ("compact",)),
    "boundaries": ("boundaries",),
    **dict.fromkeys(("prepare", "garbage_prepare"), ("prepare",)),
}

# Most bugs lie in score, whose kernels for one type and head size show them; the others need not be compiled.
NO_PASSES = """template <>
void ScorePasses<{0}>::divide(ScoreArgs&) {{}}
template <>
LaunchStatus ScorePasses<{0}>::launchPass(const ScoreArgs&, Pass, void*, After) {{
    return 1;
}}"""
PRUNED = (
    *(
        Mutation(
            PASSES, f"        case {size}:\n            return withKey(std::integral_constant<int, {size}>());\n", ""
        )
        for size in (80, 96, 128)
    ),
    Mutation(PASSES, "std::integral_constant<int, 256>()", "std::integral_constant<int, 64>()"),
    *(
        Mutation(f"kernels/score_{name}.cu", f"template struct ScorePasses<{query}>;", NO_PASSES.format(query))
        for name, query in (("float", "float"), ("bfloat16", "__nv_bfloat16"))
    ),
)


@dataclass(frozen=True)
class Bug:
    """What is planted, the check that meets it, and the mode that shows it: a race is only seen by TSan."""

    name: str
    check: str
    file: str
    old: str
    new: str
    order: str = "forward"
    copies: str = "late"
    flavour: str = "quick"
    says: str = ""
    only_on: int = 0  # the device that shows it, where not every one does

    @property
    def mutation(self) -> Mutation:
        return Mutation(self.file, self.old, self.new)

    @property
    def multiprocessors(self) -> tuple[int, ...]:
        """The devices on each of which it must be found: both where work is divided by their size.

        A sanitizer takes so long that one must do.
        """
        if self.only_on:
            return (self.only_on,)
        divides = self.flavour == "quick" and not {"score", "compact"}.isdisjoint(self.units)
        return (SMALL, LARGE) if divides else (SMALL,)

    @property
    def units(self) -> tuple[str, ...]:
        """The sources that are compiled with the bug."""
        return UNITS[self.check]
