// score, the part that reads K, in two passes: the softmax denominators of all query rows, then the scores of tokens.
//
//            32 or 64 tokens of K, staged in shared memory by cp.async while older tiles are computed
//           ┌────────────────────────────┐
//   warp 0  │ 32 rows (g heads x w)      │  1st pass: per row a base b and the sum of 2^(logit - b), kept in registers
//   warp 1  │ Q in registers             │            over a segment of many tiles
//   warp 2  │ S = Q K^T, tensor cores    │  2nd pass: per token the sum over rows of 2^(logit - M) / sum, or per head
//   warp 3  │                            │            the largest
//           └────────────────────────────┘
//
// With few query rows, two warps share 32 rows and take 32 tokens each of a tile of 64. Segments do not depend on the
// grid, and sums are added in a fixed order, so results do not depend on the grid either.
#pragma once

#include "score_keys.cuh"
#include "score_schedule.cuh"

namespace chunkkv {

/// Visit the values that a thread holds of one row, with their tokens' places among the warp's.
template <int kColumnTiles, class Visit>
__device__ void forEachToken(float (&sums)[kColumnTiles][4], const FragmentPlace& place, int half, Visit visit) {
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) visit(i / 2 * 8 + place.column + i % 2, sums[i / 2][half * 2 + i % 2]);
}

/// The softmax denominators of a thread's rows, as far as its own columns go. The base is the maximum of the first
/// tile of a segment, and only rises when a sum would leave float32's range: a float's precision does not depend on
/// its size, so a base that is much too low costs nothing, and tokens that are 2^126 times below it count nothing.
template <class Shape>
struct RunningSums {
    static constexpr float kMost = 0x1p100f;
    float base[Shape::kRows];
    float sum[Shape::kRows];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
            base[i] = -INFINITY;
            sum[i] = 0.0f;
        }
    }

    template <class Sums>
    __device__ static float sumAbove(const Sums& logits, int row, float scale, float base) {
        float parts[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2 * Shape::kColumnTiles; ++i)
            parts[i % 2] += exp2Fast(multiplyAdd(logits[row / 2][i / 2][row % 2 * 2 + i % 2], scale, -base));
        return parts[0] + parts[1];
    }

    template <class Sums>
    __device__ void add(const Sums& logits, const float (&scale)[Shape::kRows]) {
        float more[Shape::kRows];
        bool fits = true;
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
            more[row] = sumAbove(logits, row, scale[row], base[row]);
            fits = fits && more[row] <= kMost;  // not so for NaN, which a base of -infinity gives
        }
        if (__ballot_sync(kFullWarp, fits) != kFullWarp) return raise(logits, scale);
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) sum[row] += more[row];
    }

    template <class Sums>
    __device__ void raise(const Sums& logits, const float (&scale)[Shape::kRows]) {
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
            float largest = -INFINITY;
#pragma unroll
            for (int i = 0; i < 2 * Shape::kColumnTiles; ++i)
                largest = fmaxf(largest, logits[row / 2][i / 2][row % 2 * 2 + i % 2]);
            const float higher = fmaxf(base[row], largest * scale[row]);
            const float used = higher == -INFINITY ? 0.0f : higher;
            sum[row] = sum[row] * exp2Fast(base[row] - used) + sumAbove(logits, row, scale[row], used);
            base[row] = higher;
        }
    }

    /// The statistic of a row over the four threads that hold it.
    __device__ Statistic ofRow(int row) const {
        const float maximum = combineQuad(base[row], Larger());
        const float used = maximum == -INFINITY ? 0.0f : maximum;
        const float own = sum[row] * exp2Fast(base[row] - used);
        return {maximum, combineQuad(own, [](float a, float b) { return a + b; })};
    }
};

/// Combine 4 pairs of columns over the 8 threads that hold the same columns: afterwards each thread holds a pair,
/// complete over half of them, and twice: pair `held` of the four. Halves are exchanged, so that no sum is made twice.
struct ColumnPairs {
    float value[4][2];

    template <class Combine>
    __device__ float2 combined(int& held, Combine combine) {
        const int lane = threadIdx.x % 32;
        const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float sent = upper ? value[i][j] : value[i + 2][j], kept = upper ? value[i + 2][j] : value[i][j];
                value[i][j] = combine(kept, __shfl_xor_sync(kFullWarp, sent, 16));
            }
        float2 result;
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float sent = odd ? value[0][j] : value[1][j], kept = odd ? value[1][j] : value[0][j];
            pair[j] = combine(kept, __shfl_xor_sync(kFullWarp, sent, 8));
            pair[j] = combine(pair[j], __shfl_xor_sync(kFullWarp, pair[j], 4));
        }
        held = (upper ? 2 : 0) + (odd ? 1 : 0);
        result.x = pair[0];
        result.y = pair[1];
        return result;
    }
};

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
    __device__ float operator()(float a, float b) const { return maxOrNan(a, b); }
};

