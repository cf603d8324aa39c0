// score, the part that does not read K: adds up the sums of tiles, heads and query rows, always in the same order.
// Memory-bound; all of it is small compared with K.
#pragma once

#include "chunks.cuh"
#include "score_args.h"

namespace chunkkv {

constexpr int kStatRows = 16;
constexpr int kStatLanes = 32;
constexpr int kReduceThreads = 256;

__device__ inline Statistic merged(const Statistic& a, const Statistic& b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    if (maximum == -INFINITY) return {maximum, a.sum + b.sum};
    return {maximum, a.sum * exp2Fast(a.maximum - maximum) + b.sum * exp2Fast(b.maximum - maximum)};
}

/// row_stats: the softmax denominator of every query row, from its tiles. grid: x = (KV head, 16 query rows), y = row.
__global__ void __launch_bounds__(kStatRows* kStatLanes) rowStatsKernel(const __grid_constant__ ScoreArgs args) {
    SHARED(Statistic, parts, kStatRows * kStatLanes);
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(args.params.rows, row);
    if (skipsRow(args, row, length)) return;
    const int32_t groups = (args.query_rows + kStatRows - 1) / kStatRows;
    const int32_t kv_head = blockIdx.x / groups;
    const int32_t lane = threadIdx.x / kStatRows;
    const int32_t number = blockIdx.x % groups * kStatRows + threadIdx.x % kStatRows;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * args.params.kv_heads + kv_head;
    const int32_t tiles = (length + kTileTokens - 1) / kTileTokens;

    Statistic own{-INFINITY, 0.0f};
    if (number < args.query_rows) {
        const Statistic* of_tile = args.tile_stats + head * args.tiles * args.query_rows + number;
#pragma unroll 4
        for (int32_t tile = lane; tile < tiles; tile += kStatLanes)
            own = merged(own, of_tile[static_cast<int64_t>(tile) * args.query_rows]);
    }
    parts[threadIdx.x].maximum = own.maximum;
    parts[threadIdx.x].sum = own.sum;
    __syncthreads();
    if (lane != 0 || number >= args.query_rows) return;
    for (int other = 1; other < kStatLanes; ++other) own = merged(own, parts[other * kStatRows + threadIdx.x]);
    Statistic& out = args.row_stats[head * args.query_rows + number];
    out.maximum = own.maximum;
    out.sum = 1.0f / own.sum;  // the row sees its own token, so the sum is not 0
}

/// slot_sums: the partials of a tile, weighted by their rows' denominators. grid: x = tile, y = row.
__global__ void __launch_bounds__(kReduceThreads) slotSumsKernel(const __grid_constant__ ScoreArgs args) {
    SHARED(float, parts, kReduceThreads);
    const int32_t row = args.first_row + blockIdx.y, tile = blockIdx.x;
    const int32_t length = rowLength(args.params.rows, row);
    if (skipsRow(args, row, length) || tile * kTileTokens >= length - args.params.settings.window) return;
    const int32_t lanes = kReduceThreads / args.slot_pitch;
    const int32_t slot = threadIdx.x % args.slot_pitch, lane = threadIdx.x / args.slot_pitch;
    float sum = 0.0f;
    if (slot < args.slots && lane < lanes) {
        for (int32_t kv_head = 0; kv_head < args.params.kv_heads; ++kv_head) {
            const int64_t head = static_cast<int64_t>(blockIdx.y) * args.params.kv_heads + kv_head;
            const int64_t first = (head * args.tiles + tile) * args.query_rows;
            for (int32_t number = lane; number < args.query_rows; number += lanes) {
                const Statistic of_row = args.row_stats[head * args.query_rows + number];
                const float weight = exp2Fast(args.tile_stats[first + number].maximum - of_row.maximum) * of_row.sum;
                sum += weight * args.partials[(first + number) * args.slot_pitch + slot];
            }
        }
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (lane != 0 || slot >= args.slots) return;
    for (int other = 1; other < lanes; ++other) sum += parts[other * args.slot_pitch + slot];
    args.slot_sums[(static_cast<int64_t>(blockIdx.y) * args.tiles + tile) * args.slot_pitch + slot] = sum;
}

/// chunk_scores from slot_sums: a chunk and its neighbourhood lie in one tile or a few. grid: x = chunks, y = row.
__global__ void __launch_bounds__(kReduceThreads) slotMeansKernel(const __grid_constant__ ScoreArgs args) {
    const ScoreParams& params = args.params;
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(params.rows, row);
    if (skipsRow(args, row, length)) return;
    const RowPart part = rowPart(params.rows, row, length, params.max_chunks);
    const ChunkSpans spans = chunkSpans(params.settings, nullptr, nullptr, part, row, length);
    const int32_t chunk = blockIdx.x * kReduceThreads + threadIdx.x;
    if (chunk >= spans.count) return;
    const int32_t reach = params.settings.pooling / 2;
    const int32_t first = spans.start(chunk) - reach, last = spans.start(chunk) + spans.length(chunk) - 1 + reach;
    const int32_t first_tile = (first > 0 ? first : 0) / kTileTokens;
    const int32_t last_tile = (last < spans.end ? last : spans.end - 1) / kTileTokens;
    float sum = 0.0f;
    for (int32_t tile = first_tile; tile <= last_tile; ++tile) {
        const int64_t slots = (static_cast<int64_t>(blockIdx.y) * args.tiles + tile) * args.slot_pitch;
        sum += args.slot_sums[slots + chunk - firstChunkOf(params.settings, tile)];
    }
    const float weight = static_cast<float>(params.settings.window) * params.heads * params.settings.pooling;
    params.chunk_scores[part.first + chunk] = sum / weight / spans.length(chunk);
}

/// Write a[t] if the caller has passed token_scores.
__device__ inline void giveTokenScore(const ScoreParams& params, int32_t row, int32_t length, int32_t token,
                                      float score) {
    if (params.token_scores == nullptr) return;
    const RowPart part = rowPart(params.rows, row, length, params.rows.max_length);
    if (token < part.count) params.token_scores[part.first + token] = score;
}

/// raw_scores: a[t] before pooling, 0 where nothing is ranked. grid: x = tokens, y = row.
__global__ void __launch_bounds__(kReduceThreads) rawScoresKernel(const __grid_constant__ ScoreArgs args) {
    const ScoreParams& params = args.params;
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(params.rows, row);
    const int32_t token = blockIdx.x * kReduceThreads + threadIdx.x;
    if (token >= params.rows.max_length) return;
    float sum = 0.0f;
    if (token < length - params.settings.window && !skipsRow(args, row, length)) {
        const int64_t groups = static_cast<int64_t>(params.kv_heads) * args.row_groups;
        const float* column = args.columns + blockIdx.y * groups * params.rows.max_length + token;
        for (int32_t group = 0; group < groups; ++group)
            sum += column[static_cast<int64_t>(group) * params.rows.max_length];
        if (params.settings.score == CHUNKKV_SCORE_SOFTMAX)
            sum /= static_cast<float>(params.settings.window) * params.heads;
    }
    args.raw_scores[static_cast<int64_t>(blockIdx.y) * params.rows.max_length + token] = sum;
    if (params.settings.pooling == 1) giveTokenScore(params, row, length, token, sum);
}

/// smooth_scores: the average over the neighbourhood in [0, L-w), the divisor always `pooling`.
__global__ void __launch_bounds__(kReduceThreads) smoothKernel(const __grid_constant__ ScoreArgs args) {
    const ScoreParams& params = args.params;
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(params.rows, row);
    const int32_t token = blockIdx.x * kReduceThreads + threadIdx.x;
    if (token >= params.rows.max_length) return;
    const int32_t ranked_end = length - params.settings.window, reach = params.settings.pooling / 2;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * params.rows.max_length;
    float sum = 0.0f;
    if (token < ranked_end) {
        const int32_t low = token > reach ? token - reach : 0;
        const int32_t high = token + reach < ranked_end ? token + reach : ranked_end - 1;
        for (int32_t other = low; other <= high; ++other) sum += args.raw_scores[first + other];
    }
    const float score = sum / static_cast<float>(params.settings.pooling);
    args.smooth_scores[first + token] = score;
    giveTokenScore(params, row, length, token, score);
}

/// chunk_scores from smooth_scores, for any boundaries. grid: x = chunks, y = row.
__global__ void __launch_bounds__(kReduceThreads) tokenMeansKernel(const __grid_constant__ ScoreArgs args) {
    const ScoreParams& params = args.params;
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(params.rows, row);
    if (skipsRow(args, row, length)) return;
    const RowPart part = rowPart(params.rows, row, length, params.max_chunks);
    const ChunkSpans spans = chunkSpans(params.settings, params.chunk_starts, params.num_chunks, part, row, length);
    const int32_t chunk = blockIdx.x * kReduceThreads + threadIdx.x;
    if (chunk >= spans.count) return;
    const int32_t tokens = spans.length(chunk);
    const float* scores =
        args.smooth_scores + static_cast<int64_t>(blockIdx.y) * params.rows.max_length + spans.start(chunk);
    float sum = 0.0f;
    for (int32_t i = 0; i < tokens; ++i) sum += scores[i];
    params.chunk_scores[part.first + chunk] = tokens > 0 ? sum / tokens : 0.0f;
}

}  // namespace chunkkv
