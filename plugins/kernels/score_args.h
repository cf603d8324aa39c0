// What the score kernels share: how the work is divided, and where the intermediate arrays lie in the workspace.
#pragma once

#include "chunkkv/layout.h"
#include "dev.h"

namespace chunkkv {

constexpr int kTileTokens = 64;
constexpr int kBandRows = 128;  // query rows that one block multiplies with a tile of keys

/// 16-row fragments that a warp holds: Q of half types and the sums of float32 must fit its registers.
constexpr int rowTilesPerWarp(int query_bytes, int head_dim) { return query_bytes > 2 || head_dim > 128 ? 1 : 2; }

/// One pass over K writes partial sums per chunk (kPartials). The general form reads K twice: the softmax
/// denominators first (kStatistics), then the scores of single tokens (kColumns), which fit every setting.
enum class Pass { kPartials, kStatistics, kColumns };

/// Maximum of a set of logits in log2 units and the sum of 2^(logit - maximum).
struct alignas(8) Statistic {
    float maximum;
    float sum;
};

/// Sizes in [brackets]; b counts the rows of this wave, R = Hq/Hkv * w query rows per KV head.
struct ScoreArgs {
    ScoreParams params;
    Statistic* tile_stats;  // [b, Hkv, tiles, R]
    Statistic* row_stats;   // [b, Hkv, R] of all tiles; `sum` holds its inverse
    float* partials;        // [b, Hkv, tiles, R, slot_pitch] sums of 2^(logit - maximum of the tile) per chunk
    float* slot_sums;       // [b, tiles, slot_pitch] weighted and summed over heads and rows
    float* columns;         // [b, Hkv, row_groups, S] scores per token, summed over 16 or 32 query rows
    float* raw_scores;      // [b, S] a[t] before pooling
    float* smooth_scores;   // [b, S] after pooling; the same memory where pooling is 1
    int32_t first_row;      // of the batch, where this wave begins
    int32_t query_rows;     // R
    int32_t bands;          // blocks that share the query rows of a KV head
    int32_t row_groups;     // of the query rows that one warp holds
    int32_t tiles;          // of S
    int32_t splits;         // blocks that share the tiles of a KV head
    int32_t slots;          // chunks that a tile can touch
    int32_t slot_pitch;     // slots, rounded up to even
};

/// Whether the scores of this row are not needed.
__device__ inline bool skipsRow(const ScoreArgs& args, int32_t row, int32_t length) {
    if (length < args.params.settings.window) return true;
    return args.params.token_scores == nullptr &&
           rowKept(args.params.rows, args.params.settings, row, length) == length;
}

/// The first chunk that tokens of a tile contribute to; the tile's slot 0 (fixed chunks).
__device__ inline int32_t firstChunkOf(const Settings& settings, int32_t tile) {
    const int32_t reach = tile * kTileTokens - settings.pooling / 2 - settings.sinks;
    return reach > 0 ? reach / settings.chunk_size : 0;
}

}  // namespace chunkkv
