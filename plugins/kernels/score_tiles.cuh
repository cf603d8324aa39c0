// score, the part that reads K: a block multiplies up to 128 query rows of one KV head with tiles of 64 keys.
//
//            64 tokens of K, staged in shared memory by cp.async while older tiles are computed
//           ┌────────────────────────────┐
//   warp 0  │ 32 rows (g heads x w)      │  per row and tile: maximum m and sum l of 2^(s-m), and per chunk the
//   warp 1  │ Q in registers             │  sum of 2^(s-m) over its tokens: P [rows, 64] x taps [64, slots], a
//   warp 2  │ S = Q K^T, tensor cores    │  second product. taps holds how often pooling counts a token in a
//   warp 3  │ P = 2^(S - m)              │  chunk, small whole numbers; 0 and 1 without pooling.
//           └────────────────────────────┘
//
// Tiles are independent of each other and nothing is added across blocks, so results do not depend on the grid. P is
// split into two float16 terms, which keeps 22 bits; the 2^15 in front of it keeps its small values from vanishing.
// Bytes behind a row's length are never read: the copies fill with zero there.
#pragma once

#include "score_args.h"

namespace chunkkv {

constexpr float kHeadroom = 15.0f;  // P reaches 2^15, float16 ends at 65504

template <class T, int kHeadDim>
struct TileShape {
    static constexpr int kRowTiles = rowTilesPerWarp(sizeof(T), kHeadDim);
    static constexpr int kWarps = kBandRows / (16 * kRowTiles);
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kBlocks = 256 / kThreads;  // per multiprocessor: asking for more would spill
    static constexpr int kPitch = kHeadDim * static_cast<int>(sizeof(T)) + 16;  // 16 more: no bank conflicts
    static constexpr int kStageBytes = kTileTokens * kPitch;
    static constexpr int kFit = 80 * 1024 / kStageBytes;
    static constexpr int kStages = kFit < 1 ? 1 : kFit > 3 ? 3 : kFit;
    static_assert(kStages * kStageBytes <= 99 * 1024, "what a block may have on every architecture");
    static constexpr int kColumnTiles = kTileTokens / 8;
};

/// Position of a thread in the fragments of its warp. It holds rows row and row + 8 of every 16-row fragment, and of
/// every 8 columns the two from `column` on.
struct FragmentPlace {
    int warp = threadIdx.x / 32;
    int row = threadIdx.x % 32 / 4;
    int column = threadIdx.x % 4 * 2;
};

/// The query rows of a thread: number 2 * fragment + half.
template <int kRowTiles>
struct QueryRows {
    const char* data[2 * kRowTiles];
    int32_t number[2 * kRowTiles];   // of the R rows of the KV head, -1: none
    int32_t visible[2 * kRowTiles];  // tokens that the row may look at
};

template <int kRowTiles>
__device__ QueryRows<kRowTiles> queryRows(const ScoreArgs& args, const FragmentPlace& place, int32_t row,
                                          int32_t kv_head, int32_t band, int32_t length) {
    const ScoreParams& params = args.params;
    const int32_t window = params.settings.window, group = params.heads / params.kv_heads;
    QueryRows<kRowTiles> rows;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int32_t number = band * kBandRows + (place.warp * kRowTiles + i / 2) * 16 + i % 2 * 8 + place.row;
        const int32_t used = number < args.query_rows ? number : 0;
        const int32_t position = used % window;
        const int32_t token = params.query_is_window ? position : length - window + position;
        rows.data[i] = tokenRows(params.query_layout, params.query, 0, row, kv_head * group + used / window).at(token);
        rows.number[i] = number < args.query_rows ? number : -1;
        rows.visible[i] = length - window + position + 1;
    }
    return rows;
}

/// S = Q K^T of a warp's rows and a tile, on tensor cores. Q is held in registers.
template <class T, int kHeadDim>
struct Multiplier {
    using Shape = TileShape<T, kHeadDim>;
    static constexpr int kSteps = kHeadDim / 16;
    uint32_t query[Shape::kRowTiles][kSteps][4];

