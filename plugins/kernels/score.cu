// score: window queries against all keys, down to one mean per chunk. This file is the host side: which kernels run,
// and where their intermediate arrays lie.
//
//   score = softmax  scoreTiles<kStatistics> ─► rowStats ─► scoreTiles<kColumns> ─► finish
//   score = logits   scoreTiles<kColumns> ─► finish
//   score = given    finish
//   value_norm       valueNorms, first of all
#include <type_traits>

#include "score_passes.h"
#include "score_reduce.cuh"

namespace chunkkv {
namespace {

constexpr int64_t kWorkspaceCap = int64_t{512} << 20;  // more rows than fit in it are scored in waves
constexpr int64_t kAlignment = 256;

/// Groups of query rows that mix no heads are needed where the largest of something is taken, not a sum.
bool keepsHeadsApart(const Settings& settings) {
    return settings.window_reduce == CHUNKKV_REDUCE_MAX || settings.head_reduce == CHUNKKV_REDUCE_MAX;
}

/// Call visit with the passes for the type of the queries.
template <class Visit>
auto withPasses(const ScoreParams& params, Visit visit) {
    if (params.query_dtype == CHUNKKV_FLOAT32) return visit(ScorePasses<float>());
    if (params.query_dtype == CHUNKKV_FLOAT16) return visit(ScorePasses<__half>());
    return visit(ScorePasses<__nv_bfloat16>());
}

bool readsKeys(const ScoreParams& params) { return params.settings.score != CHUNKKV_SCORE_GIVEN; }

/// The arguments without the pointers.
ScoreArgs argsWithSizes(const ScoreParams& params) {
    ScoreArgs args{};
    args.params = params;
    args.by_head = keepsHeadsApart(params.settings) ? 1 : 0;
    args.query_rows = params.heads / params.kv_heads * headPitch(params.settings.window, args.by_head != 0);
    args.token_groups = args.row_warps = args.block_rows = 1;
    args.tile_tokens = kWarpTokens;
    if (readsKeys(params)) withPasses(params, [&](auto passes) { passes.divide(args); });
    const int64_t bands = ceilDiv(args.query_rows, args.block_rows), row_warp = args.block_rows / args.row_warps;
    args.column_rows = static_cast<int32_t>(ceilDiv(args.query_rows, args.by_head ? 8 : row_warp));
    const int64_t tiles = ceilDiv(params.rows.max_length, args.tile_tokens);
    const int64_t segments = ceilDiv(kWorkUnits, params.kv_heads * bands);
    args.parts = static_cast<int32_t>(clampTo(tiles, 1, segments)) * args.token_groups;
    args.token_pitch = static_cast<int32_t>(ceilDiv(params.rows.max_length, 2 * kWarpTokens) * 2 * kWarpTokens);
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
    const int64_t heads = rows * params.kv_heads;
    if (!readsKeys(params)) return used;
    if (params.settings.score == CHUNKKV_SCORE_SOFTMAX) {
        take(args.tile_stats, heads * args.parts * args.query_rows);
        take(args.row_stats, heads * args.query_rows);
    }
    take(args.columns, heads * args.column_rows * args.token_pitch);
    if (params.settings.value_norm != 0) take(args.norms, heads * args.token_pitch);
    return used;
}

int64_t rowsPerWave(ScoreArgs args) {
    const int64_t per_row = placeParts(args, 1, nullptr);
    const int64_t fit = kWorkspaceCap / (per_row > 0 ? per_row : 1);
    return clampTo(fit, 1, args.params.rows.batch > 1 ? args.params.rows.batch : 1);
}

LaunchStatus launchWave(const ScoreArgs& args, void* stream) {
    const ScoreParams& params = args.params;
    const auto rows = static_cast<unsigned>(args.rows), heads = static_cast<unsigned>(params.kv_heads);
    LaunchStatus status = 0;
    const auto then = [&](LaunchStatus next) {
        status = next;
        return status == 0;
    };
    After after = After::kStream;
    if (params.settings.value_norm != 0) {
        const dim3 grid(static_cast<unsigned>(ceilDiv(args.token_pitch, kReduceThreads / 8)), rows, heads);
        if (!then(launch(valueNormsKernel, grid, dim3(kReduceThreads), 0, stream, args))) return status;
    }
    const auto pass = [&](Pass which) {
        return then(withPasses(params, [&](auto passes) { return passes.launchPass(args, which, stream, after); }));
    };
    if (params.settings.score == CHUNKKV_SCORE_SOFTMAX) {
        if (!pass(Pass::kStatistics)) return status;
        after = After::kKernel;
        const dim3 grid(static_cast<unsigned>(heads * ceilDiv(args.query_rows, kStatRows)), rows);
        if (!then(launch(rowStatsKernel, grid, dim3(kStatRows * kStatLanes), 0, stream, args, after))) return status;
    }
    if (readsKeys(params)) {
        if (!pass(Pass::kColumns)) return status;
        after = After::kKernel;
    }
    const int32_t choices = choicesOf(params.settings, params.kv_heads);
    const dim3 grid(static_cast<unsigned>(ceilDiv(params.rows.max_length, kSpan)), rows,
                    static_cast<unsigned>(choices));
    return launch(finishKernel, grid, dim3(kReduceThreads), 0, stream, args, after);
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
        args.rows = static_cast<int32_t>(left < wave ? left : wave);
        const LaunchStatus status = launchWave(args, stream);
        if (status != 0) return status;
    }
    return 0;
}

}  // namespace chunkkv
