// How the passes of score_passes.h are launched.
#pragma once

#include "score_passes.h"
#include "score_tiles.cuh"

namespace chunkkv {

template <class Shape>
void divideRows(ScoreArgs& args) {
    int32_t warps = Shape::kWarps / Shape::kGroups;
    while (warps < Shape::kWarps && warps * Shape::kWarpRows < args.query_rows) warps *= 2;
    args.row_warps = warps;
    args.token_groups = Shape::kWarps / warps;
    args.tile_tokens = Shape::kTileTokens;
    args.block_rows = warps * Shape::kWarpRows;
}

template <class T, class Key, int kHeadDim, Pass kPass>
LaunchStatus launchTiles(const ScoreArgs& args, void* stream, After after) {
    using Shape = TileShape<T, Key, kHeadDim>;
    constexpr size_t shared = size_t{Shape::kStages} * Shape::kStageBytes;
    const auto kernel = scoreTilesKernel<T, Key, kHeadDim, kPass>;
    const int64_t bands = (args.query_rows + args.block_rows - 1) / args.block_rows;
    const int64_t most = int64_t{args.rows} * args.params.kv_heads * bands * 
                         ceilDiv(args.token_pitch, Shape::kTileTokens);
    const int64_t wave = residentBlocks(kernel, Shape::kThreads, shared);
    const dim3 grid(static_cast<unsigned>(most < wave ? most : wave));
    return launch(kernel, grid, dim3(Shape::kThreads), shared, stream, args, after);
}

/// Call visit(key, size) with a value of the key's type and the head size as a type.
template <class T, class Visit>
auto withShape(const ScoreParams& params, Visit visit) {
    const auto withKey = [&](auto size) {
        if (params.key_dtype == CHUNKKV_INT8) return visit(Int8{}, size);
        if (params.key_dtype == CHUNKKV_FP8_E4M3) return visit(Fp8{}, size);
        return visit(T{}, size);
    };
    switch (params.head_dim) {
        case 64:
            return withKey(std::integral_constant<int, 64>());
        case 80:
            return withKey(std::integral_constant<int, 80>());
        case 96:
            return withKey(std::integral_constant<int, 96>());
        case 128:
            return withKey(std::integral_constant<int, 128>());
        default:
            return withKey(std::integral_constant<int, 256>());
    }
}

template <class T>
void ScorePasses<T>::divide(ScoreArgs& args) {
    withShape<T>(args.params, [&](auto key, auto size) { divideRows<TileShape<T, decltype(key), size()>>(args); });
}

template <class T>
LaunchStatus ScorePasses<T>::launchPass(const ScoreArgs& args, Pass pass, void* stream, After after) {
    return withShape<T>(args.params, [&](auto key, auto size) {
        if (pass == Pass::kStatistics)
            return launchTiles<T, decltype(key), size(), Pass::kStatistics>(args, stream, after);
        return launchTiles<T, decltype(key), size(), Pass::kColumns>(args, stream, after);
    });
}

}  // namespace chunkkv
