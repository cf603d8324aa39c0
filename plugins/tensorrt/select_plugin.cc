// ChunkKVSelect: score and select, once per layer group, or per head class of it.
//   in   query [B,Hq,W,D], key [B,Hkv,S,D] float32, float16 or bfloat16; with score = given instead of both
//        scores [B,C,S] float32 ([B,S] with heads = shared); lengths, keep_per_10k, budget_tokens [B] int32;
//        with delimiter boundaries is_delimiter [B,S] int32, not 0 = the token ends a chunk;
//        with request_window window [B] int32, how many of the W queries score; with value_norm = on
//        value [B,Hkv,S,D] of key's type
//   out  kept_indices [B,K] int32, -1 behind a row's N; kept_lengths [B] int32; token_scores [B,S] float32; with
//        heads = each kept_indices [B,Hkv,K] and token_scores [B,Hkv,S]
// K = min(S, max_kept), or S where max_kept is 0. N depends on the contents of lengths and budgets, which a shape
// expression cannot read. Set max_kept only where N <= max_kept is certain: a longer list is cut after max_kept
// entries.
#include <algorithm>

#include "chunkkv/budget.h"
#include "plugin_base.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum {
    kWindow,
    kChunkSize,
    kSinks,
    kBoundaries,
    kPooling,
    kScore,
    kMinTokens,
    kMaxKept,
    kWindowReduce,
    kHeadReduce,
    kValueNorm,
    kHeads,
    kRequestWindow,
    kHeadClass,
    kAllHeads,
    kAllReadingHeads,
    kReadingShare,
    kFieldCount
};
enum { kAllClasses, kReading, kLocal };
constexpr const char* kClassWords[] = {"all", "reading", "local"};

constexpr Field kFields[kFieldCount] = {
    fieldOf(limits::kWindow),
    fieldOf(limits::kChunkSize),
    fieldOf(limits::kSinks),
    fieldOf(limits::kBoundaries),
    fieldOf(limits::kPooling),
    fieldOf(limits::kScore),
    fieldOf(limits::kMinTokens),
    {"max_kept", 0, CHUNKKV_MAX_LENGTH, 0},
    fieldOf(limits::kWindowReduce, CHUNKKV_REDUCE_MEAN),
    fieldOf(limits::kHeadReduce, CHUNKKV_REDUCE_MEAN),
    fieldOf(limits::kValueNorm, 0),
    fieldOf(limits::kHeads, CHUNKKV_HEADS_SHARED),
    {"request_window", 0, 1, 0},
    {"head_class", kAllClasses, kLocal, kAllClasses, kClassWords},
    {"all_heads", 0, 1 << 24, 0},
    {"all_reading_heads", 0, 1 << 24, 0},
    fieldOf(limits::kReadingSharePer10k, static_cast<int32_t>(kKeepScale)),
};
static_assert(kFieldCount <= kMaxFields, "FieldValues has room for every field");
constexpr Table kTable{"ChunkKVSelect", kFields, kFieldCount};