    __device__ void load(const QueryRows<Shape::kRowTiles>& rows, const FragmentPlace& place) {
#pragma unroll
        for (int fragment = 0; fragment < Shape::kRowTiles; ++fragment)
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int32_t at = step * 16 + i / 2 * 8 + place.column;
                    const char* from = rows.data[2 * fragment + i % 2] + at * static_cast<int>(sizeof(T));
                    query[fragment][step][i] = *reinterpret_cast<const uint32_t*>(from);
                }
    }

    __device__ void multiply(float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4], const char* stage,
                             const FragmentPlace&) const {
        // Lanes 8i.. address matrix i: of two neighbouring column tiles the lower and the upper 8 elements of a step.
        const int lane = threadIdx.x % 32;
        const char* address = stage + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int pair = 0; pair < Shape::kColumnTiles / 2; ++pair) {
                uint32_t key[4];
                ldmatrixX4(key, address + pair * 16 * Shape::kPitch + step * 32);
#pragma unroll
                for (int fragment = 0; fragment < Shape::kRowTiles; ++fragment) {
                    mma16816<T>(sums[fragment][2 * pair], query[fragment][step], key[0], key[1]);
                    mma16816<T>(sums[fragment][2 * pair + 1], query[fragment][step], key[2], key[3]);
                }
            }
    }
};

/// The same in float32, without tensor cores: Q is read through the first-level cache. Every sum ends in the same
/// thread as above.
template <int kHeadDim>
struct Multiplier<float, kHeadDim> {
    using Shape = TileShape<float, kHeadDim>;
    const float* query[2 * Shape::kRowTiles];

    __device__ void load(const QueryRows<Shape::kRowTiles>& rows, const FragmentPlace&) {
#pragma unroll
        for (int i = 0; i < 2 * Shape::kRowTiles; ++i) query[i] = reinterpret_cast<const float*>(rows.data[i]);
    }

    __device__ void multiply(float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4], const char* stage,
                             const FragmentPlace& place) const {
        constexpr int kStep = 4, kBlock = 16;  // sums of 16 products first: long running sums would lose bits
#pragma unroll 1
        for (int block = 0; block < kHeadDim; block += kBlock) {
            float part[2 * Shape::kRowTiles][2 * Shape::kColumnTiles] = {};
#pragma unroll 1
            for (int at = block; at < block + kBlock; at += kStep) {
                float q[2 * Shape::kRowTiles][kStep];
#pragma unroll
                for (int i = 0; i < 2 * Shape::kRowTiles * kStep; ++i)
                    q[i / kStep][i % kStep] = query[i / kStep][at + i % kStep];
#pragma unroll
                for (int token = 0; token < 2 * Shape::kColumnTiles; ++token) {
                    const int row = token / 2 * 8 + place.column + token % 2;
                    const auto* key = reinterpret_cast<const float*>(stage + row * Shape::kPitch) + at;
#pragma unroll
                    for (int i = 0; i < 2 * Shape::kRowTiles; ++i)
                        part[i][token] += (q[i][0] * key[0] + q[i][1] * key[1]) + (q[i][2] * key[2] + q[i][3] * key[3]);
                }
            }
#pragma unroll
            for (int token = 0; token < 2 * Shape::kColumnTiles; ++token)
#pragma unroll
                for (int i = 0; i < 2 * Shape::kRowTiles; ++i)
                    sums[i / 2][token / 2][i % 2 * 2 + token % 2] += part[i][token];
        }
    }
};

