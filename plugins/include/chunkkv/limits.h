// The values that settings may have, and the shapes that the score kernel is compiled for.
// Generated from python/chunkkv/limits.py by plugins/generate_limits.py: change that file and run this one again.
#pragma once

#include <cstdint>

namespace chunkkv::limits {

/// A setting is a whole number from `low` to `high`; where `words` is given it is the place of a word in that list.
struct Setting {
    const char* name;
    int32_t low, high;
    const char* const* words;
};

inline constexpr const char* kBoundariesWords[] = {"fixed", "delimiter"};
inline constexpr const char* kScoreWords[] = {"softmax", "logits", "given"};
inline constexpr const char* kWindowReduceWords[] = {"mean", "max"};
inline constexpr const char* kHeadReduceWords[] = {"mean", "max"};
inline constexpr const char* kValueNormWords[] = {"off", "on"};
inline constexpr const char* kHeadsWords[] = {"shared", "each"};
inline constexpr const char* kBudgetSplitWords[] = {"uniform", "classes"};
inline constexpr const char* kLocalPolicyWords[] = {"chunks", "recent"};

inline constexpr Setting kWindow{"window", 1, 128, nullptr};
inline constexpr Setting kSinks{"sinks", 0, 65536, nullptr};
inline constexpr Setting kChunkSize{"chunk_size", 1, 256, nullptr};
inline constexpr Setting kBoundaries{"boundaries", 0, 1, kBoundariesWords};
inline constexpr Setting kPooling{"pooling", 1, 63, nullptr};
inline constexpr Setting kScore{"score", 0, 2, kScoreWords};
inline constexpr Setting kWindowReduce{"window_reduce", 0, 1, kWindowReduceWords};
inline constexpr Setting kHeadReduce{"head_reduce", 0, 1, kHeadReduceWords};
inline constexpr Setting kValueNorm{"value_norm", 0, 1, kValueNormWords};
inline constexpr Setting kHeads{"heads", 0, 1, kHeadsWords};
inline constexpr Setting kKeepPer10k{"keep_per_10k", 1, 10000, nullptr};
inline constexpr Setting kBudgetTokens{"budget_tokens", 0, 2147483647, nullptr};
inline constexpr Setting kMinTokens{"min_tokens", 1, 2147483647, nullptr};
inline constexpr Setting kBudgetSplit{"budget_split", 0, 1, kBudgetSplitWords};
inline constexpr Setting kLocalPolicy{"local_policy", 0, 1, kLocalPolicyWords};
inline constexpr Setting kReadingSharePer10k{"reading_share_per_10k", 10000, 1000000, nullptr};

inline constexpr int32_t kHeadSizes[] = {64, 80, 96, 128, 256};
inline constexpr int32_t kMaxGroup = 16;  // query heads that share one KV head
inline constexpr int32_t kMaxLength = 4194304;  // tokens of a prompt

}  // namespace chunkkv::limits
