// ChunkKVSelect: score and select, once per layer group.
//   in   query [B,Hq,w,D], key [B,Hkv,S,D] float32, float16 or bfloat16;
//        lengths, keep_per_10k, budget_tokens [B] int32;
//        with delimiter boundaries is_delimiter [B,S] int32, not 0 = the token ends a chunk
//   out  kept_indices [B,K] int32, -1 behind a row's N; kept_lengths [B] int32; token_scores [B,S] float32
// K = min(S, max_kept), or S where max_kept is 0. N depends on the contents of lengths and budgets, which a shape
// expression cannot read. Set max_kept only where N <= max_kept is certain: a longer list is cut after max_kept
// entries.
#include <algorithm>

#include "chunkkv/budget.h"
#include "plugin_base.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum { kWindow, kChunkSize, kSinks, kBoundaries, kPooling, kScore, kMinTokens, kMaxKept, kFieldCount };

constexpr Field kFields[kFieldCount] = {
    fieldOf(limits::kWindow),    fieldOf(limits::kChunkSize),
    fieldOf(limits::kSinks),     fieldOf(limits::kBoundaries),
    fieldOf(limits::kPooling),   fieldOf(limits::kScore),
    fieldOf(limits::kMinTokens), {"max_kept", 0, CHUNKKV_MAX_LENGTH, 0},
};
static_assert(kFieldCount <= kMaxFields, "FieldValues has room for every field");
constexpr Table kTable{"ChunkKVSelect", kFields, kFieldCount};

enum { kQuery, kKey, kLengths, kKeep, kBudget, kIsDelimiter };
enum { kKeptIndices, kKeptLengths, kTokenScores };
constexpr const char* kInputs[] = {"query", "key", "lengths", "keep_per_10k", "budget_tokens", "is_delimiter"};
constexpr int32_t kRanks[] = {4, 4, 1, 1, 1, 2};

Layout contiguous(const Dims& dims, int64_t element_bytes) {
    Layout layout{};
    layout.stride_token = dims.d[3] * element_bytes;
    layout.stride_head = dims.d[2] * layout.stride_token;
    layout.stride_row = dims.d[1] * layout.stride_head;
    layout.extent = dims.d[2] > 0 ? dims.d[2] : 1;
    return layout;
}

class Select final : public Plugin {
  public:
    Select() noexcept : Plugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    Plugin* copy() const override { return new Select(*this); }
    int32_t inputs() const noexcept override { return isDelimited() ? kIsDelimiter + 1 : kIsDelimiter; }
    int32_t outputs() const noexcept override { return kTokenScores + 1; }
    int32_t rank(int32_t input) const noexcept override { return kRanks[input]; }
    bool isDelimited() const noexcept { return value(kBoundaries) == CHUNKKV_BOUNDARIES_DELIMITER; }

    /// The settings of the fields. Budgets are inputs, one for each row, so that the ratio set here is not used.
    Settings settings() const {
        Settings settings{};
        settings.window = value(kWindow);
        settings.sinks = value(kSinks);
        settings.chunk_size = value(kChunkSize);
        settings.boundaries = value(kBoundaries);
        settings.pooling = value(kPooling);
        settings.score = value(kScore);
        settings.keep_per_10k = static_cast<int32_t>(kKeepScale);
        settings.min_tokens = value(kMinTokens);
        return settings;
    }

    bool checkFields() const override {
        const Settings checked = settings();
        if (chunkkv_max_chunks(&checked, 0) < 0) return fail(chunkkv_last_error());
        if (value(kMaxKept) == 0 || value(kMaxKept) >= value(kMinTokens)) return true;
        return report("%s: max_kept is %d; it must be 0 or at least min_tokens = %d", getPluginName(), value(kMaxKept),
                      value(kMinTokens));
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        if (index == kQuery) return isFloating(types[kQuery]);
        return types[index] == (index == kKey ? types[kQuery] : DataType::kINT32);
    }