enum Input { kQuery, kKey, kScores, kLengths, kKeep, kBudget, kIsDelimiter, kRequested, kValue, kInputCount };
enum { kKeptIndices, kKeptLengths, kTokenScores };
constexpr const char* kInputs[] = {"query",         "key",          "scores", "lengths", "keep_per_10k",
                                   "budget_tokens", "is_delimiter", "window", "value"};

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
    int32_t outputs() const noexcept override { return kTokenScores + 1; }
    bool isDelimited() const noexcept { return value(kBoundaries) == CHUNKKV_BOUNDARIES_DELIMITER; }
    bool isGiven() const noexcept { return value(kScore) == CHUNKKV_SCORE_GIVEN; }
    bool isEach() const noexcept { return value(kHeads) == CHUNKKV_HEADS_EACH; }

    bool has(int32_t input) const noexcept {
        if (input == kQuery || input == kKey) return !isGiven();
        if (input == kScores) return isGiven();
        if (input == kIsDelimiter) return isDelimited();
        if (input == kRequested) return value(kRequestWindow) != 0;
        return input != kValue || value(kValueNorm) != 0;
    }
    int32_t inputs() const noexcept override { return place(kInputCount); }
    /// Where an input is among those that the node has.
    int32_t place(int32_t input) const noexcept {
        int32_t before = 0;
        for (int32_t i = 0; i < input; ++i) before += has(i);
        return before;
    }
    /// The input at a place.
    int32_t inputAt(int32_t index) const noexcept {
        int32_t input = 0;
        while (!has(input) || place(input) != index) ++input;
        return input;
    }
    int32_t rank(int32_t index) const noexcept override {
        const int32_t input = inputAt(index);
        if (input == kQuery || input == kKey || input == kValue) return 4;
        if (input == kScores) return isEach() ? 3 : 2;
        return input == kIsDelimiter ? 2 : 1;
    }
    /// The input that says B, S and the choices of a row, and where in its shape S is.
    int32_t source() const noexcept { return place(isGiven() ? kScores : kKey); }
    int32_t tokenAxis() const noexcept { return isGiven() && !isEach() ? 1 : 2; }

    /// The settings of the fields. Budgets are inputs, one for each row, so that the ratio set here is not used.
    Settings settings() const {
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
        settings.heads = value(kHeads);
        settings.keep_per_10k = static_cast<int32_t>(kKeepScale);
        settings.min_tokens = value(kMinTokens);
        if (value(kHeadClass) == kAllClasses) return settings;
        settings.budget_split = CHUNKKV_SPLIT_CLASSES;
        settings.head_class = value(kHeadClass) == kLocal ? CHUNKKV_CLASS_LOCAL : CHUNKKV_CLASS_READING;
        settings.local_policy = CHUNKKV_POLICY_CHUNKS;
        settings.all_heads = value(kAllHeads);
        settings.all_reading_heads = value(kAllReadingHeads);
        settings.reading_share_per_10k = value(kReadingShare);
        return settings;
    }

    bool checkFields() const override {
        const Settings checked = settings();
        if (chunkkv_max_chunks(&checked, 0) < 0) return fail(chunkkv_last_error());
        if (isGiven() && value(kRequestWindow))
            return fail("request_window is 1 with score given; scores from outside have no window: leave it out");
        if (value(kMaxKept) == 0 || value(kMaxKept) >= value(kMinTokens)) return true;
        return report("%s: max_kept is %d; it must be 0 or at least min_tokens = %d", getPluginName(), value(kMaxKept),
                      value(kMinTokens));
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        const int32_t input = inputAt(index);
        if (input == kQuery) return isFloating(types[index]);
        if (input == kKey || input == kValue) return types[index] == types[place(kQuery)];
        return types[index] == (input == kScores ? DataType::kFLOAT : DataType::kINT32);
    }

    DataType outputType(int32_t index, const DataType*) const override {
        return index == kTokenScores ? DataType::kFLOAT : DataType::kINT32;
    }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const override {
        const DimsExprs& from = in[source()];
        const IDimensionExpr *tokens = from.d[tokenAxis()], *most = builder.constant(value(kMaxKept));
        if (most && value(kMaxKept) > 0) most = builder.operation(DimensionOperation::kMIN, *tokens, *most);
        if (!most) return fail("TensorRT has refused the expression min(S, max_kept)");
        const int32_t last = isEach() ? 2 : 1;
        for (const int32_t i : {kKeptIndices, kTokenScores}) {
            out[i].nbDims = last + 1;
            if (isEach()) out[i].d[1] = from.d[1];
        }
        out[kKeptLengths].nbDims = 1;
        for (int32_t i = 0; i < outputs(); ++i) out[i].d[0] = from.d[0];
        out[kKeptIndices].d[last] = value(kMaxKept) > 0 ? most : tokens;
        out[kTokenScores].d[last] = tokens;
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override {
        const Dims& from = in[source()].dims;
        const int64_t batch = from.d[0], tokens = from.d[tokenAxis()], most = value(kMaxKept);
        const int64_t kept = most > 0 && most < tokens ? most : tokens;
        out[kKeptLengths] = Dims{1, {batch}};
        out[kKeptIndices] = isEach() ? Dims{3, {batch, from.d[1], kept}} : Dims{2, {batch, kept}};
        out[kTokenScores] = isEach() ? Dims{3, {batch, from.d[1], tokens}} : Dims{2, {batch, tokens}};
    }

    bool check(const PluginTensorDesc* in) const override {
        const Dims& from = in[source()].dims;
        const int64_t batch = from.d[0], tokens = from.d[tokenAxis()];
        const auto is = [&](int32_t input, std::initializer_list<int64_t> sizes) {
            return !has(input) || hasShape(kInputs[input], in[place(input)], sizes);
        };
        if (!isGiven() && !is(kQuery, {-1, -1, value(kWindow), -1})) return false;
        const int64_t head_size = isGiven() ? -1 : in[place(kQuery)].dims.d[3];
        if (!is(kKey, {isGiven() ? -1 : in[place(kQuery)].dims.d[0], -1, -1, head_size}) ||
            !is(kValue, {batch, from.d[1], tokens, head_size}) || !is(kIsDelimiter, {batch, tokens}))
            return false;
        for (const int32_t input : {kLengths, kKeep, kBudget, kRequested})
            if (!is(input, {batch})) return false;
        ScoreParams params;
        size_t bytes;
        return scoreParams(in, params) && done(chunkkv_score_workspace(&params, &bytes));
    }

    /// Sizes and settings; layouts and addresses are run()'s.
    bool scoreParams(const PluginTensorDesc* in, ScoreParams& params) const {
        const Dims& from = in[source()].dims;
        params = ScoreParams{};
        params.settings = settings();
        params.rows.batch = static_cast<int32_t>(from.d[0]);
        params.rows.max_length = static_cast<int32_t>(from.d[tokenAxis()]);
        params.heads = params.kv_heads = isEach() ? static_cast<int32_t>(from.d[1]) : 1;
        if (!isGiven()) {
            params.heads = static_cast<int32_t>(in[place(kQuery)].dims.d[1]);
            params.kv_heads = static_cast<int32_t>(from.d[1]);
            params.head_dim = static_cast<int32_t>(from.d[3]);
            params.query_dtype = params.key_dtype = storageType(in[place(kKey)].type);
        }
        params.query_is_window = 1;
        // Any address but NULL: rows are scored whose token scores are written. run() sets the real address.
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
        const size_t choices = choicesOf(params.settings, params.kv_heads);
        parts.starts = parts.scores + aligned(batch * choices * chunks * sizeof(float));
        parts.counts = parts.starts + aligned(batch * (chunks + 1) * sizeof(int32_t));
        parts.bytes = parts.counts + aligned(batch * sizeof(int32_t));
        return parts;
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc* in) const override {
        PluginTensorDesc largest[kInputCount];
        for (int32_t i = 0; i < inputs(); ++i) {
            largest[i] = in[i].desc;
            largest[i].dims = in[i].opt;  // heads and head size are constants of the network
        }
        // The bounds of the inputs may differ. Take the largest: with too little workspace a kernel would write past
        // its end.
        Dims& from = largest[source()].dims;
        int64_t &batch = from.d[0], &tokens = from.d[tokenAxis()];
        for (int32_t i = 0; i < inputs(); ++i) batch = std::max({batch, in[i].opt.d[0], in[i].max.d[0]});
        tokens = std::max(tokens, in[source()].max.d[tokenAxis()]);
        if (isDelimited()) tokens = std::max(tokens, in[place(kIsDelimiter)].max.d[1]);
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
        const auto ints = [&](int32_t input) { return static_cast<const int32_t*>(buffers.inputs[place(input)]); };
        score.rows.lengths = ints(kLengths);
        score.rows.keep_per_10k = ints(kKeep);
        score.rows.budget_tokens = ints(kBudget);
        if (has(kRequested)) score.rows.windows = ints(kRequested);
        const Parts part = parts(score, score_bytes);
        char* workspace = static_cast<char*>(buffers.workspace);
        if (!workspace) return fail("the workspace is NULL");
        const auto layout = [&](int32_t input) {
            const PluginTensorDesc& tensor = in[place(input)];
            return contiguous(tensor.dims, elementBytes(tensor.type));
        };
        if (isGiven()) {
            score.given_scores = static_cast<const float*>(buffers.inputs[place(kScores)]);
        } else {
            score.query_layout = layout(kQuery);
            score.key_layout = layout(kKey);
            score.query = buffers.inputs[place(kQuery)];
            score.key = buffers.inputs[place(kKey)];
        }
        if (has(kValue)) {
            score.value_layout = layout(kValue);
            score.value = buffers.inputs[place(kValue)];
        }
        score.token_scores = static_cast<float*>(buffers.outputs[kTokenScores]);
        score.chunk_scores = reinterpret_cast<float*>(workspace + part.scores);
        if (isDelimited()) {
            int32_t* starts = reinterpret_cast<int32_t*>(workspace + part.starts);
            int32_t* counts = reinterpret_cast<int32_t*>(workspace + part.counts);
            if (!runBoundaries(score, ints(kIsDelimiter), starts, counts, buffers.stream)) return false;
            score.chunk_starts = starts;
            score.num_chunks = counts;
        }
        if (score.rows.max_length > 0 && !done(chunkkv_score(&score, workspace, score_bytes, buffers.stream)))
            return false;
        return runSelect(score, static_cast<int32_t>(out[kKeptIndices].dims.d[isEach() ? 2 : 1]), buffers);
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
        params.choices = choicesOf(score.settings, score.kv_heads);
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
