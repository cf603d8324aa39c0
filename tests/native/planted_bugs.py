"""Planted bugs, each with the check of the probe that meets it and the mode that shows it.

A bug is a text that occurs once in the source, so one that no longer fits fails as well. Every bug runs in the mode
that finds it; races that give right results in every order are ThreadSanitizer's to find.
"""

from __future__ import annotations

from dataclasses import dataclass

from native.build import Mutation
from native.devices import LARGE, SMALL

TILES, KEYS, SCHEDULE, REDUCE, SCORE, PASSES = (
    "kernels/score_tiles.cuh",
    "kernels/score_keys.cuh",
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
PREPARE = "kernels/prepare.cu"
RACE = 66

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
    flavour: str = "plain"
    says: str = ""
    multiprocessors: int = SMALL

    @property
    def mutations(self) -> tuple[Mutation, ...]:
        return (*PRUNED, Mutation(self.file, self.old, self.new))


BOTH_READ = "this tile has arrived, and all threads have read the one that the next copy overwrites"
ARRIVED = f"            __syncthreads();  // {BOTH_READ}\n"
FETCH = "            fetch(fetcher, tile + kAhead * kStep, left - kAhead, number == 0 ? kAhead : number - 1);\n"

BUGS = (
    # A dropped barrier, one by one.
    Bug("score: tile used before it is there", "score", TILES, ARRIVED, ""),
    Bug("score: stage overwritten too early", "score", TILES, ARRIVED + FETCH, FETCH + ARRIVED, "greedy", "early"),
    Bug(
        "score: run overwritten while read",
        "score",
        TILES,
        "        __syncthreads();  // the run and its tiles have been read\n",
        "",
        "greedy",
    ),
    Bug(
        "score: run read before it is there",
        "score",
        TILES,
        "        __syncthreads();  // the run is there\n",
        "",
        flavour="tsan",
    ),
    Bug(
        "row statistics: no barrier",
        "score",
        REDUCE,
        "        __syncthreads();\n        if (lane >= half)",
        "        if (lane >= half)",
    ),
    Bug(
        "finish: raw scores read too early",
        "score",
        REDUCE,
        "    __syncthreads();\n    for (int32_t i = thread; i < width;",
        "    for (int32_t i = thread; i < width;",
    ),
    Bug(
        "finish: chunks summed too early",
        "score",
        REDUCE,
        "    __syncthreads();\n    if (end == 0) return;",
        "    if (end == 0) return;",
    ),
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
        "boundaries",
        SCAN,
        "    __syncthreads();  // all threads have read the totals of the previous scan\n",
        "",
        flavour="tsan",
    ),
    # Off by one.
    Bug("score: waits for one group less", "score", TILES, "cpAsyncWait<kAhead - 1>", "cpAsyncWait<kAhead>"),
    Bug(
        "score: last tile left out",
        "score",
        "kernels/score_args.h",
        "ceilDivide(seen, kWarpTokens * args.token_groups)",
        "seen / (kWarpTokens * args.token_groups)",
    ),
    Bug(
        "score: window sees one token too many",
        "score",
        TILES,
        "run_.work.window + position + 1;",
        "run_.work.window + position + 2;",
    ),
    Bug(
        "score: segments of two blocks overlap",
        "spread",
        SCHEDULE,
        "run.first = ceilDivide(tile, segment) * segment;",
        "run.first = tile / segment * segment;",
        flavour="tsan",
    ),
    Bug(
        "score: a stretch that begins inside a row is left out",
        "score",
        SCHEDULE,
        "run.exists = 1;",
        "run.exists = run.first == 0 ? 1 : 0;",
    ),
    Bug(
        "score: pieces of the last segment forgotten",
        "spread",
        REDUCE,
        "ceilDivide(work.tiles, segmentTiles(args, work.tiles)) * args.token_groups",
        "work.tiles / segmentTiles(args, work.tiles) * args.token_groups",
    ),
    Bug(
        "score: second half of the rows' tokens forgotten",
        "score",
        TILES,
        "stage(number) + place_.group * kWarpTokens",
        "stage(number) + 0 * place_.group * kWarpTokens",
    ),
    Bug(
        "score: base never raised",
        "spread",
        TILES,
        "if (__ballot_sync(kFullWarp, fits) != kFullWarp) return raise(logits, scale);",
        "if (base[0] == -INFINITY) return raise(logits, scale);",
    ),
    Bug(
        "score: heads mixed in a group",
        "choices",
        "kernels/score_args.h",
        "by_head ? (window + 7) / 8 * 8 : window;",
        "by_head ? window : window;",
    ),
    Bug(
        "score: window of the request ignored",
        "choices",
        BUDGET,
        "return rows.windows ?",
        "return rows.windows == rows.lengths ?",
    ),
    Bug(
        "score: pooling ends one token early",
        "score",
        REDUCE,
        "? i + 2 * reach : end - 1 - low;",
        "? i + 2 * reach - 1 : end - 1 - low;",
    ),
    Bug(
        "score: window counted in a chunk",
        "score",
        REDUCE,
        "finish.work.tiles > 0 ? finish.work.ranked_end : 0;",
        "finish.work.tiles > 0 ? finish.work.ranked_end + 1 : 0;",
    ),
    Bug("score: norms forgotten", "choices", REDUCE, "if (args.norms) own *=", "if (false) own *="),
    Bug(
        "8-bit keys: NaN read as a number",
        "quantized",
        DEVICE,
        "return scaled | nan_bits;",
        "return scaled | (nan_bits & 0u);",
    ),
    Bug(
        "8-bit keys: scale applied to others",
        "quantized",
        TILES,
        "Shape::kIsByte && params.key_scale",
        "params.key_scale",
    ),
    Bug(
        "classes: min_tokens of local heads forgotten",
        "choices",
        BUDGET,
        "(heads * kept - local * least) / reading;",
        "heads * kept / reading;",
    ),
    Bug(
        "compact: last slice as wide as the others",
        "compact_large",
        COMPACT,
        "left < args.slice_vectors ? left : args.slice_vectors;",
        "left < 0 ? left : args.slice_vectors;",
        multiprocessors=LARGE,
    ),
    Bug(
        "compact: outside the pool written to block 0",
        "compact_large",
        LAYOUT,
        "return offset >= 0 && offset < extent ? at(token) : nullptr;",
        "return offset >= 0 || offset < extent ? at(token) : nullptr;",
    ),
    Bug("compact: heads read another's indices", "choices", COMPACT, "args.choices > 1 ? head : 0;", "0;"),
    Bug(
        "select: one entry behind the list",
        "select_cut",
        SELECT,
        "slot + i < end_slot; ++i)",
        "slot + i <= end_slot; ++i)",
    ),
    Bug(
        "select: one token too few", "select", SELECT, "clampTo(cut.to_give - given", "clampTo(cut.to_give - 1 - given"
    ),
    # Wrong addresses.
    Bug(
        "score: wrong page",
        "score",
        KEYS,
        "(token < readable_ ? token : readable_ - 1) >> keys_.block_shift",
        "((token < readable_ ? token : readable_ - 1) + 1) >> keys_.block_shift",
    ),
    Bug("compact: wrong page", "compact", LAYOUT, "block(token >> block_shift)", "block((token + 1) >> block_shift)"),
    Bug("wrong place in the page", "compact", LAYOUT, "((1 << block_shift) - 1))", "((1 << block_shift) - 2))"),
    Bug("keys read from the pages of values", "score", LAYOUT, "row) * 2 + kv) *", "row) * 2 + 1 - kv) *"),
    Bug(
        "page trusted",
        "garbage",
        LAYOUT,
        "return offset >= 0 && offset < extent ? offset : 0;",
        "return offset;",
        flavour="asan",
    ),
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
        PASSES,
        "size_t{Shape::kStages} * args.token_groups * kWarpTokens * Shape::kPitch;",
        "size_t{Shape::kStages} * args.token_groups * kWarpTokens * Shape::kPitch - 32;",
        flavour="asan",
    ),
    # Packed rows.
    Bug(
        "packed: rows overlap",
        "packed",
        LAYOUT,
        "rows.num_tokens + first, static_cast",
        "rows.num_tokens + (first > 0 ? first - 1 : 0), static_cast",
    ),
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
    Bug("compact: what is kept whole is moved", "whole", COMPACT, "if (kInPlace && kept == length) return;", ""),
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
