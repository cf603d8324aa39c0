// The two passes of score over K, as the host sees them: one instance for each type of queries, in a file of its own,
// so that they are compiled side by side.
#pragma once

#include "launch.cuh"
#include "score_args.h"

namespace chunkkv {

template <class T>
struct ScorePasses {
    /// Set what the shape of the kernel decides for args.params and query_rows: row_warps, token_groups, tile_tokens,
    /// block_rows.
    static void divide(ScoreArgs& args);
    static LaunchStatus launchPass(const ScoreArgs& args, Pass pass, void* stream, After after);
};

}  // namespace chunkkv
