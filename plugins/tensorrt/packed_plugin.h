// What the plugins of a TensorRT-LLM graph share: the settings as fields, packed batches, and scoring of packed QKV.
// A batch holds context rows (whole prompts, back to back), then generation rows (one token each).
#pragma once

#include <array>

#include "chunkkv/budget.h"
#include "plugin_base.h"

namespace chunkkv::trt {

/// The first fields of the tables that withShared() makes; a plugin's own fields follow.
enum {
    kWindow,
    kSinks,
    kChunkSize,
    kBoundaries,
    kPooling,
    kScore,
    kKeepPer10k,
    kBudgetTokens,
    kMinTokens,
    kMaxLength,
    kWindowReduce,
    kHeadReduce,
    kValueNorm,
    kSharedFields
};

constexpr std::array<Field, kSharedFields> kSharedTable{{
    fieldOf(limits::kWindow),
    fieldOf(limits::kSinks),
    fieldOf(limits::kChunkSize),
    fieldOf(limits::kBoundaries),
    fieldOf(limits::kPooling),
    fieldOf(limits::kScore),
    fieldOf(limits::kKeepPer10k),
    fieldOf(limits::kBudgetTokens),
    fieldOf(limits::kMinTokens),
    {"max_length", 1, CHUNKKV_MAX_LENGTH},
    fieldOf(limits::kWindowReduce, CHUNKKV_REDUCE_MEAN),
    fieldOf(limits::kHeadReduce, CHUNKKV_REDUCE_MEAN),
    fieldOf(limits::kValueNorm, 0),
}};

/// A power of two, which the plugins check with isPowerOfTwo().
constexpr Field kTokensPerBlockField{"tokens_per_block", 1, 1 << 16};

template <size_t kOwn>
constexpr std::array<Field, kSharedFields + kOwn> withShared(const Field (&own)[kOwn]) {
    static_assert(kSharedFields + kOwn <= kMaxFields, "FieldValues has room for every field");
    std::array<Field, kSharedFields + kOwn> all{};
    for (size_t i = 0; i < all.size(); ++i) all[i] = i < kSharedFields ? kSharedTable[i] : own[i - kSharedFields];
    return all;
}

class PackedPlugin : public Plugin {
  protected:
    using Plugin::Plugin;

    /// What the tensors in host memory say about a batch.
    struct Batch {
        int32_t rows;
        int32_t contexts;  // leading rows in their context phase
        int32_t longest;   // most tokens of a context row
        bool compresses;   // whether a context row keeps fewer tokens than it has
        int64_t tokens;    // T
    };

    /// Heads of QKV [T, (query + 2*kv) * size].
    struct Heads {
        int32_t query, kv, size;
        int64_t queryWidth() const { return int64_t{query} * size; }
        int64_t width() const { return (query + 2LL * kv) * size; }
    };

    /// The arrays in a workspace. The chunk table is used with delimiter boundaries alone.
    struct Parts {
        int32_t* chunk_starts;  // [T + B]
        int32_t* num_chunks;    // [B]
        int32_t* kept_lengths;  // [B]
        float* chunk_scores;    // [T]
        void* score;            // the score op's own
        size_t bytes;
    };

    Settings settings() const noexcept;
    bool isDelimited() const noexcept { return value(kBoundaries) == CHUNKKV_BOUNDARIES_DELIMITER; }
    bool areSettings() const;
    bool isPowerOfTwo(int32_t field, const char* name) const;

    /// Read host_request_types [B] and host_context_lengths [B], which must describe `tokens` tokens.
    bool readBatch(const void* types, const void* lengths, int64_t rows, int64_t tokens, Batch& batch) const;

    /// The context rows of a batch, by device arrays [B].
    Rows contextRows(const Batch& batch, const void* lengths, const void* row_starts) const;

    /// Check that score has a kernel for these heads; `bytes` of workspace suffice for any batch of up to these sizes.
    bool scoreBytes(const Heads& heads, DataType type, int64_t rows, int64_t tokens, size_t& bytes) const;
    static Parts parts(void* workspace, int64_t rows, int64_t tokens, size_t score_bytes);
    /// The largest size of an axis over a profile and over `inputs`, whose bounds may differ.
    static int64_t largest(const DynamicPluginTensorDesc* in, std::initializer_list<int32_t> inputs, int32_t axis);

    /// Find the delimiter chunks from flags [T].
    bool findChunks(const Rows& rows, const void* is_delimiter, const Parts& parts, void* stream) const;
    /// Score the window queries of packed QKV down to chunk_scores [T].
    bool scoreChunks(const Heads& heads, DataType type, const void* qkv, const Rows& rows, const Parts& parts,
                     float* chunk_scores, void* stream) const;

  private:
    ScoreParams scoreSizes(const Heads& heads, DataType type, int64_t rows, int64_t longest) const;
};

}  // namespace chunkkv::trt
