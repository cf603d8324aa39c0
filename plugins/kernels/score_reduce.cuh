// score, the part that does not read K: adds up what the two passes have left, always in the same order.
#pragma once

#include "chunks.cuh"
#include "score_keys.cuh"

namespace chunkkv {

constexpr int kStatRows = 16;
constexpr int kStatLanes = 32;
constexpr int kReduceThreads = 256;
constexpr int kSpan = 256;  // tokens of a block of finishKernel
constexpr int kMostReach = 31, kMostChunk = 256;
static_assert(limits::kPooling.high / 2 == kMostReach && limits::kChunkSize.high == kMostChunk, "arrays have room");

__device__ inline Statistic merged(const Statistic& a, const Statistic& b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    if (maximum == -INFINITY) return {maximum, a.sum + b.sum};
    return {maximum, a.sum * exp2Fast(a.maximum - maximum) + b.sum * exp2Fast(b.maximum - maximum)};
}

/// row_stats: the softmax denominator of every query row, from its pieces. grid: x = (KV head, 16 query rows), y = row.
__global__ void __launch_bounds__(kStatRows* kStatLanes) rowStatsKernel(const __grid_constant__ ScoreArgs args) {
    SHARED(Statistic, parts, kStatRows * kStatLanes);
    waitForPrevious();
    letNextStart();
    const RowWork work = rowWork<Pass::kStatistics>(args, args.first_row + static_cast<int32_t>(blockIdx.y));
    if (work.tiles == 0) return;
    const int32_t groups = ceilDivide(args.query_rows, kStatRows);
    const int32_t kv_head = blockIdx.x / groups;
    const int32_t lane = threadIdx.x / kStatRows;
    const int32_t number = blockIdx.x % groups * kStatRows + threadIdx.x % kStatRows;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * args.params.kv_heads + kv_head;
    const int32_t count = ceilDivide(work.tiles, segmentTiles(args, work.tiles)) * args.token_groups;
    const bool exists = number < work.query_rows && number % work.head_pitch < work.window;

    Statistic own{-INFINITY, 0.0f};
    if (exists) {
        const Statistic* of_part = args.tile_stats + head * args.parts * args.query_rows + number;
#pragma unroll 4
        for (int32_t part = lane; part < count; part += kStatLanes)
            own = merged(own, of_part[static_cast<int64_t>(part) * args.query_rows]);
    }
    parts[threadIdx.x].maximum = own.maximum;
    parts[threadIdx.x].sum = own.sum;
    for (int half = kStatLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane >= half) continue;
        own = merged(own, parts[threadIdx.x + half * kStatRows]);
        parts[threadIdx.x].maximum = own.maximum;
        parts[threadIdx.x].sum = own.sum;
    }
    if (lane != 0 || !exists) return;
    Statistic& out = args.row_stats[head * args.query_rows + number];
    out.maximum = own.maximum;
    out.sum = 1.0f / own.sum;  // the row sees its own token, so the sum is not 0
}

__device__ inline float elementOf(const char* vector, int32_t dtype, int i) {
    if (dtype == CHUNKKV_FLOAT32) return reinterpret_cast<const float*>(vector)[i];
    if (dtype == CHUNKKV_FLOAT16) return toFloat(reinterpret_cast<const __half*>(vector)[i]);
    if (dtype == CHUNKKV_BFLOAT16) return toFloat(reinterpret_cast<const __nv_bfloat16*>(vector)[i]);
    const uint32_t byte = reinterpret_cast<const uint8_t*>(vector)[i];
    return dtype == CHUNKKV_INT8 ? int8ToFloat(byte) : e4m3ToFloat(byte);
}