/// Copy a tile of keys to shared memory. A warp copies some of its tokens: each lane computes the address of one token,
/// then all lanes share the copies. 8-bit keys are widened to T on the way, which is exact; key_scale is applied to
/// logits.
template <class T, int kHeadDim>
__device__ void stageTile(const ScoreArgs& args, const TokenRows& keys, int32_t tile, int32_t length, char* stage) {
    using Shape = TileShape<T, kHeadDim>;
    constexpr int kTokens = kTileTokens / Shape::kWarps;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kTokens;
    const int32_t first_token = tile * kTileTokens + first, own = first_token + lane % kTokens;
    const auto address = reinterpret_cast<unsigned long long>(keys.at(own < length ? own : length - 1));
    const auto addressOf = [&](int token) {
        return reinterpret_cast<const char*>(__shfl_sync(kFullWarp, address, token));
    };
    stage += first * Shape::kPitch;
    if (args.params.key_dtype == args.params.query_dtype) {
        constexpr int kPieces = kHeadDim * static_cast<int>(sizeof(T)) / 16;
        static_assert(kTokens * kPieces % 32 == 0, "all lanes take part in every shuffle");
#pragma unroll
        for (int i = lane; i < kTokens * kPieces; i += 32) {
            const int token = i / kPieces, piece = i % kPieces * 16;
            cpAsync16(stage + token * Shape::kPitch + piece, addressOf(token) + piece,
                      first_token + token < length ? 16 : 0);
        }
        return;
    }
    constexpr int kPieces = kHeadDim / 4;
    static_assert(kTokens * kPieces % 32 == 0, "all lanes take part in every shuffle");
    const bool is_int8 = args.params.key_dtype == CHUNKKV_INT8;
#pragma unroll 4
    for (int i = lane; i < kTokens * kPieces; i += 32) {
        const int token = i / kPieces;
        const char* from = addressOf(token);
        uint32_t four = 0;
        if (first_token + token < length) four = reinterpret_cast<const uint32_t*>(from)[i % kPieces];
        T* to = reinterpret_cast<T*>(stage + token * Shape::kPitch) + i % kPieces * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t byte = four >> 8 * j & 0xFFu;
            storeScalar(to + j, fromFloat<T>(is_int8 ? int8ToFloat(byte) : e4m3ToFloat(byte)));
        }
    }
}

/// Visit the values that a thread holds of one row, with their tokens' places in the tile.
template <int kColumnTiles, class Visit>
__device__ void forEachToken(float (&sums)[kColumnTiles][4], const FragmentPlace& place, int half, Visit visit) {
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) visit(i / 2 * 8 + place.column + i % 2, sums[i / 2][half * 2 + i % 2]);
}

template <class Combine>
__device__ float combineQuad(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, 1));
    return combine(value, __shfl_xor_sync(kFullWarp, value, 2));
}

/// Replace logits by P = 2^(logit - maximum + 15) and return what the row's statistic of this tile is.
template <int kColumnTiles>
__device__ Statistic exponentiate(float (&sums)[kColumnTiles][4], int half, float scale) {
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) maximum = fmaxf(maximum, sums[i / 2][half * 2 + i % 2]);
    maximum = combineQuad(maximum, [](float a, float b) { return fmaxf(a, b); });
    const float base = (maximum == -INFINITY ? 0.0f : maximum * scale) - kHeadroom;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
        float& value = sums[i / 2][half * 2 + i % 2];
        value = exp2Fast(value * scale - base);
        total += value;
    }
    total = combineQuad(total, [](float a, float b) { return a + b; });
    return {maximum == -INFINITY ? maximum : base, total};
}

/// The taps of one chunk: how many of a token's 2 * reach + 1 neighbours lie in it. Positions count from the tile on.
struct Taps {
    float first, last, reach;

    __device__ Taps(const Settings& settings, int32_t tile, int32_t slot, int32_t ranked_end) {
        const int32_t start = settings.sinks + (firstChunkOf(settings, tile) + slot) * settings.chunk_size;
        const int32_t behind = start + settings.chunk_size < ranked_end ? start + settings.chunk_size : ranked_end;
        first = static_cast<float>(start - tile * kTileTokens);
        last = static_cast<float>(behind - 1 - tile * kTileTokens);
        reach = static_cast<float>(settings.pooling / 2);
    }
    __device__ float of(float token) const {
        return fmaxf(0.0f, fminf(token + reach, last) - fmaxf(token - reach, first) + 1.0f);
    }
    __device__ uint32_t pair(int token) const {
        const float at = static_cast<float>(token);
        return packPair<__half>(of(at), of(at + 1.0f));
    }
};