    DataType outputType(int32_t index, const DataType*) const override {
        return index == kTokenScores ? DataType::kFLOAT : DataType::kINT32;
    }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const override {
        const IDimensionExpr *batch = in[kKey].d[0], *tokens = in[kKey].d[2];
        const IDimensionExpr* most = builder.constant(value(kMaxKept));
        if (most && value(kMaxKept) > 0) most = builder.operation(DimensionOperation::kMIN, *tokens, *most);
        if (!most) return fail("TensorRT has refused the expression min(S, max_kept)");
        out[kKeptIndices].nbDims = out[kTokenScores].nbDims = 2;
        out[kKeptLengths].nbDims = 1;
        for (int32_t i = 0; i < outputs(); ++i) out[i].d[0] = batch;
        out[kKeptIndices].d[1] = value(kMaxKept) > 0 ? most : tokens;
        out[kTokenScores].d[1] = tokens;
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override {
        const int64_t batch = in[kKey].dims.d[0], tokens = in[kKey].dims.d[2], most = value(kMaxKept);
        out[kKeptIndices] = Dims{2, {batch, most > 0 && most < tokens ? most : tokens}};
        out[kKeptLengths] = Dims{1, {batch}};
        out[kTokenScores] = Dims{2, {batch, tokens}};
    }

    bool check(const PluginTensorDesc* in) const override {
        if (!hasShape(kInputs[kQuery], in[kQuery], {-1, -1, value(kWindow), -1})) return false;
        const int64_t batch = in[kQuery].dims.d[0];
        if (!hasShape(kInputs[kKey], in[kKey], {batch, -1, -1, in[kQuery].dims.d[3]})) return false;
        for (const int32_t i : {kLengths, kKeep, kBudget})
            if (!hasShape(kInputs[i], in[i], {batch})) return false;
        if (isDelimited() && !hasShape(kInputs[kIsDelimiter], in[kIsDelimiter], {batch, in[kKey].dims.d[2]}))
            return false;
        ScoreParams params;
        size_t bytes;
        return scoreParams(in, params) && done(chunkkv_score_workspace(&params, &bytes));
    }

    /// Sizes and settings; layouts and addresses are run()'s.
    bool scoreParams(const PluginTensorDesc* in, ScoreParams& params) const {
        const Dims &query = in[kQuery].dims, &key = in[kKey].dims;
        params = ScoreParams{};
        params.settings = settings();
        params.rows.batch = static_cast<int32_t>(query.d[0]);
        params.rows.max_length = static_cast<int32_t>(key.d[2]);
        params.heads = static_cast<int32_t>(query.d[1]);
        params.kv_heads = static_cast<int32_t>(key.d[1]);
        params.head_dim = static_cast<int32_t>(key.d[3]);
        params.query_dtype = params.key_dtype = storageType(in[kKey].type);
        params.query_is_window = 1;
        // Any address but NULL: the workspace is larger where token scores are written. run() sets the real address.
        params.token_scores = reinterpret_cast<float*>(kAlignment);
        const int64_t chunks = chunkkv_max_chunks(&params.settings, params.rows.max_length);
        params.max_chunks = static_cast<int32_t>(chunks);
        return chunks >= 0 || fail(chunkkv_last_error());
    }

    /// The workspace: score's own, then the chunk table.
    struct Parts {
        size_t scores, starts, counts, bytes;
    };

    static Parts parts(const ScoreParams& params, size_t score_bytes) {
        const size_t batch = params.rows.batch, chunks = params.max_chunks;
        Parts parts{};
        parts.scores = aligned(score_bytes);
        parts.starts = parts.scores + aligned(batch * chunks * sizeof(float));
        parts.counts = parts.starts + aligned(batch * (chunks + 1) * sizeof(int32_t));
        parts.bytes = parts.counts + aligned(batch * sizeof(int32_t));
        return parts;
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc* in) const override {
        PluginTensorDesc largest[kKey + 1] = {in[kQuery].desc, in[kKey].desc};
        largest[kQuery].dims = in[kQuery].opt;  // heads and head size are constants of the network
        largest[kKey].dims = in[kKey].opt;
        // The bounds of the inputs may differ. Take the largest: with too little workspace a kernel would write past
        // its end.
        int64_t &batch = largest[kQuery].dims.d[0], &tokens = largest[kKey].dims.d[2];
        for (int32_t i = 0; i < inputs(); ++i) batch = std::max({batch, in[i].opt.d[0], in[i].max.d[0]});
        tokens = std::max(tokens, in[kKey].max.d[2]);
        if (isDelimited()) tokens = std::max(tokens, in[kIsDelimiter].max.d[1]);
        batch = std::min<int64_t>(batch, CHUNKKV_MAX_BATCH);
        tokens = std::min<int64_t>(tokens, CHUNKKV_MAX_LENGTH);
        ScoreParams params;
        size_t bytes = 0;
        const bool known = scoreParams(largest, params) && done(chunkkv_score_workspace(&params, &bytes));
        return known ? parts(params, bytes).bytes : 0;
    }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc* out, const Buffers& buffers) const override {
        ScoreParams score;
        size_t score_bytes = 0;
        if (!scoreParams(in, score) || !done(chunkkv_score_workspace(&score, &score_bytes))) return false;
        if (score.rows.batch == 0) return true;
        score.rows.lengths = static_cast<const int32_t*>(buffers.inputs[kLengths]);
        score.rows.keep_per_10k = static_cast<const int32_t*>(buffers.inputs[kKeep]);
        score.rows.budget_tokens = static_cast<const int32_t*>(buffers.inputs[kBudget]);
        const Parts part = parts(score, score_bytes);
        char* workspace = static_cast<char*>(buffers.workspace);
        if (!workspace) return fail("the workspace is NULL");
        score.query_layout = contiguous(in[kQuery].dims, elementBytes(in[kQuery].type));
        score.key_layout = contiguous(in[kKey].dims, elementBytes(in[kKey].type));
        score.query = buffers.inputs[kQuery];
        score.key = buffers.inputs[kKey];
        score.token_scores = static_cast<float*>(buffers.outputs[kTokenScores]);
        score.chunk_scores = reinterpret_cast<float*>(workspace + part.scores);
        if (isDelimited()) {
            int32_t* starts = reinterpret_cast<int32_t*>(workspace + part.starts);
            int32_t* counts = reinterpret_cast<int32_t*>(workspace + part.counts);
            if (!runBoundaries(score, static_cast<const int32_t*>(buffers.inputs[kIsDelimiter]), starts, counts,
                               buffers.stream))
                return false;
            score.chunk_starts = starts;
            score.num_chunks = counts;
        }
        if (score.rows.max_length > 0 && !done(chunkkv_score(&score, workspace, score_bytes, buffers.stream)))
            return false;
        return runSelect(score, static_cast<int32_t>(out[kKeptIndices].dims.d[1]), buffers);
    }

