// What every op accepts: checks of the parameter structs, and the message of the last failure on each thread.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <iterator>

#include "chunkkv/chunkkv.h"
#include "chunkkv/layout.h"
#include "chunkkv/limits.h"

namespace chunkkv {

/// The last failure of this thread; a fixed buffer, so that reporting one cannot fail itself.
struct Failure {
    chunkkv_status status = CHUNKKV_OK;
    char text[512] = "";
};
inline thread_local Failure failure;
inline thread_local const char* current_op = "";

__attribute__((format(printf, 2, 3))) inline bool fail(chunkkv_status status, const char* format, ...) {
    failure.status = status;
    const int used = std::snprintf(failure.text, sizeof(failure.text), "%s: ", current_op);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(failure.text + used, sizeof(failure.text) - used, format, arguments);
    va_end(arguments);
    return false;
}

/// Checks return true, or describe the failure and return false.
inline bool inRange(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return true;
    return fail(CHUNKKV_INVALID_ARGUMENT, "%s is %lld; allowed is %lld to %lld", name, static_cast<long long>(value),
                static_cast<long long>(low), static_cast<long long>(high));
}

inline bool isAllowed(const limits::Setting& setting, int64_t value) {
    return inRange(setting.name, value, setting.low, setting.high);
}

inline bool isGiven(const char* name, const void* pointer) {
    return pointer ? true : fail(CHUNKKV_INVALID_ARGUMENT, "%s is NULL; pass a device pointer", name);
}

inline bool atLeast(const char* name, int64_t value, int64_t least, const char* why) {
    if (value >= least) return true;
    return fail(CHUNKKV_INVALID_ARGUMENT, "%s is %lld; it must be at least %lld, %s", name,
                static_cast<long long>(value), static_cast<long long>(least), why);
}

// The kernels tell exactly these words apart: boundaries.cu and chunks.cuh those of boundaries, budget.h and select.cu
// those of classes, score*.cu and score*.cuh those of scores. A word is added to limits.py's KERNEL_CHOICES together
// with its branches there.
static_assert(limits::kMaxLength == CHUNKKV_MAX_LENGTH, "the C ABI says the same");
static_assert(std::size(limits::kBoundariesWords) == 2 && std::size(limits::kScoreWords) == 3 &&
                  std::size(limits::kWindowReduceWords) == 2 && std::size(limits::kHeadReduceWords) == 2 &&
                  std::size(limits::kValueNormWords) == 2 && std::size(limits::kHeadsWords) == 2 &&
                  std::size(limits::kBudgetSplitWords) == 2 && std::size(limits::kLocalPolicyWords) == 2,
              "write the kernels' branches for a new word first");

inline bool checkClasses(const Settings& s) {
    if (s.budget_split == CHUNKKV_SPLIT_UNIFORM) return true;
    return inRange("head_class", s.head_class, CHUNKKV_CLASS_READING, CHUNKKV_CLASS_LOCAL) &&
           isAllowed(limits::kLocalPolicy, s.local_policy) &&
           isAllowed(limits::kReadingSharePer10k, s.reading_share_per_10k) &&
           inRange("all_heads", s.all_heads, 1, 1 << 24) &&
           inRange("all_reading_heads", s.all_reading_heads, 0, s.all_heads);
}

inline bool checkSettings(const Settings& s) {
    if (!(isAllowed(limits::kWindow, s.window) && isAllowed(limits::kSinks, s.sinks) &&
          isAllowed(limits::kChunkSize, s.chunk_size) && isAllowed(limits::kBoundaries, s.boundaries) &&
          isAllowed(limits::kPooling, s.pooling) && isAllowed(limits::kScore, s.score) &&
          isAllowed(limits::kWindowReduce, s.window_reduce) && isAllowed(limits::kHeadReduce, s.head_reduce) &&
          isAllowed(limits::kValueNorm, s.value_norm) && isAllowed(limits::kHeads, s.heads) &&
          isAllowed(limits::kKeepPer10k, s.keep_per_10k) && isAllowed(limits::kBudgetTokens, s.budget_tokens) &&
          isAllowed(limits::kBudgetSplit, s.budget_split) && checkClasses(s)))
        return false;
    if (s.score != CHUNKKV_SCORE_SOFTMAX && (s.window_reduce || s.head_reduce || s.value_norm))
        return fail(CHUNKKV_INVALID_ARGUMENT,
                    "window_reduce, head_reduce and value_norm are %d, %d and %d with score %s; they act on attention "
                    "weights: leave them 0, or use score softmax",
                    s.window_reduce, s.head_reduce, s.value_norm, limits::kScoreWords[s.score]);
    if (s.pooling % 2 == 0)
        return fail(CHUNKKV_INVALID_ARGUMENT, "pooling is %d; allowed are odd values (1 = off)", s.pooling);
    return atLeast("min_tokens", s.min_tokens, int64_t{s.window} + s.sinks + s.chunk_size,
                   "window + sinks + chunk_size");
}

inline bool checkRowSizes(const Rows& rows) {
    return inRange("batch", rows.batch, 0, CHUNKKV_MAX_BATCH) &&
           inRange("max_length", rows.max_length, 0, CHUNKKV_MAX_LENGTH) &&
           (!rows.row_starts || inRange("num_tokens", rows.num_tokens, 1, INT32_MAX));
}

inline bool checkRows(const Rows& rows) {
    return checkRowSizes(rows) && (rows.batch == 0 || isGiven("lengths", rows.lengths));
}

/// `tokens` is the most tokens of a row, for which the layout must have room; `row_bytes` the bytes of the D elements
/// of one head of one token.
inline bool checkLayout(const char* name, const Layout& layout, int64_t tokens, int64_t row_bytes) {
    char text[64];
    const auto field = [&](const char* member) {
        std::snprintf(text, sizeof(text), "%s.%s", name, member);
        return text;
    };
    if (layout.block_offsets && layout.row_starts)
        return fail(CHUNKKV_INVALID_ARGUMENT,
                    "%s has block_offsets and row_starts; a layout is paged or packed, not both", name);
    if (!(atLeast(field("stride_token"), layout.stride_token, row_bytes, "the bytes of one head of one token") &&
          inRange(field("stride_head"), layout.stride_head, 0, INT64_MAX)))
        return false;
    if (layout.row_starts) return inRange(field("extent"), layout.extent, 1, INT64_MAX);
    if (!layout.block_offsets)
        return inRange(field("stride_row"), layout.stride_row, 0, INT64_MAX) &&
               atLeast(field("extent"), layout.extent, tokens > 1 ? tokens : 1, "the tokens a row may hold");
    const int64_t block = layout.tokens_per_block;
    if (block < 1 || (block & (block - 1)) != 0)
        return fail(CHUNKKV_INVALID_ARGUMENT, "%s.tokens_per_block is %d; it must be a power of two", name,
                    layout.tokens_per_block);
    return atLeast(field("stride_block"), layout.stride_block, block * layout.stride_token, "one head of one block") &&
           inRange(field("extent"), layout.extent, 1, INT64_MAX) &&
           inRange(field("max_blocks"), layout.max_blocks, 1, INT32_MAX) &&
           atLeast(field("max_blocks * tokens_per_block"), layout.max_blocks * block, tokens,
                   "the tokens a row may hold");
}

/// Check max_chunks, the entries that a row has in the chunk table, and the table, which boundaries writes and score
/// and select read.
inline bool checkChunks(const Settings& settings, const Rows& rows, int32_t max_chunks, const int32_t* starts,
                        const int32_t* counts) {
    if (!atLeast("max_chunks", max_chunks, maxChunks(settings, rows.max_length), "chunkkv_max_chunks() of max_length"))
        return false;
    const bool delimiter = settings.boundaries == CHUNKKV_BOUNDARIES_DELIMITER;
    if (rows.batch > 0 && delimiter) return isGiven("chunk_starts", starts) && isGiven("num_chunks", counts);
    if (!delimiter && (starts || counts))
        return fail(CHUNKKV_INVALID_ARGUMENT,
                    "boundaries is fixed, but chunk_starts or num_chunks is given; pass NULL for both");
    return true;
}

/// The kernels copy 16 bytes at a time (cp.async), so every head of every token must begin at a multiple of 16 bytes.
inline bool isAligned(const char* name, const void* base, const Layout& layout) {
    const int64_t outer = layout.block_offsets ? layout.stride_block : layout.row_starts ? 0 : layout.stride_row;
    if (reinterpret_cast<uintptr_t>(base) % 16 == 0 && (layout.stride_token | layout.stride_head | outer) % 16 == 0)
        return true;
    return fail(
        CHUNKKV_INVALID_ARGUMENT,
        "%s is at %p with strides %lld (token), %lld (head) and %lld (row or block); all must be multiples of 16", name,
        base, static_cast<long long>(layout.stride_token), static_cast<long long>(layout.stride_head),
        static_cast<long long>(outer));
}

inline int64_t elementBytes(int32_t dtype) {
    return dtype == CHUNKKV_FLOAT32 ? 4 : dtype == CHUNKKV_FLOAT16 || dtype == CHUNKKV_BFLOAT16 ? 2 : 1;
}

inline bool isFloating(const char* name, int32_t dtype) {
    if (dtype >= CHUNKKV_FLOAT32 && dtype <= CHUNKKV_BFLOAT16) return true;
    return fail(CHUNKKV_UNSUPPORTED, "%s is %d; there are kernels for float32 (0), float16 (1) and bfloat16 (2)", name,
                dtype);
}

inline bool isHeadSize(int32_t head_dim) {
    char sizes[64] = "";
    int used = 0;
    for (const int32_t size : limits::kHeadSizes) {
        if (head_dim == size) return true;
        used += std::snprintf(sizes + used, sizeof(sizes) - used, "%s%d", used ? ", " : "", size);
    }
    return fail(CHUNKKV_UNSUPPORTED, "head_dim is %d; there are kernels for %s", head_dim, sizes);
}

inline bool isScoreKernel(int32_t query_dtype, int32_t key_dtype, int32_t head_dim, int32_t group) {
    if (!(isFloating("query_dtype", query_dtype) && isHeadSize(head_dim))) return false;
    if (key_dtype != query_dtype && key_dtype != CHUNKKV_INT8 && key_dtype != CHUNKKV_FP8_E4M3)
        return fail(CHUNKKV_UNSUPPORTED,
                    "key_dtype is %d with query_dtype %d; both must be equal, or keys int8 (3) or fp8 (4)", key_dtype,
                    query_dtype);
    if (group < 1 || group > limits::kMaxGroup)
        return fail(CHUNKKV_UNSUPPORTED, "heads / kv_heads is %d; allowed is 1 to %d", group, limits::kMaxGroup);
    return true;
}

inline bool isRopeHead(int32_t head_dim) {
    if (head_dim >= 2 && head_dim <= 256 && head_dim % 2 == 0) return true;
    return fail(CHUNKKV_UNSUPPORTED, "head_dim is %d; allowed are even values from 2 to 256", head_dim);
}

inline bool checkScoreShape(const ScoreParams& p) {
    if (!(checkSettings(p.settings) && checkRowSizes(p.rows) && inRange("heads", p.heads, 1, CHUNKKV_MAX_HEADS) &&
          inRange("kv_heads", p.kv_heads, 1, p.heads) && inRange("query_is_window", p.query_is_window, 0, 1)))
        return false;
    if (p.heads % p.kv_heads != 0)
        return fail(CHUNKKV_INVALID_ARGUMENT, "heads is %d, kv_heads is %d; heads must be a multiple of kv_heads",
                    p.heads, p.kv_heads);
    if (p.kv_head_numbers && !inRange("all_kv_heads", p.all_kv_heads, 1, CHUNKKV_MAX_HEADS)) return false;
    if (!atLeast("max_chunks", p.max_chunks, maxChunks(p.settings, p.rows.max_length),
                 "chunkkv_max_chunks() of max_length"))
        return false;
    return p.settings.score == CHUNKKV_SCORE_GIVEN ||
           isScoreKernel(p.query_dtype, p.key_dtype, p.head_dim, p.heads / p.kv_heads);
}

inline bool checkScore(const ScoreParams& p) {
    if (!(checkScoreShape(p) && checkRows(p.rows) &&
          checkChunks(p.settings, p.rows, p.max_chunks, p.chunk_starts, p.num_chunks)))
        return false;
    const bool given = p.settings.score == CHUNKKV_SCORE_GIVEN, norms = p.settings.value_norm != 0;
    if (!given && p.given_scores)
        return fail(CHUNKKV_INVALID_ARGUMENT, "given_scores is given, but score is %s; pass NULL, or use score given",
                    limits::kScoreWords[p.settings.score]);
    if (!norms && p.value)
        return fail(CHUNKKV_INVALID_ARGUMENT, "value is given, but value_norm is 0; pass NULL, or use value_norm 1");
    if (p.rows.batch == 0) return true;
    if (p.max_chunks > 0 && !isGiven("chunk_scores", p.chunk_scores)) return false;
    if (given) return p.rows.max_length == 0 || isGiven("given_scores", p.given_scores);
    if (p.query_layout.block_offsets)
        return fail(CHUNKKV_INVALID_ARGUMENT, "query_layout is paged; queries lie in a contiguous or packed tensor");
    if (norms && !(isGiven("value", p.value) &&
                   checkLayout("value_layout", p.value_layout, p.rows.max_length,
                               p.head_dim * elementBytes(p.key_dtype)) &&
                   isAligned("value", p.value, p.value_layout)))
        return false;
    const int64_t queries = p.query_is_window ? p.settings.window : p.rows.max_length;
    return isGiven("query", p.query) && isGiven("key", p.key) &&
           checkLayout("query_layout", p.query_layout, queries, p.head_dim * elementBytes(p.query_dtype)) &&
           checkLayout("key_layout", p.key_layout, p.rows.max_length, p.head_dim * elementBytes(p.key_dtype)) &&
           isAligned("query", p.query, p.query_layout) && isAligned("key", p.key, p.key_layout);
}

inline bool checkBoundaries(const BoundariesParams& p) {
    if (!(checkSettings(p.settings) && checkRows(p.rows))) return false;
    if (p.settings.boundaries != CHUNKKV_BOUNDARIES_DELIMITER)
        return fail(CHUNKKV_INVALID_ARGUMENT, "boundaries is fixed; this op is for delimiter chunks");
    return checkChunks(p.settings, p.rows, p.max_chunks, p.chunk_starts, p.num_chunks) &&
           inRange("vocab_size", p.vocab_size, 0, INT32_MAX) &&
           (p.vocab_size == 0 || isGiven("delimiter_bitmap", p.delimiter_bitmap)) &&
           (p.rows.batch == 0 || p.rows.max_length == 0 || isGiven("token_ids", p.token_ids));
}

inline bool checkSelect(const SelectParams& p) {
    if (!(checkSettings(p.settings) && checkRows(p.rows) &&
          (keepsRecent(p.settings) || checkChunks(p.settings, p.rows, p.max_chunks, p.chunk_starts, p.num_chunks))))
        return false;
    // N grows with L, so N of max_length is the largest. Budgets per row lie in device memory, which the host cannot
    // read: then it is for the caller to pass a max_kept that suffices.
    const bool same_budget = !p.rows.keep_per_10k && !p.rows.budget_tokens;
    const Settings& s = p.settings;
    if (!inRange("choices", p.choices, 1, s.heads == CHUNKKV_HEADS_EACH ? CHUNKKV_MAX_HEADS : 1)) return false;
    const int64_t most = same_budget ? keptTokens(s, p.rows.max_length, s.keep_per_10k, s.budget_tokens) : 0;
    return atLeast("max_kept", p.max_kept, most, "N of max_length") &&
           (p.rows.batch == 0 ||
            (isGiven("kept_lengths", p.kept_lengths) && (p.max_kept == 0 || isGiven("kept_indices", p.kept_indices)) &&
             (p.max_chunks == 0 || keepsRecent(s) || isGiven("chunk_scores", p.chunk_scores))));
}

inline bool checkCompact(const CompactParams& p) {
    const bool every_slot = p.kept_lengths == nullptr;
    if (!((every_slot ? checkRowSizes(p.rows) : checkRows(p.rows)) &&
          inRange("num_layers", p.num_layers, 1, INT32_MAX) && inRange("kv_heads", p.kv_heads, 1, CHUNKKV_MAX_HEADS) &&
          inRange("row_bytes", p.row_bytes, 1, 4096) && inRange("max_kept", p.max_kept, 0, INT32_MAX)))
        return false;
    if (p.kv_head_numbers && !inRange("all_kv_heads", p.all_kv_heads, 1, CHUNKKV_MAX_HEADS)) return false;
    if (p.choices != 1 && p.choices != p.kv_heads)
        return fail(CHUNKKV_INVALID_ARGUMENT,
                    "choices is %d with kv_heads %d; pass 1, or kv_heads for indices per head", p.choices, p.kv_heads);
    if (!p.layers) return fail(CHUNKKV_INVALID_ARGUMENT, "layers is NULL; pass a host array of num_layers entries");
    if (p.rows.batch == 0) return true;
    const bool in_place = p.layers[0].key_out == nullptr;
    for (int32_t i = 0; i < p.num_layers; ++i) {
        const Layer& layer = p.layers[i];
        if (!(isGiven("layers[].key", layer.key) && isGiven("layers[].value", layer.value))) return false;
        if ((layer.key_out == nullptr) != in_place || (layer.value_out == nullptr) != in_place)
            return fail(CHUNKKV_INVALID_ARGUMENT,
                        "layers[%d] sets key_out or value_out unlike layers[0].key_out; "
                        "pass both for every layer (out of place) or none (in place)",
                        i);
    }
    if (every_slot && p.rows.row_starts)
        return fail(CHUNKKV_INVALID_ARGUMENT, "kept_lengths is NULL with row_starts; pass it, or padded arrays");
    if (every_slot && in_place)
        return fail(CHUNKKV_INVALID_ARGUMENT, "kept_lengths is NULL in place; pass it, or outputs of their own");
    const int64_t most = every_slot || p.max_kept < p.rows.max_length ? p.max_kept : p.rows.max_length;
    return (p.max_kept == 0 || isGiven("kept_indices", p.kept_indices)) &&
           checkLayout("layout", p.layout, p.rows.max_length, p.row_bytes) &&
           (in_place || checkLayout("layout_out", p.layout_out, most, p.row_bytes));
}

inline bool checkRope(const RopeParams& p) {
    if (!(inRange("num_tokens", p.num_tokens, 0, INT32_MAX) && inRange("heads", p.heads, 1, CHUNKKV_MAX_HEADS) &&
          inRange("kv_heads", p.kv_heads, 1, CHUNKKV_MAX_HEADS) && isRopeHead(p.head_dim) &&
          inRange("rotary_dim", p.rotary_dim, 2, p.head_dim) && inRange("style", p.style, 0, 1) &&
          inRange("max_positions", p.max_positions, 1, INT32_MAX) && isFloating("dtype", p.dtype)))
        return false;
    if (p.rotary_dim % 2 != 0) return fail(CHUNKKV_INVALID_ARGUMENT, "rotary_dim is %d; it must be even", p.rotary_dim);
    if (p.num_tokens == 0) return true;
    if (!(isGiven("qkv", p.qkv) && isGiven("qkv_out", p.qkv_out) && isGiven("positions", p.positions) &&
          isGiven("cos_sin", p.cos_sin)))
        return false;
    if (reinterpret_cast<uintptr_t>(p.cos_sin) % 8 != 0)
        return fail(CHUNKKV_INVALID_ARGUMENT, "cos_sin is not aligned to 8 bytes, one pair; pass a table that is");
    return true;
}

inline bool checkPrepare(const PrepareParams& p) {
    if (!(checkSettings(p.settings) && inRange("batch", p.batch, 0, CHUNKKV_MAX_BATCH) &&
          inRange("contexts", p.contexts, 0, p.batch) && inRange("max_length", p.max_length, 0, CHUNKKV_MAX_LENGTH)))
        return false;
    const bool delimiters = p.is_delimiter != nullptr;
    if (!delimiters && (p.token_ids || p.delimiter_bitmap || p.vocab_size != 0))
        return fail(CHUNKKV_INVALID_ARGUMENT,
                    "is_delimiter is NULL, but token_ids, delimiter_bitmap or vocab_size is given; pass all or none");
    if (p.batch == 0) return true;
    return inRange("num_tokens", p.num_tokens, 1, INT32_MAX) && isGiven("sequence_lengths", p.sequence_lengths) &&
           isGiven("context_lengths", p.context_lengths) && isGiven("attention_lengths", p.attention_lengths) &&
           isGiven("kept_lengths", p.kept_lengths) && isGiven("row_starts", p.row_starts) &&
           isGiven("positions", p.positions) &&
           (!delimiters || (isGiven("token_ids", p.token_ids) && isGiven("delimiter_bitmap", p.delimiter_bitmap) &&
                            inRange("vocab_size", p.vocab_size, 1, INT32_MAX)));
}

inline bool checkCopy(const void* to, const void* from, size_t bytes) {
    if (bytes == 0) return true;
    if (!(isGiven("to", to) && isGiven("from", from))) return false;
    const auto a = reinterpret_cast<uintptr_t>(to), b = reinterpret_cast<uintptr_t>(from);
    if (a == b || (a > b ? a - b : b - a) >= bytes) return true;
    return fail(CHUNKKV_INVALID_ARGUMENT, "to %p and from %p overlap in %zu bytes; pass ranges of their own", to, from,
                bytes);
}

}  // namespace chunkkv