/// partials [row, slot] = P x taps, for 8 slots at a time.
template <class Shape>
__device__ void writePartials(const ScoreArgs& args, const QueryRows<Shape::kRowTiles>& rows,
                              const FragmentPlace& place, const float (&p)[Shape::kRowTiles][Shape::kColumnTiles][4],
                              int32_t tile, int32_t ranked_end, int64_t first_row) {
    for (int32_t slot = 0; slot < args.slots; slot += 8) {
        const Taps taps(args.params.settings, tile, slot + place.row, ranked_end);
        uint32_t weights[kTileTokens / 16][2];
#pragma unroll
        for (int step = 0; step < kTileTokens / 16; ++step) {
            weights[step][0] = taps.pair(step * 16 + place.column);
            weights[step][1] = taps.pair(step * 16 + 8 + place.column);
        }
#pragma unroll
        for (int fragment = 0; fragment < Shape::kRowTiles; ++fragment) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int step = 0; step < kTileTokens / 16; ++step) {
                uint32_t high[4], low[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float a = p[fragment][2 * step + i / 2][i % 2 * 2];
                    const float b = p[fragment][2 * step + i / 2][i % 2 * 2 + 1];
                    high[i] = packPair<__half>(a, b);
                    low[i] = packPair<__half>(a - lowHalf(high[i]), b - highHalf(high[i]));
                }
                mma16816<__half>(sums, high, weights[step][0], weights[step][1]);
                mma16816<__half>(sums, low, weights[step][0], weights[step][1]);
            }
            const int32_t own = slot + place.column;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int32_t number = rows.number[2 * fragment + i / 2];
                if (number >= 0 && own + i % 2 < args.slots)
                    args.partials[(first_row + number) * args.slot_pitch + own + i % 2] = sums[i];
            }
        }
    }
}

/// columns [token]: the scores of single tokens, summed over the rows of the warp.
template <class Shape>
__device__ void writeColumns(const ScoreArgs& args, const QueryRows<Shape::kRowTiles>& rows, const FragmentPlace& place,
                             const float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4],
                             const Statistic (&stats)[2 * Shape::kRowTiles], float scale, int32_t tile,
                             int32_t ranked_end, float* columns) {
    const bool logits = args.params.settings.score == CHUNKKV_SCORE_LOGITS;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kColumnTiles; ++i) {
        float total = 0.0f;
#pragma unroll
        for (int row = 0; row < 2 * Shape::kRowTiles; ++row) {
            const float logit = sums[row / 2][i / 2][row % 2 * 2 + i % 2] * scale;
            const float value = logits ? logit : exp2Fast(logit - stats[row].maximum) * stats[row].sum;
            total += rows.number[row] >= 0 ? value : 0.0f;
        }
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) total += __shfl_xor_sync(kFullWarp, total, distance);
        const int32_t token = tile * kTileTokens + i / 2 * 8 + place.column + i % 2;
        if (place.row == 0 && token < ranked_end) columns[token] = total;
    }
}

