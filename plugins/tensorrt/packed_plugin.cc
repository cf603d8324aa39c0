#include "packed_plugin.h"

#include <algorithm>

using namespace nvinfer1;

namespace chunkkv::trt {

Settings PackedPlugin::settings() const noexcept {
    Settings settings{};
    settings.window = value(kWindow);
    settings.sinks = value(kSinks);
    settings.chunk_size = value(kChunkSize);
    settings.boundaries = value(kBoundaries);
    settings.pooling = value(kPooling);
    settings.score = value(kScore);
    settings.window_reduce = value(kWindowReduce);
    settings.head_reduce = value(kHeadReduce);
    settings.value_norm = value(kValueNorm);
    settings.keep_per_10k = value(kKeepPer10k);
    settings.budget_tokens = value(kBudgetTokens);
    settings.min_tokens = value(kMinTokens);
    return settings;
}

bool PackedPlugin::areSettings() const {
    const Settings checked = settings();
    if (checked.score == CHUNKKV_SCORE_GIVEN)
        return fail("score is given; a packed batch has no scores from outside: use softmax or logits");
    return chunkkv_max_chunks(&checked, value(kMaxLength)) >= 0 || fail(chunkkv_last_error());
}

bool PackedPlugin::isPowerOfTwo(int32_t field, const char* name) const {
    if ((value(field) & (value(field) - 1)) == 0) return true;
    return report("%s: %s is %d; it must be a power of two", getPluginName(), name, value(field));
}

bool PackedPlugin::readBatch(const void* types, const void* lengths, int64_t rows, int64_t tokens, Batch& batch) const {
    constexpr int32_t kContext = 0, kGeneration = 1;
    batch = Batch{static_cast<int32_t>(rows), 0, 0, false, tokens};
    if (rows > 0 && (!types || !lengths)) return fail("host_request_types or host_context_lengths is NULL");
    const Settings budget = settings();
    int64_t used = 0;
    for (int32_t row = 0; row < batch.rows; ++row) {
        const int32_t type = static_cast<const int32_t*>(types)[row];
        const int32_t length = static_cast<const int32_t*>(lengths)[row];
        if (type != kContext && type != kGeneration)
            return report("%s: host_request_types of row %d is %d; allowed are 0 (context) and 1 (generation)",
                          getPluginName(), row, type);
        if (type == kGeneration) {
            ++used;
            continue;
        }
        if (batch.contexts < row)
            return report("%s: row %d is a context row behind a generation row; put context rows first",
                          getPluginName(), row);
        if (length < 1 || length > value(kMaxLength))
            return report("%s: row %d has a prompt of %d tokens; allowed is 1 to %d, the max_length of the plugin",
                          getPluginName(), row, length, value(kMaxLength));
        ++batch.contexts;
        used += length;
        batch.longest = std::max(batch.longest, length);
        batch.compresses |= keptTokens(budget, length, budget.keep_per_10k, budget.budget_tokens) < length;
    }
    if (used == tokens) return true;
    return report(
        "%s: the rows have %lld tokens, the packed tensors %lld; use remove_input_padding, without speculative "
        "decoding",
        getPluginName(), static_cast<long long>(used), static_cast<long long>(tokens));
}

Rows PackedPlugin::contextRows(const Batch& batch, const void* lengths, const void* row_starts) const {
    Rows rows{};
    rows.lengths = static_cast<const int32_t*>(lengths);
    rows.row_starts = static_cast<const int32_t*>(row_starts);
    rows.num_tokens = batch.tokens;
    rows.batch = batch.contexts;
    rows.max_length = batch.longest;
    return rows;
}

ScoreParams PackedPlugin::scoreSizes(const Heads& heads, DataType type, int64_t rows, int64_t longest) const {
    ScoreParams params{};
    params.settings = settings();
    params.rows.batch = static_cast<int32_t>(std::min<int64_t>(rows, CHUNKKV_MAX_BATCH));
    params.rows.max_length = static_cast<int32_t>(longest);
    params.heads = heads.query;
    params.kv_heads = heads.kv;
    params.head_dim = heads.size;
    params.query_dtype = params.key_dtype = storageType(type);
    params.max_chunks = maxChunks(params.settings, longest);
    return params;
}

bool PackedPlugin::scoreBytes(const Heads& heads, DataType type, int64_t rows, int64_t tokens, size_t& bytes) const {
    const int64_t longest = std::min<int64_t>(tokens, value(kMaxLength));
    const ScoreParams params = scoreSizes(heads, type, std::min(rows, tokens), longest);
    return done(chunkkv_score_workspace(&params, &bytes));
}

PackedPlugin::Parts PackedPlugin::parts(void* workspace, int64_t rows, int64_t tokens, size_t score_bytes) {
    uintptr_t end = reinterpret_cast<uintptr_t>(workspace);
    const auto take = [&end](size_t bytes) {
        const uintptr_t start = end;
        end += aligned(bytes);
        return reinterpret_cast<void*>(start);
    };
    Parts parts{};
    parts.chunk_starts = static_cast<int32_t*>(take((tokens + rows) * sizeof(int32_t)));
    parts.num_chunks = static_cast<int32_t*>(take(rows * sizeof(int32_t)));
    parts.kept_lengths = static_cast<int32_t*>(take(rows * sizeof(int32_t)));
    parts.chunk_scores = static_cast<float*>(take(tokens * sizeof(float)));
    parts.score = take(score_bytes);
    parts.bytes = end - reinterpret_cast<uintptr_t>(workspace);
    return parts;
}

int64_t PackedPlugin::largest(const DynamicPluginTensorDesc* in, std::initializer_list<int32_t> inputs, int32_t axis) {
    int64_t most = 0;
    for (const int32_t i : inputs) most = std::max({most, in[i].opt.d[axis], in[i].max.d[axis]});
    return std::min<int64_t>(most, INT32_MAX);
}

bool PackedPlugin::findChunks(const Rows& rows, const void* is_delimiter, const Parts& parts, void* stream) const {
    BoundariesParams params{};
    params.settings = settings();
    params.rows = rows;
    params.token_ids = static_cast<const int32_t*>(is_delimiter);  // flags, because there is no bitmap
    params.max_chunks = maxChunks(params.settings, rows.max_length);
    params.chunk_starts = parts.chunk_starts;
    params.num_chunks = parts.num_chunks;
    return done(chunkkv_boundaries(&params, stream));
}

bool PackedPlugin::scoreChunks(const Heads& heads, DataType type, const void* qkv, const Rows& rows, const Parts& parts,
                               float* chunk_scores, void* stream) const {
    ScoreParams params = scoreSizes(heads, type, rows.batch, rows.max_length);
    params.rows = rows;
    params.query_layout.row_starts = rows.row_starts;
    params.query_layout.stride_token = heads.width() * elementBytes(type);
    params.query_layout.stride_head = heads.size * elementBytes(type);
    params.query_layout.extent = rows.num_tokens;
    params.key_layout = params.query_layout;
    params.query = qkv;
    params.key = static_cast<const char*>(qkv) + heads.queryWidth() * elementBytes(type);
    if (params.settings.value_norm != 0) {
        params.value_layout = params.key_layout;
        params.value = static_cast<const char*>(params.key) + int64_t{heads.kv} * heads.size * elementBytes(type);
    }
    params.chunk_scores = chunk_scores;
    if (isDelimited()) {
        params.chunk_starts = parts.chunk_starts;
        params.num_chunks = parts.num_chunks;
    }
    size_t bytes = 0;
    return done(chunkkv_score_workspace(&params, &bytes)) && done(chunkkv_score(&params, parts.score, bytes, stream));
}

}  // namespace chunkkv::trt
