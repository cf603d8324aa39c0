// score, the part that reads K, in two passes: the softmax denominators of all query rows, then the scores of tokens.
//
//            64 tokens of K (or 32, where they are large), staged in shared memory while older tiles are computed
//           ┌────────────────────────────┐
//   warp 0  │ 32 rows (g heads x w)      │  1st pass: per row a base b and the sum of 2^(logit - b), kept in registers
//   warp 1  │ Q in registers             │            over a segment of many tiles
//   warp 2  │ S = Q K^T, tensor cores    │  2nd pass: per token the sum over rows of 2^(logit - M) / sum, or per head
//   warp 3  │                            │            the largest
//           └────────────────────────────┘
//
// A warp multiplies 32 tokens at a time, a group. With few query rows, two warps share 32 rows and take one group each
// of a tile; otherwise every warp takes both. Segments do not depend on the grid, and sums are added in a fixed order,
// so results do not depend on the grid either.
#pragma once

#include "score_fetch.cuh"
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
        const auto weight = [&](int i) {
            return exp2Fast(multiplyAdd(logits[row / 2][i / 2][row % 2 * 2 + i % 2], scale, -base));
        };
        float parts[2] = {weight(0), weight(1)};
#pragma unroll
        for (int i = 2; i < 2 * Shape::kColumnTiles; ++i) parts[i % 2] += weight(i);
        return parts[0] + parts[1];
    }

    /// Add what a group of keys gives above the base to `more`.
    template <class Sums>
    __device__ void addTo(float (&more)[Shape::kRows], const Sums& logits, const float (&scale)[Shape::kRows]) const {
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) more[row] += sumAbove(logits, row, scale[row], base[row]);
    }

    /// Take these sums; false, and nothing is taken, where a base is too low for one of them, in any lane.
    __device__ bool accept(const float (&more)[Shape::kRows]) {
        bool fits = true;
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row)
            fits = fits && more[row] <= kMost;  // not so for NaN, which a base of -infinity gives
        if (__ballot_sync(kFullWarp, fits) != kFullWarp) return false;
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) sum[row] += more[row];
        return true;
    }

    /// Raise the base to the largest logit of a group of keys, and take that group.
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
/// complete over half of them, and twice: pair held() of the four. Halves are exchanged, so that no sum is made twice.
struct ColumnPairs {
    float value[4][2];

    __device__ static int held() { return static_cast<int>(threadIdx.x) % 32 / 16 * 2 + threadIdx.x % 16 / 8; }

    template <class Combine>
    __device__ float2 combined(Combine combine) {
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

/// The scores of a group of tokens, summed over the warp's rows (0 where it has none), from the lane's own on.
template <class Shape, class Sums>
__device__ void writeColumns(const Sums& sums, const Weights<Shape>& weights, bool raw, float* columns) {
    ColumnPairs pairs;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kColumnTiles; ++i) {
        const auto weight = [&](int row) {
            return weights.of(row, sums[row / 2][i / 2][row % 2 * 2 + i % 2], raw);
        };
        float total = weight(0) * weights.inverse[0];
#pragma unroll
        for (int row = 1; row < Shape::kRows; ++row) total = multiplyAdd(weight(row), weights.inverse[row], total);
        pairs.value[i / 2][i % 2] = total;
    }
    const float2 pair = pairs.combined(Add());
    if (threadIdx.x % 8 < 4) storeScalar(reinterpret_cast<float2*>(columns), pair);
}

/// The same for every 8 rows, which are of one head: their sum or the largest. `pitch` is between groups of rows.
template <class Shape, class Sums>
__device__ void writeHeadColumns(const Sums& sums, const Weights<Shape>& weights, bool most, int32_t groups,
                                 int64_t pitch, float* columns) {
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
        ColumnPairs pairs;
#pragma unroll
        for (int i = 0; i < 2 * Shape::kColumnTiles; ++i)
            pairs.value[i / 2][i % 2] =
                weights.of(row, sums[row / 2][i / 2][row % 2 * 2 + i % 2], false) * weights.inverse[row];
        const float2 pair = most ? pairs.combined(Most()) : pairs.combined(Add());
        if (row < groups && threadIdx.x % 8 < 4) storeScalar(reinterpret_cast<float2*>(columns + row * pitch), pair);
    }
}

/// One run of tiles of the block: the pipeline of copies, and what each pass does with a tile.
template <class T, class Key, int kHeadDim, Pass kPass>
class RunOfTiles {
  public:
    using Shape = TileShape<T, Key, kHeadDim>;
    using Sums = typename Multiplier<T, Key, kHeadDim>::Sums;