/// norms: the length of every value vector. 8 lanes share a token. grid: x = 32 tokens, y = row, z = KV head.
__global__ void __launch_bounds__(kReduceThreads) valueNormsKernel(const __grid_constant__ ScoreArgs args) {
    constexpr int kLanes = 8, kBytes = 16;
    const ScoreParams& params = args.params;
    const int32_t row = args.first_row + static_cast<int32_t>(blockIdx.y);
    const RowWork work = rowWork<Pass::kColumns>(args, row);
    const int32_t token = static_cast<int32_t>(blockIdx.x * kReduceThreads + threadIdx.x) / kLanes;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
    const bool exists = work.tiles > 0 && token < work.ranked_end;
    const int32_t number = headNumber(params.kv_head_numbers, static_cast<int32_t>(blockIdx.z), params.all_kv_heads);
    const int32_t dtype = params.key_dtype;
    const int32_t size = dtype == CHUNKKV_FLOAT32 ? 4 : dtype <= CHUNKKV_BFLOAT16 ? 2 : 1;
    float sum = 0.0f;
    if (exists) {
        const char* value = tokenRows(params.value_layout, params.value, 1, row, number).at(token);
        for (int32_t at = lane * kBytes; at < params.head_dim * size; at += kLanes * kBytes) {
            const uint4 words = *reinterpret_cast<const uint4*>(value + at);
            const char* vector = reinterpret_cast<const char*>(&words);
            for (int i = 0; i < kBytes / size; ++i) {
                const float element = elementOf(vector, dtype, i);
                sum += element * element;
            }
        }
    }
    for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    if (!exists || lane != 0) return;
    const float scale = size == 1 && params.value_scale ? fabsf(*params.value_scale) : 1.0f;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * params.kv_heads + blockIdx.z;
    args.norms[head * args.token_pitch + token] = sqrtf(sum) * scale;
}

/// What a block of finishKernel works on: a choice of a row.
struct Finish {
    const ScoreArgs& args;
    RowWork work;
    int32_t row;  // of the wave
    int32_t choice;
    int32_t first_head, heads;  // the KV heads of the choice

    __device__ float reduced(float a, float b, int32_t rule) const {
        return rule == CHUNKKV_REDUCE_MAX ? maxOrNan(a, b) : a + b;
    }

    /// What the query heads of a KV head give a token: over its groups of query rows.
    __device__ float ofKvHead(int32_t kv_head, int32_t token) const {
        const Settings& settings = args.params.settings;
        const int64_t head = static_cast<int64_t>(row) * args.params.kv_heads + kv_head;
        const float* column = args.columns + head * args.column_rows * args.token_pitch + token;
        const auto sumOf = [&](int32_t first, int32_t count, int32_t rule) {
            float all = 0.0f;
#pragma unroll 4
            for (int32_t i = 0; i < count; ++i)
                all = reduced(all, column[static_cast<int64_t>(first + i) * args.token_pitch], rule);
            return all;
        };
        const int32_t warp_rows = args.block_rows / args.row_warps;
        if (!args.by_head) return sumOf(0, ceilDivide(work.query_rows, warp_rows), CHUNKKV_REDUCE_MEAN);
        const int32_t groups = work.head_pitch / 8;
        float all = 0.0f;
        for (int32_t i = 0; i < args.params.heads / args.params.kv_heads; ++i) {
            const float own = sumOf(i * groups, groups, settings.window_reduce);
            all = reduced(all, own, settings.head_reduce);
        }
        return all;
    }

    /// a[t] before pooling, from the columns.
    __device__ float tokenScore(int32_t token) const {
        const Settings& settings = args.params.settings;
        float all = 0.0f;
        for (int32_t i = 0; i < heads; ++i) {
            float own = ofKvHead(first_head + i, token);
            const int64_t head = static_cast<int64_t>(row) * args.params.kv_heads + first_head + i;
            if (args.norms) own *= args.norms[head * args.token_pitch + token];
            all = reduced(all, own, settings.head_reduce);
        }
        if (settings.score == CHUNKKV_SCORE_LOGITS) return all;
        float count = 1.0f;
        if (settings.window_reduce == CHUNKKV_REDUCE_MEAN) count *= static_cast<float>(work.window);
        if (settings.head_reduce == CHUNKKV_REDUCE_MEAN)
            count *= static_cast<float>(heads * (args.params.heads / args.params.kv_heads));
        return all / count;
    }