/// What turns a logit into an attention weight: 2^(logit * scale - maximum) * inverse; raw logits are only scaled.
template <class Shape>
struct Weights {
    float scale[Shape::kRows];
    float maximum[Shape::kRows];
    float inverse[Shape::kRows];

    __device__ float of(int row, float product, bool raw) const {
        return raw ? product : exp2Fast(multiplyAdd(product, scale[row], -maximum[row]));
    }
};

/// columns [token]: the scores of the warp's tokens, summed over its rows (0 where it has none).
template <class Shape, class Sums>
__device__ void writeColumns(const Sums& sums, const Weights<Shape>& weights, const FragmentPlace& place, bool raw,
                             float* columns) {
    ColumnPairs pairs;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kColumnTiles; ++i) {
        float total = 0.0f;
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row)
            total += weights.of(row, sums[row / 2][i / 2][row % 2 * 2 + i % 2], raw) * weights.inverse[row];
        pairs.value[i / 2][i % 2] = total;
    }
    int held;
    const float2 pair = pairs.combined(held, Add());
    if (threadIdx.x % 8 < 4) storeScalar(reinterpret_cast<float2*>(columns + held * 8 + place.column), pair);
}

/// The same for every 8 rows, which are of one head: their sum or the largest. `pitch` is between groups of rows.
template <class Shape, class Sums>
__device__ void writeHeadColumns(const Sums& sums, const Weights<Shape>& weights, const FragmentPlace& place, bool most,
                                 int32_t groups, int64_t pitch, float* columns) {
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
        ColumnPairs pairs;
#pragma unroll
        for (int i = 0; i < 2 * Shape::kColumnTiles; ++i)
            pairs.value[i / 2][i % 2] =
                weights.of(row, sums[row / 2][i / 2][row % 2 * 2 + i % 2], false) * weights.inverse[row];
        int held;
        const float2 pair = most ? pairs.combined(held, Most()) : pairs.combined(held, Add());
        if (row < groups && threadIdx.x % 8 < 4)
            storeScalar(reinterpret_cast<float2*>(columns + row * pitch + held * 8 + place.column), pair);
    }
}

/// One run of tiles of the block: the pipeline of copies, and what each pass does with a tile.
template <class T, class Key, int kHeadDim, Pass kPass>
class RunOfTiles {
  public:
    using Shape = TileShape<T, Key, kHeadDim>;
    using Sums = typename Multiplier<T, Key, kHeadDim>::Sums;

    __device__ RunOfTiles(const ScoreArgs& args, const Run& run, const FragmentPlace& place, char* stages)
        : args_(args), run_(run), place_(place), stages_(stages) {}

