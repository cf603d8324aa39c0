"""Planted bugs: each must make the probe fail, or the tests above prove nothing.

A bug is a text that occurs once in the source, so one that no longer fits fails as well. Every bug runs in the mode
that finds it; races that give right results in every order are ThreadSanitizer's to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from native import probe
from native.build import ROOT, BuildError, Mutation, emulated_library

TILES, REDUCE, SCORE = "kernels/score_tiles.cuh", "kernels/score_reduce.cuh", "kernels/score.cu"
SELECT, COMPACT, SCAN, LAYOUT = (
    "kernels/select.cu",
    "kernels/compact.cu",
    "kernels/scan.cuh",
    "include/chunkkv/layout.h",
)
PREPARE = "kernels/prepare.cu"
RACE = 66

# Most bugs lie in score, whose kernels for one type and head size show them; the others need not be compiled.
PRUNED = (
    *(
        Mutation(
            SCORE, f"        case {size}:\n            return launchTiles<T, {size}, kPass>(args, rows, stream);\n", ""
        )
        for size in (80, 96, 128)
    ),
    Mutation(SCORE, "launchTiles<T, 256, kPass>(args, rows, stream)", "0"),
    Mutation(SCORE, "return launchHeadDim<float, kPass>(args, rows, stream);", "return 1;"),
    Mutation(SCORE, "return launchHeadDim<__nv_bfloat16, kPass>(args, rows, stream);", "return 1;"),
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
    flavour: str = "plain"
    says: str = ""

    @property
    def mutations(self) -> tuple[Mutation, ...]:
        return (*PRUNED, Mutation(self.file, self.old, self.new))


BOTH_READ = "this tile has arrived, and all threads have read the one that the next fetch overwrites"
ARRIVED = f"            __syncthreads();  // {BOTH_READ}\n"
FETCH = "            fetch(number + Shape::kStages - 1);\n"
AFTER_PARTS = "    __syncthreads();\n    if (lane != 0 || {}"

BUGS = (
    # A dropped barrier, one by one.
    Bug("score: tile used before it is there", "score", TILES, ARRIVED, ""),
    Bug("score: stage overwritten too early", "score", TILES, ARRIVED + FETCH, FETCH + ARRIVED, "greedy", "early"),
    Bug("row statistics: no barrier", "score", REDUCE, AFTER_PARTS.format("number"), "    if (lane != 0 || number"),
    Bug("slot sums: no barrier", "score", REDUCE, AFTER_PARTS.format("slot"), "    if (lane != 0 || slot"),
    Bug(
        "select: bins not yet cleared",
        "select",
        SELECT,
        "        __syncthreads();\n        for (int32_t chunk",
        "        for (int32_t chunk",
    ),
    Bug(
        "select: cleared while still read",
        "select",
        SELECT,
        "        __syncthreads();  // `bins` and `found` are read before the next pass clears them\n",
        "",
        "greedy",
    ),
    Bug("compact: stores before loads", "compact", COMPACT, "        __syncthreads();\n", ""),
    Bug(
        "scan: totals overwritten while read",
        "select",
        SCAN,
        "    __syncthreads();  // all threads have read the totals of the previous scan\n",
        "",
        flavour="tsan",
    ),
    # Off by one.
    Bug("score: waits for one group less", "score", TILES, "Wait<Shape::kStages - 2>", "Wait<Shape::kStages - 1>"),
    Bug("score: last tile left out", "score", TILES, "(seen + kTileTokens - 1) / kTileTokens", "seen / kTileTokens"),
    Bug("score: window sees one token too many", "score", TILES, "window + position + 1;", "window + position + 2;"),
    Bug("score: taps end one token early", "score", TILES, "(token - reach, first) + 1.0f", "(token - reach, first)"),
    Bug("score: window counted in a chunk", "score", TILES, "token >= ranked_end) p", "token > ranked_end) p"),
    Bug(
        "select: one token too few", "select", SELECT, "clampTo(cut.to_give - given", "clampTo(cut.to_give - 1 - given"
    ),
    # Wrong addresses.
    Bug("score: wrong page", "score", LAYOUT, "block(token >> block_shift)", "block((token + 1) >> block_shift)"),
    Bug("compact: wrong page", "compact", LAYOUT, "block(token >> block_shift)", "block((token + 1) >> block_shift)"),
    Bug("wrong place in the page", "compact", LAYOUT, "((1 << block_shift) - 1))", "((1 << block_shift) - 2))"),
    Bug("keys read from the pages of values", "score", LAYOUT, "row) * 2 + kv) *", "row) * 2 + 1 - kv) *"),
    Bug("page trusted", "garbage", LAYOUT, "(offset >= 0 && offset < extent ? offset : 0)", "offset", flavour="asan"),
    Bug(
        "page number trusted",
        "garbage",
        LAYOUT,
        "offsets[clampTo(number, 0, max_blocks - 1)]",
        "offsets[number]",
        flavour="asan",
    ),
    Bug(
        "too little shared memory",
        "score",
        SCORE,
        "size_t{Shape::kStages} * Shape::kStageBytes",
        "size_t{Shape::kStages} * Shape::kStageBytes - 32",
        flavour="asan",
    ),
    # Packed rows.
    Bug("packed: rows overlap", "packed", LAYOUT, "{first, static_cast", "{first > 0 ? first - 1 : 0, static_cast"),
    Bug(
        "packed: chunk starts of two rows share an entry",
        "packed",
        LAYOUT,
        "return chunks.first + row;",
        "return chunks.first + 0 * row;",
    ),
    Bug(
        "packed: a row writes into the next",
        "packed",
        LAYOUT,
        "pitch < length ? pitch : length;",
        "pitch < length ? pitch : length + 1;",
    ),
    Bug(
        "packed: row starts trusted",
        "garbage",
        LAYOUT,
        "clampTo(rows.row_starts[row], 0, rows.num_tokens)",
        "rows.row_starts[row]",
        flavour="asan",
    ),
    Bug(
        "packed: end of the array trusted",
        "garbage",
        LAYOUT,
        "clampTo(rows.num_tokens - first, 0, most)",
        "most",
        flavour="asan",
    ),
    Bug("compact: what is kept whole is moved", "whole", COMPACT, "if (in_place && kept == length) return;", ""),
    # prepare.
    Bug("prepare: rows before the tile forgotten", "prepare", PREPARE, "tokens_before += tile_tokens;", ""),
    Bug("prepare: wrong row", "prepare", PREPARE, "row_starts[middle] <= token", "row_starts[middle] < token"),
    Bug("prepare: attention sees what was dropped", "prepare", PREPARE, "- (length - kept)", "- 0 * (length - kept)"),
    Bug("prepare: sum trusted", "garbage", PREPARE, "clampTo(start, 0, params.num_tokens)", "start"),
    # What only the emulator or ThreadSanitizer can see.
    Bug("blocks do the same tiles", "compact", COMPACT, "+= args.splits * tile", "+= tile", flavour="tsan"),
    Bug("tiles split in place", "compact", COMPACT, "args.splits = in_place ? 1 :", "args.splits =", flavour="tsan"),
    Bug(
        "a shuffle that half the warp takes",
        "select",
        SCAN,
        "        const ScanWord lower = __shfl_up_sync(kFullWarp, inclusive, distance);\n"
        "        if (lane >= distance) inclusive = combine(lower, inclusive);",
        "        if (lane >= distance)\n"
        "            inclusive = combine(__shfl_up_sync(kFullWarp, inclusive, distance), inclusive);",
        says="different collectives",
    ),
    Bug(
        "a barrier that half the block takes",
        "select",
        SELECT,
        "        __syncthreads();\n        cut.key |=",
        "        if (threadIdx.x < 512) __syncthreads();\n        cut.key |=",
        says="different barriers",
    ),
    Bug("shared memory read unwritten", "select", SELECT, "bin += kThreads) bins[bin] = 0;", "bin += kThreads) {}"),
)


@pytest.mark.deep
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    library = emulated_library(bug.flavour, bug.mutations)
    preload = "" if bug.flavour == "plain" else f"lib{bug.flavour}.so"
    outcome = probe.run(library, bug.check, order=bug.order, copies=bug.copies, preload=preload)
    assert outcome.status != 0, "the bug was not noticed"
    if bug.flavour == "tsan":
        assert outcome.status == RACE and "data race" in outcome.text
    elif bug.flavour == "asan":
        assert "AddressSanitizer" in outcome.text
    else:
        assert outcome.status == 1, outcome.text
    assert bug.says in outcome.text


@pytest.mark.deep
@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
def test_without_a_bug_nothing_is_found(flavour: str) -> None:
    """The mutants leave out most of score; what is left must be right, or every bug would seem to be found."""
    preload = "" if flavour == "plain" else f"lib{flavour}.so"
    checks = {bug.check for bug in BUGS if bug.flavour == flavour}
    outcome = probe.run(emulated_library(flavour, PRUNED), *sorted(checks), preload=preload)
    assert outcome.status == 0, outcome.text


def test_every_planted_bug_fits_the_sources() -> None:
    """Without compiling anything: whoever changes a line that a bug replaces learns it here."""
    plugins = ROOT / "plugins"
    for mutation in {mutation for bug in BUGS for mutation in bug.mutations}:
        assert (plugins / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation


def test_a_bug_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BuildError, match="holds 0 times"):
        emulated_library("plain", (Mutation(SCORE, "no such text", ""),))