/// grid: x = (KV head, split, band), y = row of the wave. See the top of this file.
template <class T, int kHeadDim, Pass kPass>
__global__ void __launch_bounds__(TileShape<T, kHeadDim>::kThreads, TileShape<T, kHeadDim>::kBlocks)
    scoreTilesKernel(const __grid_constant__ ScoreArgs args) {
    using Shape = TileShape<T, kHeadDim>;
    DYNAMIC_SHARED(char, stages);
    const Settings& settings = args.params.settings;
    const int32_t band = blockIdx.x % args.bands;
    const int32_t split = blockIdx.x / args.bands % args.splits;
    const int32_t kv_head = blockIdx.x / args.bands / args.splits;
    const int32_t row = args.first_row + blockIdx.y;
    const int32_t length = rowLength(args.params.rows, row);
    if (skipsRow(args, row, length)) return;

    const FragmentPlace place;
    const TokenRows keys = tokenRows(args.params.key_layout, args.params.key, 0, row, kv_head);
    const int32_t ranked_end = length - settings.window;
    const int32_t seen = kPass == Pass::kColumns ? ranked_end : length;
    const int32_t tiles = (seen + kTileTokens - 1) / kTileTokens;
    const int32_t row_group = band * Shape::kWarps + place.warp;
    const bool has_rows = row_group < args.row_groups;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * args.params.kv_heads + kv_head;

    const bool scaled = args.params.key_scale != nullptr && args.params.key_dtype != args.params.query_dtype;
    const float key_scale = scaled ? *args.params.key_scale : 1.0f;
    const bool logits = settings.score == CHUNKKV_SCORE_LOGITS;
    const float scale = logits ? key_scale : key_scale * (1.4426950408889634f / sqrtf(static_cast<float>(kHeadDim)));

    const auto rows = queryRows<Shape::kRowTiles>(args, place, row, kv_head, band, length);
    Multiplier<T, kHeadDim> multiplier;
    multiplier.load(rows, place);
    Statistic stats[2 * Shape::kRowTiles] = {};
    if (kPass == Pass::kColumns && !logits) {
#pragma unroll
        for (int i = 0; i < 2 * Shape::kRowTiles; ++i)
            if (rows.number[i] >= 0) stats[i] = args.row_stats[head * args.query_rows + rows.number[i]];
    }

    const auto stage = [&](int32_t number) { return stages + number % Shape::kStages * Shape::kStageBytes; };
    const auto fetch = [&](int32_t number) {  // the number-th tile of this block
        const int32_t tile = split + number * args.splits;
        if (tile < tiles) stageTile<T, kHeadDim>(args, keys, tile, length, stage(number));
        cpAsyncCommit();
    };
    for (int i = 0; i < Shape::kStages - 1; ++i) fetch(i);
    for (int32_t number = 0, tile = split; tile < tiles; ++number, tile += args.splits) {
        if constexpr (Shape::kStages == 1) {
            __syncthreads();  // all threads have read the previous tile
            fetch(number);
            cpAsyncWait<0>();
            __syncthreads();
        } else {
            cpAsyncWait<Shape::kStages - 2>();
            __syncthreads();  // this tile has arrived, and all threads have read the one that the next fetch overwrites
            fetch(number + Shape::kStages - 1);
        }
        if (!has_rows) continue;

        float sums[Shape::kRowTiles][Shape::kColumnTiles][4] = {};
        multiplier.multiply(sums, stage(number), place);
        if constexpr (kPass == Pass::kColumns) {
            writeColumns<Shape>(args, rows, place, sums, stats, scale, tile, ranked_end,
                                args.columns + (head * args.row_groups + row_group) * args.params.rows.max_length);
        } else {
            const int32_t first_token = tile * kTileTokens;
            const bool at_end = first_token + kTileTokens > ranked_end;
            const int64_t first_row = (head * args.tiles + tile) * args.query_rows;
#pragma unroll
            for (int i = 0; i < 2 * Shape::kRowTiles; ++i) {
                auto& held = sums[i / 2];
                if (at_end)
                    forEachToken(held, place, i % 2, [&](int32_t token, float& logit) {
                        if (first_token + token >= rows.visible[i]) logit = -INFINITY;
                    });
                const Statistic stat = exponentiate(held, i % 2, scale);
                if (place.column == 0 && rows.number[i] >= 0) args.tile_stats[first_row + rows.number[i]] = stat;
                if (at_end && kPass == Pass::kPartials)
                    forEachToken(held, place, i % 2, [&](int32_t token, float& p) {
                        if (first_token + token >= ranked_end) p = 0.0f;
                    });
            }
            if constexpr (kPass == Pass::kPartials)
                writePartials<Shape>(args, rows, place, sums, tile, ranked_end, first_row);
        }
    }
}

}  // namespace chunkkv
