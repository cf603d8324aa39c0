// N(L), the tokens that stay, and the fixed chunk grid: host and device, 64-bit inside.
#pragma once

#include "chunkkv/limits.h"
#include "chunkkv/params.h"

#if defined(__CUDACC__)
#define CHUNKKV_HD __host__ __device__ __forceinline__
#else
#define CHUNKKV_HD inline
#endif

namespace chunkkv {

constexpr int64_t kKeepScale = limits::kKeepPer10k.high;  // keeps a whole prompt

CHUNKKV_HD int64_t clampTo(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

/// N(L) = min(L, max(m, budget)) where budget_tokens > 0, else min(L, max(m, L * keep_per_10k / 10000)).
CHUNKKV_HD int64_t uniformKept(int64_t length, int64_t keep_per_10k, int64_t budget_tokens, int64_t min_tokens) {
    const int64_t wanted = budget_tokens > 0 ? budget_tokens : length * keep_per_10k / kKeepScale;
    return clampTo(wanted > min_tokens ? wanted : min_tokens, 0, length);
}

/// N of the settings' head class. A reading head keeps its share of the budget, as far as min_tokens is left for every
/// local head; local heads keep what that leaves of N(L) tokens per head.
CHUNKKV_HD int32_t keptTokens(const Settings& settings, int64_t length, int64_t keep_per_10k, int64_t budget_tokens) {
    const int64_t ratio = clampTo(keep_per_10k, 0, kKeepScale), least = settings.min_tokens;
    const int64_t kept = uniformKept(length, ratio, budget_tokens, least);
    const int64_t heads = settings.all_heads, reading = settings.all_reading_heads, local = heads - reading;
    if (settings.budget_split == CHUNKKV_SPLIT_UNIFORM || length <= least || reading <= 0 || local <= 0)
        return static_cast<int32_t>(kept);
    const int64_t share = settings.reading_share_per_10k;
    const int64_t wanted =
        budget_tokens > 0 ? budget_tokens * share / kKeepScale : length * ratio * share / (kKeepScale * kKeepScale);
    const int64_t most = (heads * kept - local * least) / reading;
    const int64_t bounded = wanted < most ? wanted : most;
    const int64_t of_reading = clampTo(bounded > least ? bounded : least, 0, length);
    if (settings.head_class == CHUNKKV_CLASS_READING) return static_cast<int32_t>(of_reading);
    return static_cast<int32_t>(clampTo((heads * kept - reading * of_reading) / local, 0, length));
}

/// Whether the settings' head class keeps sinks and the last tokens, whatever the scores.
CHUNKKV_HD bool keepsRecent(const Settings& settings) {
    return settings.budget_split == CHUNKKV_SPLIT_CLASSES && settings.head_class == CHUNKKV_CLASS_LOCAL &&
           settings.local_policy == CHUNKKV_POLICY_RECENT;
}

/// L of a row, clamped to [0, S].
CHUNKKV_HD int32_t rowLength(const Rows& rows, int32_t row) {
    return static_cast<int32_t>(clampTo(rows.lengths[row], 0, rows.max_length));
}

/// N of a row of `length` tokens: the row's own ratio or budget where given, else the settings'.
CHUNKKV_HD int32_t rowKept(const Rows& rows, const Settings& settings, int32_t row, int32_t length) {
    const int32_t ratio = rows.keep_per_10k ? rows.keep_per_10k[row] : settings.keep_per_10k;
    const int32_t no_row_budget = rows.keep_per_10k ? 0 : settings.budget_tokens;
    const int32_t budget = rows.budget_tokens ? rows.budget_tokens[row] : no_row_budget;
    return keptTokens(settings, length, ratio, budget);
}

/// w of a row: how many of the W last queries score.
CHUNKKV_HD int32_t rowWindow(const Rows& rows, const Settings& settings, int32_t row) {
    return rows.windows ? static_cast<int32_t>(clampTo(rows.windows[row], 1, settings.window)) : settings.window;
}

/// C: how many lists of indices a row has.
CHUNKKV_HD int32_t choicesOf(const Settings& settings, int32_t kv_heads) {
    return settings.heads == CHUNKKV_HEADS_EACH ? kv_heads : 1;
}

/// Chunks of [s, L-W) that a row of `length` tokens may have: exact for fixed chunks, an upper bound for delimiter
/// ones.
CHUNKKV_HD int32_t maxChunks(const Settings& settings, int64_t length) {
    const int64_t ranked = length - settings.window - settings.sinks;
    const int64_t least = settings.boundaries == CHUNKKV_BOUNDARIES_DELIMITER ? 1 : settings.chunk_size;
    return ranked <= 0 ? 0 : static_cast<int32_t>((ranked + least - 1) / least);
}

}  // namespace chunkkv