    __device__ void walk() {
        const int32_t row_group = run_.band * args_.row_warps + place_.row_warp;
        const bool has_rows = row_group * Shape::kWarpRows < run_.work.query_rows;
        Fetcher<Shape, kPass == Pass::kColumns> fetcher(args_, run_);
        int32_t left = run_.last - run_.first + 1;  // tiles
        int32_t tile = kPass == Pass::kColumns ? run_.last : run_.first;
        fetcher.lookAhead(tile);
#pragma unroll
        for (int32_t i = 0; i < kAhead; ++i) fetch(fetcher, tile + i * kStep, left - i, i);
        Multiplier<T, Key, kHeadDim> multiplier;
        const char* queries[Shape::kRows];
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i)
            queries[i] = queryData(args_, run_, queryRow<Shape>(args_, place_, run_, i));
        multiplier.load(queries, place_);
        begin(multiplier.scale);
        int number = 0;  // of the stage that holds the tile
#pragma unroll 1
        for (; left > 0; --left, tile += kStep) {
            cpAsyncWait<kAhead - 1>();
            __syncthreads();  // this tile has arrived, and all threads have read the one that the next copy overwrites
            fetch(fetcher, tile + kAhead * kStep, left - kAhead, number == 0 ? kAhead : number - 1);
            const char* keys = stage(number) + place_.group * kWarpTokens * Shape::kPitch;
            number = number == kAhead ? 0 : number + 1;
            if (!has_rows) continue;
            Sums sums;
            multiplier.multiply(sums, keys, place_);
            take(sums, tile, left == 1);
        }
        cpAsyncWait<0>();
    }

  private:
    static constexpr int32_t kStep = kPass == Pass::kColumns ? -1 : 1;
    static constexpr int32_t kAhead = Shape::kStages - 1;

    __device__ char* stage(int number) const {
        return stages_ + number * args_.token_groups * (kWarpTokens * Shape::kPitch);
    }

    /// Start to copy a tile, the first of the `left` ones that have not been copied, and look up the pages of the next.
    template <class F>
    __device__ void fetch(F& fetcher, int32_t tile, int32_t left, int number) const {
        if (left > 0) fetcher.fetch(tile, stage(number));
        if (left > 1) fetcher.lookAhead(tile + kStep);
        cpAsyncCommit();
    }

    __device__ int64_t head() const {
        return static_cast<int64_t>(run_.row) * args_.params.kv_heads + run_.kv_head;
    }

    /// Scales, and what the first pass has found.
    __device__ void begin(const float (&row_scale)[Shape::kRows]) {
        const ScoreParams& params = args_.params;
        const bool scaled = Shape::kIsByte && params.key_scale != nullptr;
        raw_ = params.settings.score == CHUNKKV_SCORE_LOGITS;
        const float natural = 1.4426950408889634f / sqrtf(static_cast<float>(kHeadDim));
        const float scale = (scaled ? *params.key_scale : 1.0f) * (raw_ ? 1.0f : natural);
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
            weights_.scale[i] = Multiplier<T, Key, kHeadDim>::kScalesRows ? scale * row_scale[i] : scale;
            if constexpr (kPass == Pass::kColumns) {
                const int32_t number = queryRow<Shape>(args_, place_, run_, i).number;
                weights_.maximum[i] = INFINITY;
                weights_.inverse[i] = 0.0f;
                if (number < 0) continue;
                if (raw_) {
                    weights_.inverse[i] = weights_.scale[i];
                } else {
                    const Statistic of_row = args_.row_stats[head() * args_.query_rows + number];
                    weights_.maximum[i] = of_row.maximum;
                    weights_.inverse[i] = of_row.sum;
                }
            }
        }
        if constexpr (kPass == Pass::kStatistics) {
            running_.clear();
            segment_ = segmentTiles(args_, run_.work.tiles);
            left_ = segment_;
        } else {
            const int32_t group = run_.band * args_.row_warps + place_.row_warp;
            const int32_t first = args_.by_head ? group * Shape::kRows : group;
            columns_ = args_.columns + (head() * args_.column_rows + first) * args_.token_pitch;
        }
    }

    __device__ void take(Sums& sums, int32_t tile, bool is_last) {
        const int32_t first = (tile * args_.token_groups + place_.group) * kWarpTokens;
        if constexpr (kPass == Pass::kColumns) {
            if (args_.by_head) {
                const int32_t group = (run_.band * args_.row_warps + place_.row_warp) * Shape::kRows;
                writeHeadColumns<Shape>(sums, weights_, place_,
                                        args_.params.settings.window_reduce == CHUNKKV_REDUCE_MAX,
                                        ceilDivide(run_.work.query_rows, 8) - group, args_.token_pitch,
                                        columns_ + first);
            } else {
                writeColumns<Shape>(sums, weights_, place_, raw_, columns_ + first);
            }
        } else {
            if (first + kWarpTokens > run_.work.ranked_end) hideTheFuture(sums, first);
            running_.add(sums, weights_.scale);
            if (--left_ == 0 || is_last) writeStatistics(tile / segment_);
        }
    }

    /// A query sees no token behind its own position.
    __device__ void hideTheFuture(Sums& sums, int32_t first) const {
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
            const int32_t position = queryRow<Shape>(args_, place_, run_, i).position;
            const int32_t visible = run_.work.length - run_.work.window + position + 1;
            forEachToken(sums[i / 2], place_, i % 2, [&](int32_t token, float& logit) {
                if (first + token >= visible) logit = -INFINITY;
            });
        }
    }

    __device__ void writeStatistics(int32_t segment) {
        const int64_t part = head() * args_.parts + segment * args_.token_groups + place_.group;
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
            const Statistic stat = running_.ofRow(i);
            const int32_t number = queryRow<Shape>(args_, place_, run_, i).number;
            if (place_.column != 0 || number < 0) continue;
            Statistic& out = args_.tile_stats[part * args_.query_rows + number];
            out.maximum = stat.maximum;
            out.sum = stat.sum;
        }
        running_.clear();
        left_ = segment_;
    }

    const ScoreArgs& args_;
    const Run& run_;
    const FragmentPlace& place_;
    char* stages_;
    bool raw_ = false;
    Weights<Shape> weights_;
    RunningSums<Shape> running_;
    int32_t segment_ = 1, left_ = 1;  // tiles of a segment, and what is left of this one
    float* columns_ = nullptr;
};

/// grid: one wave of blocks, which divide all tiles among themselves. See the top of this file.
template <class T, class Key, int kHeadDim, Pass kPass>
__global__ void __launch_bounds__(TileShape<T, Key, kHeadDim>::kThreads, (TileShape<T, Key, kHeadDim>::blocks(kPass)))
    scoreTilesKernel(const __grid_constant__ ScoreArgs args) {
    DYNAMIC_SHARED(char, stages);
    SHARED(Schedule<kPass>, schedule, 1);
    SHARED(Run, run, 1);
    waitForPrevious();
    letNextStart();
    const FragmentPlace place(args);
    if (threadIdx.x < 32) Schedule<kPass>::start(args, schedule);
    __syncthreads();
    for (;;) {
        if (threadIdx.x == 0) schedule->next(args, *run);
        __syncthreads();  // the run is there
        if (run->exists == 0) return;
        RunOfTiles<T, Key, kHeadDim, kPass>(args, *run, place, stages).walk();
        __syncthreads();  // the run and its tiles have been read
    }
}

}  // namespace chunkkv