    bool runBoundaries(const ScoreParams& score, const int32_t* is_delimiter, int32_t* starts, int32_t* counts,
                       void* stream) const {
        BoundariesParams params{};
        params.settings = score.settings;
        params.rows = score.rows;
        params.token_ids = is_delimiter;  // flags, because there is no bitmap
        params.max_chunks = score.max_chunks;
        params.chunk_starts = starts;
        params.num_chunks = counts;
        return done(chunkkv_boundaries(&params, stream));
    }

    bool runSelect(const ScoreParams& score, int32_t max_kept, const Buffers& buffers) const {
        SelectParams params{};
        params.settings = score.settings;
        params.rows = score.rows;
        params.chunk_scores = score.chunk_scores;
        params.chunk_starts = score.chunk_starts;
        params.num_chunks = score.num_chunks;
        params.kept_indices = static_cast<int32_t*>(buffers.outputs[kKeptIndices]);
        params.kept_lengths = static_cast<int32_t*>(buffers.outputs[kKeptLengths]);
        params.max_chunks = score.max_chunks;
        params.max_kept = max_kept;
        return done(chunkkv_select(&params, buffers.stream));
    }
};

}  // namespace

IPluginCreatorInterface* selectCreator() {
    static Creator<Select> creator;
    return &creator;
}

}  // namespace chunkkv::trt