    __device__ float rawScore(const RowPart& tokens, int32_t token) const {
        if (args.params.settings.score != CHUNKKV_SCORE_GIVEN) return tokenScore(token);
        return token < tokens.count ? args.params.given_scores[tokens.first + token] : 0.0f;
    }

    __device__ RowPart tokens() const {
        return rowPart(args.params.rows, args.first_row + row, work.length, args.params.rows.max_length, choice,
                       choicesOf(args.params.settings, args.params.kv_heads));
    }
};

/// token_scores and chunk_scores: scores of tokens over all heads of a choice, pooled, and their means per chunk. A
/// block writes the tokens of its span, and the chunks that begin in it. grid: x = spans of S, y = row, z = choice.
__global__ void __launch_bounds__(kReduceThreads, 4) finishKernel(const __grid_constant__ ScoreArgs args) {
    SHARED(float, raw, kSpan + kMostChunk + 2 * kMostReach);
    SHARED(float, smooth, kSpan + kMostChunk);
    waitForPrevious();
    const ScoreParams& params = args.params;
    const Settings& settings = params.settings;
    const int32_t row = args.first_row + static_cast<int32_t>(blockIdx.y), thread = static_cast<int32_t>(threadIdx.x);
    const bool each = settings.heads == CHUNKKV_HEADS_EACH;
    const auto choice = static_cast<int32_t>(blockIdx.z);
    const Finish finish{args,
                        rowWork<Pass::kColumns>(args, row),
                        static_cast<int32_t>(blockIdx.y),
                        choice,
                        each ? choice : 0,
                        each ? 1 : params.kv_heads};
    const int32_t end = finish.work.tiles > 0 ? finish.work.ranked_end : 0;  // nothing behind it is ranked
    const int32_t first = static_cast<int32_t>(blockIdx.x) * kSpan, reach = settings.pooling / 2;
    const RowPart tokens = finish.tokens();
    const int32_t width = kSpan + settings.chunk_size - 1;  // a chunk that begins in the span ends there at the latest

    const int32_t low = first - reach;
    for (int32_t i = thread; i < width + 2 * reach && low + i < end; i += kReduceThreads) {
        const int32_t token = low + i;
        raw[i] = token < 0 ? 0.0f : finish.rawScore(tokens, token);
    }
    __syncthreads();
    for (int32_t i = thread; i < width; i += kReduceThreads) {
        const int32_t token = first + i;
        float sum = 0.0f;
        if (token < end) {
            const int32_t behind = token + reach < end ? i + 2 * reach : end - 1 - low;
            for (int32_t other = i; other <= behind; ++other) sum += raw[other];
        }
        const float score = reach > 0 ? sum / static_cast<float>(settings.pooling) : sum;
        smooth[i] = score;
        if (params.token_scores != nullptr && i < kSpan && token < tokens.count)
            params.token_scores[tokens.first + token] = score;
    }
    __syncthreads();
    if (end == 0) return;

    const RowPart table = rowPart(params.rows, row, finish.work.length, params.max_chunks);
    const ChunkSpans spans =
        chunkSpans(settings, params.chunk_starts, params.num_chunks, table, row, finish.work.length);
    float* scores = params.chunk_scores + rowPart(params.rows, row, finish.work.length, params.max_chunks, choice,
                                                  choicesOf(settings, params.kv_heads))
                                              .first;
    const int32_t behind = spans.firstFrom(first + kSpan);
    for (int32_t chunk = spans.firstFrom(first) + thread; chunk < behind; chunk += kReduceThreads) {
        const int32_t start = spans.start(chunk) - first, size = spans.length(chunk);
        if (start < 0 || start >= kSpan) continue;  // a chunk table of garbage
        float sum = 0.0f;
        for (int32_t i = 0; i < size; ++i) sum += smooth[start + i];
        scores[chunk] = size > 0 ? sum / static_cast<float>(size) : 0.0f;
    }
}

}  // namespace chunkkv
