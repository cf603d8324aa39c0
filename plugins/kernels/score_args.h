// What the score kernels share: how the work is divided, and where the intermediate arrays lie in the workspace.
#pragma once

#include "chunkkv/layout.h"
#include "dev.h"

namespace chunkkv {

constexpr int kWarpTokens = 32;   // keys that a warp multiplies at a time
constexpr int kBandRows = 128;    // query rows that one block multiplies with a tile of keys, at most
constexpr int kWorkUnits = 1024;  // pieces that the statistics of one row are cut into

/// The first pass finds the softmax denominator of every query row, the second the scores of single tokens.
enum class Pass { kStatistics, kColumns };

/// Largest logit seen, in log2 units, and the sum of 2^(logit - maximum).
struct alignas(8) Statistic {
    float maximum;
    float sum;
};

/// Sizes in [brackets]; b counts the rows of this wave.
struct ScoreArgs {
    ScoreParams params;
    Statistic* tile_stats;  // [b, Hkv, parts, R]
    Statistic* row_stats;   // [b, Hkv, R] of all parts; `sum` holds its inverse
    float* columns;         // [b, Hkv, column_rows, token_pitch] scores of tokens, over a group of query rows each
    float* norms;           // [b, Hkv, token_pitch] lengths of the value vectors
    int32_t first_row;      // of the batch, where this wave begins
    int32_t rows;           // b
    int32_t query_rows;     // R: the most query rows of a KV head
    int32_t row_warps;      // warps of a block that share a tile's keys and differ in query rows
    int32_t token_groups;   // warps that share query rows and differ in keys: each takes one group of a tile, or all
    int32_t tile_tokens;    // keys of a tile
    int32_t block_rows;     // query rows of a block
    int32_t column_rows;    // groups of query rows
    int32_t parts;          // the most pieces of a KV head that have statistics of their own
    int32_t token_pitch;    // S, rounded up to whole tiles
    int32_t by_head;        // 1: a group is 8 query rows of one head, 0: what a warp holds
};

/// What the passes need to know of a row.
struct RowWork {
    int32_t length;      // L
    int32_t window;      // w
    int32_t ranked_end;  // L - W
    int32_t head_pitch;  // query rows of one head; from w on they are empty
    int32_t query_rows;
    int32_t bands;
    int32_t tiles;  // 0 where the row is not scored

    /// Tiles of all its KV heads and bands.
    __device__ int64_t count(int32_t kv_heads) const { return static_cast<int64_t>(kv_heads) * bands * tiles; }
};

__device__ inline int32_t ceilDivide(int32_t a, int32_t b) { return (a + b - 1) / b; }

/// Whether the scores of this row are not needed.
__device__ inline bool skipsRow(const ScoreParams& params, int32_t row, int32_t length) {
    if (length < params.settings.window) return true;
    return params.token_scores == nullptr && rowKept(params.rows, params.settings, row, length) == length;
}

/// Query rows of one head: w, or where groups may not mix heads the next multiple of 8.
CHUNKKV_HD int32_t headPitch(int32_t window, bool by_head) { return by_head ? (window + 7) / 8 * 8 : window; }

template <Pass kPass>
__device__ RowWork rowWork(const ScoreArgs& args, int32_t row) {
    const ScoreParams& params = args.params;
    RowWork work;
    work.length = rowLength(params.rows, row);
    work.window = rowWindow(params.rows, params.settings, row);
    work.ranked_end = work.length - params.settings.window;
    work.head_pitch = headPitch(work.window, args.by_head != 0);
    work.query_rows = params.heads / params.kv_heads * work.head_pitch;
    work.bands = ceilDivide(work.query_rows, args.block_rows);
    const int32_t seen = kPass == Pass::kColumns ? work.ranked_end : work.length;
    const bool skipped = skipsRow(params, row, work.length) || work.ranked_end <= 0;
    work.tiles = skipped ? 0 : ceilDivide(seen, args.tile_tokens);
    return work;
}

/// Tiles of a piece that has statistics of its own. It follows from the row alone, so that the grid, the batch and the
/// padding change no bit.
__device__ inline int32_t segmentTiles(const ScoreArgs& args, int32_t tiles) {
    return ceilDivide(tiles, args.parts / args.token_groups);
}

}  // namespace chunkkv