    __device__ RunOfTiles(const ScoreArgs& args, const Run& run, const FragmentPlace& place, char* stages)
        : args_(args), run_(run), place_(place), multiplier_(stages, place) {
        const int32_t count = run_.last - run_.first + 1;
        Fetcher<Shape, kPass == Pass::kStatistics, kPass == Pass::kColumns> fetcher(
            args, run, stages, kPass == Pass::kColumns ? run.last : run.first, count);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetcher.fetch(i * Shape::kStageBytes);
        const char* queries[Shape::kRows];
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i)
            queries[i] = queryData(args_, run_, queryRow<Shape>(args_, place_, run_, i));
        multiplier_.load(queries, place_);
        begin();
        walk(fetcher, count);
    }

  private:
    static constexpr int kAhead = Shape::kStages - 1;

    template <class F>
    __device__ void walk(F& fetcher, int32_t left) {
        const int32_t row_group = run_.band * args_.row_warps + place_.row_warp;
        const bool has_rows = row_group * Shape::kWarpRows < run_.work.query_rows;
        int stage = 0, free = kAhead * Shape::kStageBytes;  // the stage that holds the tile, and that of the next copy
#pragma unroll 1
        for (; left > 0; --left) {
            cpAsyncWait<kAhead - 1>();
            __syncthreads();  // this tile has arrived, and all threads have read the one that the next copy overwrites
            fetcher.fetch(free);
            if (has_rows) take(stage);
            next();
            free = stage;
            stage = stage == kAhead * Shape::kStageBytes ? 0 : stage + Shape::kStageBytes;
        }
        cpAsyncWait<0>();
    }

    __device__ int64_t head() const {
        return static_cast<int64_t>(run_.row) * args_.params.kv_heads + run_.kv_head;
    }

    /// Scales, and what the first pass has found.
    __device__ void begin() {
        const ScoreParams& params = args_.params;
        const bool scaled = Shape::kIsByte && params.key_scale != nullptr;
        raw_ = kPass == Pass::kColumns && params.settings.score == CHUNKKV_SCORE_LOGITS;
        const float natural = 1.4426950408889634f / sqrtf(static_cast<float>(kHeadDim));
        const float scale = (scaled ? *params.key_scale : 1.0f) * (raw_ ? 1.0f : natural);
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
            weights_.scale[i] = Multiplier<T, Key, kHeadDim>::kScalesRows ? scale * multiplier_.scale[i] : scale;
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
            tile_ = run_.first;
            stop_ = segmentEnd();
            seen_by_all_ = run_.work.ranked_end / Shape::kTileTokens;
        } else {
            const int32_t group = run_.band * args_.row_warps + place_.row_warp;
            const int32_t first = args_.by_head ? group * Shape::kRows : group;
            columns_ = args_.columns + (head() * args_.column_rows + first) * args_.token_pitch +
                       (run_.last * Shape::kGroups + place_.group) * kWarpTokens + ColumnPairs::held() * 8 +
                       place_.column;
        }
    }

    /// Visit the products of the warp's groups of the tile in a stage, one or all of them, with their numbers.
    template <class Visit>
    __device__ void forEachGroup(int stage, Visit visit) const {
#pragma unroll 1
        for (int i = 0; i < Shape::kGroups; i += args_.token_groups) {
            Sums sums;
            multiplier_.multiply(sums, stage + i * Shape::kGroupBytes, place_);
            visit(i, sums);
        }
    }

    __device__ void take(int stage) {
        if constexpr (kPass == Pass::kColumns) {
            forEachGroup(stage, [&](int i, const Sums& sums) {
                float* columns = columns_ + i * kWarpTokens;
                if (args_.by_head) {
                    const int32_t group = (run_.band * args_.row_warps + place_.row_warp) * Shape::kRows;
                    writeHeadColumns<Shape>(sums, weights_,
                                            args_.params.settings.window_reduce == CHUNKKV_REDUCE_MAX,
                                            ceilDivide(run_.work.query_rows, 8) - group, args_.token_pitch, columns);
                } else {
                    writeColumns<Shape>(sums, weights_, raw_, columns);
                }
            });
        } else {
            if (tile_ < seen_by_all_) {
                float more[Shape::kRows] = {};
                forEachGroup(stage, [&](int, const Sums& sums) { running_.addTo(more, sums, weights_.scale); });
                if (running_.accept(more)) return;
            }
            forEachGroup(stage, [&](int i, Sums& sums) {
                hideTheFuture(sums, (tile_ * Shape::kGroups + place_.group + i) * kWarpTokens);
                running_.raise(sums, weights_.scale);
            });
        }
    }

    __device__ void next() {
        if constexpr (kPass == Pass::kColumns)
            columns_ -= Shape::kTileTokens;
        else if (++tile_ == stop_)
            writeStatistics();
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

    /// The first tile behind this one's segment, or behind the run.
    __device__ int32_t segmentEnd() const {
        const int32_t segment = segmentTiles(args_, run_.work.tiles), end = (tile_ / segment + 1) * segment;
        return end <= run_.last ? end : run_.last + 1;
    }

    __device__ void writeStatistics() {
        const int32_t segment = (tile_ - 1) / segmentTiles(args_, run_.work.tiles);
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
        stop_ = segmentEnd();
    }

    const ScoreArgs& args_;
    const Run& run_;
    const FragmentPlace& place_;
    Multiplier<T, Key, kHeadDim> multiplier_;
    bool raw_ = false;
    Weights<Shape> weights_;
    RunningSums<Shape> running_;
    int32_t tile_ = 0, stop_ = 0;  // this tile, and the first one behind its segment
    int32_t seen_by_all_ = 0;      // tiles all of whose tokens every query sees
    float* columns_ = nullptr;     // the lane's own place for this tile
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
        RunOfTiles<T, Key, kHeadDim, kPass>(args, *run, place, stages);
        __syncthreads();  // the run and its tiles have been read
    }
}

}  // namespace chunkkv
