// How the tiles of a ragged batch are divided among the blocks of one wave: every block takes an equal stretch of the
// line that all tiles form, row after row, KV head after KV head, band after band. The line's length follows from the
// lengths in device memory, so every block computes its stretch itself; all warps of a block do so alike.
//
//   row 0, 2 KV heads x 3 tiles   row 1: kept whole   row 2, 2 KV heads x 5 tiles
//   h0 h0 h0 h1 h1 h1                                 h0 h0 h0 h0 h0 h1 h1 h1 h1 h1
//   └──block 0──┘└────block 1────────────────────────────┘└──block 2──┘└──block 3──┘
#pragma once

#include "score_args.h"

namespace chunkkv {

/// Tiles of one KV head and band of a row that follow each other, [first, last].
struct Run {
    RowWork work;
    int32_t row;  // of the wave
    int32_t kv_head;
    int32_t band;
    int32_t first;
    int32_t last;
    int32_t exists;  // 0: the stretch has ended
};

/// The runs of this block. Statistics walk them upwards and in whole segments. Columns walk them downwards: what the
/// first pass has read last is then still in the second-level cache. It lies in shared memory, where it costs no
/// registers: one warp begins it, and one thread walks it.
template <Pass kPass>
struct Schedule {
    int64_t begin, end;  // what is left of the stretch
    int64_t place;       // in the row
    RowWork work;
    int32_t row;

    /// Called by a whole warp; the state is that of its first lane.
    __device__ static void start(const ScoreArgs& args, Schedule* shared) {
        const int lane = threadIdx.x % 32;
        int64_t total = 0;
        for (int32_t row = lane; row < args.rows; row += 32) total += countOf(args, row);
        for (int distance = 1; distance < 32; distance *= 2) total += __shfl_xor_sync(kFullWarp, total, distance);
        Schedule own{};
        own.begin = total * blockIdx.x / gridDim.x;
        own.end = total * (static_cast<int64_t>(blockIdx.x) + 1) / gridDim.x;
        if (own.begin < own.end) own.locate(args, kPass == Pass::kColumns ? own.end - 1 : own.begin);
        if (lane == 0) *shared = own;
    }

    __device__ void next(const ScoreArgs& args, Run& run) {
        run.exists = 0;
        while (begin < end && run.exists == 0) {
            run.work = work;
            run.row = row;
            const auto pair = static_cast<int32_t>(place / work.tiles);
            const auto tile = static_cast<int32_t>(place - static_cast<int64_t>(pair) * work.tiles);
            run.kv_head = pair / work.bands;
            run.band = pair % work.bands;
            if constexpr (kPass == Pass::kColumns)
                below(args, run, tile);
            else
                above(args, run, tile);
        }
    }

  private:
    __device__ static int64_t countOf(const ScoreArgs& args, int32_t row) {
        return rowWork<kPass>(args, args.first_row + row).count(args.params.kv_heads);
    }

    /// Find the row of a place of the line: 32 rows at a time.
    __device__ void locate(const ScoreArgs& args, int64_t at) {
        const int lane = threadIdx.x % 32;
        int64_t before = 0;
        for (int32_t first = 0;; first += 32) {
            const int64_t own = first + lane < args.rows ? countOf(args, first + lane) : 0;
            int64_t inclusive = own;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int64_t lower = __shfl_up_sync(kFullWarp, inclusive, distance);
                if (lane >= distance) inclusive += lower;
            }
            const unsigned behind = __ballot_sync(kFullWarp, at < before + inclusive);
            if (behind != 0) {
                const int holder = __ffs(behind) - 1;
                row = first + holder;
                place = at - before - __shfl_sync(kFullWarp, inclusive - own, holder);
                break;
            }
            before += __shfl_sync(kFullWarp, inclusive, 31);
        }
        work = rowWork<kPass>(args, args.first_row + row);
    }

    /// Go to the next row with tiles; there is one, because the stretch has not ended.
    __device__ void enterRow(const ScoreArgs& args, int32_t step) {
        do {
            row += step;
            work = rowWork<kPass>(args, args.first_row + row);
        } while (work.count(args.params.kv_heads) == 0);
    }

    /// A segment belongs to the block that its first tile falls to, and that block takes all of it.
    __device__ void above(const ScoreArgs& args, Run& run, int32_t tile) {
        const int32_t tiles = work.tiles, segment = segmentTiles(args, tiles);
        const int64_t left = end - begin;
        const int32_t stop = tile + left < tiles ? static_cast<int32_t>(tile + left) : tiles;  // the first not taken
        run.first = ceilDivide(tile, segment) * segment;
        const int32_t whole = ceilDivide(stop, segment) * segment;
        run.last = (whole < tiles ? whole : tiles) - 1;
        run.exists = run.first < stop ? 1 : 0;
        begin += stop - tile;
        place += stop - tile;
        if (begin < end && place == work.count(args.params.kv_heads)) {
            enterRow(args, 1);
            place = 0;
        }
    }

    __device__ void below(const ScoreArgs& args, Run& run, int32_t tile) {
        const int64_t left = end - begin;
        run.last = tile;
        run.first = tile - static_cast<int32_t>(left - 1 < tile ? left - 1 : tile);
        run.exists = 1;
        const int32_t taken = run.last - run.first + 1;
        end -= taken;
        place -= taken;
        if (begin < end && place < 0) {
            enterRow(args, -1);
            place = work.count(args.params.kv_heads) - 1;
        }
    }
};

}  // namespace chunkkv
