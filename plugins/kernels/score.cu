// score: window queries against all keys, down to one mean per chunk. This file is the host side: which kernels run, on
// what grid, and where their intermediate arrays lie.
//
//   fixed chunks     scoreTiles<kPartials> ─► rowStats ─► slotSums ─► slotMeans                        K is read once
//   everything else  scoreTiles<kStatistics> ─► rowStats ─► scoreTiles<kColumns> ─► rawScores ─► (smooth) ─► tokenMeans
//   score = logits   scoreTiles<kColumns> ─► rawScores ─► (smooth) ─► tokenMeans
#include "launch.cuh"
#include "score_reduce.cuh"
#include "score_tiles.cuh"

namespace chunkkv {
namespace {

constexpr int32_t kMostSlots = 16;               // above, partials would take more bytes than a second pass over K
constexpr int64_t kBlocksPerMultiprocessor = 4;  // two run at a time
constexpr int64_t kWorkspaceCap = int64_t{512} << 20;  // more rows than fit in it are scored in waves
constexpr int64_t kAlignment = 256;

/// Chunks that a tile and its neighbourhood can touch, whatever their alignment.
int32_t slotsPerTile(const Settings& settings) {
    return (kTileTokens + settings.pooling - 3) / settings.chunk_size + 2;
}

bool takesOnePass(const ScoreParams& params) {
    return params.settings.boundaries == CHUNKKV_BOUNDARIES_FIXED && params.settings.score == CHUNKKV_SCORE_SOFTMAX &&
           params.token_scores == nullptr && slotsPerTile(params.settings) <= kMostSlots;
}

/// The arguments without the pointers.
ScoreArgs argsWithSizes(const ScoreParams& params) {
    ScoreArgs args{};
    args.params = params;
    args.query_rows = params.heads / params.kv_heads * params.settings.window;
    args.bands = static_cast<int32_t>(ceilDiv(args.query_rows, kBandRows));
    const int query_bytes = params.query_dtype == CHUNKKV_FLOAT32 ? 4 : 2;
    args.row_groups =
        static_cast<int32_t>(ceilDiv(args.query_rows, 16 * rowTilesPerWarp(query_bytes, params.head_dim)));
    args.tiles = static_cast<int32_t>(ceilDiv(params.rows.max_length, kTileTokens));
    args.slots = slotsPerTile(params.settings);
    args.slot_pitch = args.slots + args.slots % 2;
    return args;
}

/// Divide the workspace among the arrays of a wave of `rows` rows and return the bytes used. `base` may be null: then
/// only the size is computed.
int64_t placeParts(ScoreArgs& args, int64_t rows, char* base) {
    const ScoreParams& params = args.params;
    int64_t used = 0;
    const auto take = [&](auto*& part, int64_t count) {
        part = base ? reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + used) : nullptr;
        used += ceilDiv(count * static_cast<int64_t>(sizeof(*part)), kAlignment) * kAlignment;
    };
    const int64_t heads = rows * params.kv_heads, tokens = rows * params.rows.max_length;
    const int64_t tile_rows = heads * args.tiles * args.query_rows;
    if (params.settings.score == CHUNKKV_SCORE_SOFTMAX) {
        take(args.tile_stats, tile_rows);
        take(args.row_stats, heads * args.query_rows);
    }
    if (takesOnePass(params)) {
        take(args.partials, tile_rows * args.slot_pitch);
        take(args.slot_sums, rows * args.tiles * args.slot_pitch);
        return used;
    }
    take(args.columns, heads * args.row_groups * params.rows.max_length);
    take(args.raw_scores, tokens);
    args.smooth_scores = args.raw_scores;
    if (params.settings.pooling > 1) take(args.smooth_scores, tokens);
    return used;
}

int64_t rowsPerWave(ScoreArgs args) {
    const int64_t per_row = placeParts(args, 1, nullptr);
    const int64_t fit = kWorkspaceCap / (per_row > 0 ? per_row : 1);
    return fit < 1 ? 1 : fit < args.params.rows.batch ? fit : args.params.rows.batch;
}

template <class T, int kHeadDim, Pass kPass>
LaunchStatus launchTiles(ScoreArgs args, int32_t rows, void* stream) {
    using Shape = TileShape<T, kHeadDim>;
    const int64_t units = int64_t{args.params.kv_heads} * args.bands;
    const int64_t splits = ceilDiv(kBlocksPerMultiprocessor * multiprocessors(), units * rows);
    args.splits = static_cast<int32_t>(splits < args.tiles ? splits : args.tiles);
    const dim3 grid(static_cast<unsigned>(units * args.splits), rows);
    return launch(scoreTilesKernel<T, kHeadDim, kPass>, grid, dim3(Shape::kThreads),
                  size_t{Shape::kStages} * Shape::kStageBytes, stream, args);
}

template <class T, Pass kPass>
LaunchStatus launchHeadDim(const ScoreArgs& args, int32_t rows, void* stream) {
    switch (args.params.head_dim) {
        case 64:
            return launchTiles<T, 64, kPass>(args, rows, stream);
        case 80:
            return launchTiles<T, 80, kPass>(args, rows, stream);
        case 96:
            return launchTiles<T, 96, kPass>(args, rows, stream);
        case 128:
            return launchTiles<T, 128, kPass>(args, rows, stream);
        default:
            return launchTiles<T, 256, kPass>(args, rows, stream);
    }
}

template <Pass kPass>
LaunchStatus launchPass(const ScoreArgs& args, int32_t rows, void* stream) {
    if (args.params.query_dtype == CHUNKKV_FLOAT32) return launchHeadDim<float, kPass>(args, rows, stream);
    if (args.params.query_dtype == CHUNKKV_FLOAT16) return launchHeadDim<__half, kPass>(args, rows, stream);
    return launchHeadDim<__nv_bfloat16, kPass>(args, rows, stream);
}

/// The launches of one wave, one after the other until one fails.
LaunchStatus launchWave(const ScoreArgs& args, int32_t rows, void* stream) {
    const ScoreParams& params = args.params;
    const auto items = [&](int64_t count) { return dim3(static_cast<unsigned>(ceilDiv(count, kReduceThreads)), rows); };
    const dim3 stat_grid(static_cast<unsigned>(params.kv_heads * ceilDiv(args.query_rows, kStatRows)), rows);
    const dim3 stat_block(kStatRows * kStatLanes), block(kReduceThreads);
    LaunchStatus status = 0;
    const auto then = [&](LaunchStatus next) {
        status = next;
        return status == 0;
    };
    if (takesOnePass(params)) {
        then(launchPass<Pass::kPartials>(args, rows, stream)) &&
            then(launch(rowStatsKernel, stat_grid, stat_block, 0, stream, args)) &&
            then(launch(slotSumsKernel, dim3(args.tiles, rows), block, 0, stream, args)) &&
            then(launch(slotMeansKernel, items(params.max_chunks), block, 0, stream, args));
        return status;
    }
    if (params.settings.score == CHUNKKV_SCORE_SOFTMAX &&
        !(then(launchPass<Pass::kStatistics>(args, rows, stream)) &&
          then(launch(rowStatsKernel, stat_grid, stat_block, 0, stream, args))))
        return status;
    const dim3 tokens = items(params.rows.max_length);
    then(launchPass<Pass::kColumns>(args, rows, stream)) &&
        then(launch(rawScoresKernel, tokens, block, 0, stream, args)) &&
        (params.settings.pooling == 1 || then(launch(smoothKernel, tokens, block, 0, stream, args))) &&
        then(launch(tokenMeansKernel, items(params.max_chunks), block, 0, stream, args));
    return status;
}

}  // namespace

// The bytes of all rows, each counted alone, but no more than a wave may use. So the size grows with batch and S, and
// what suffices for the largest sizes suffices for all smaller ones. The rows of a wave are rounded up together, so
// that a wave never needs more than its rows counted alone.
size_t scoreWorkspaceBytes(const ScoreParams& params) {
    ScoreArgs args = argsWithSizes(params);
    const int64_t row = placeParts(args, 1, nullptr), batch = row * params.rows.batch;
    const int64_t wave = row > kWorkspaceCap ? row : kWorkspaceCap;
    return static_cast<size_t>(batch < wave ? batch : wave);
}

LaunchStatus launchScore(const ScoreParams& params, void* workspace, void* stream) {
    ScoreArgs args = argsWithSizes(params);
    const int64_t wave = rowsPerWave(args);
    placeParts(args, wave, static_cast<char*>(workspace));
    for (int64_t first = 0; first < params.rows.batch; first += wave) {
        const int64_t left = params.rows.batch - first;
        args.first_row = static_cast<int32_t>(first);
        const LaunchStatus status = launchWave(args, static_cast<int32_t>(left < wave ? left : wave), stream);
        if (status != 0) return status;
    }
    return 0;
}

}  // namespace chunkkv
