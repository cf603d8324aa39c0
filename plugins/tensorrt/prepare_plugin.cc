// ChunkKVPrepare: computes, once per network, what all layers of a TensorRT-LLM network need to know about a batch.
//   in   sequence_length, context_lengths [B] int32; host_request_types, host_context_lengths,
//        host_past_key_value_lengths [B] int32, host; host_kv_cache_block_offsets [P,B,2,M] int32, host; qkv [T,E]
//        float32, float16 or bfloat16, of which only T counts; with delimiter boundaries input_ids [T] int32
//   out  attention_lengths, kept_lengths, row_starts [B] int32; positions [T] int32; with delimiter boundaries
//        is_delimiter [T] int32
// It refuses batches whose cache must not be compacted: chunked context, reused blocks, blocks on the host.
#include "packed_plugin.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum { kTokensPerBlock = kSharedFields, kVocabSize, kBitmap };
constexpr int32_t kMaxVocabulary = 1 << 22;

constexpr auto kFields = withShared({
    kTokensPerBlockField,
    {"vocab_size", 0, kMaxVocabulary, 0},
    {"delimiter_bitmap", INT32_MIN, INT32_MAX, 0, nullptr, kMaxVocabulary / 32},
});
constexpr Table kTable{"ChunkKVPrepare", kFields.data(), static_cast<int32_t>(kFields.size())};

enum { kSequence, kContext, kHostTypes, kHostContext, kHostPast, kHostBlocks, kQkv, kInputIds };
enum { kAttentionLengths, kKeptLengths, kRowStarts, kPositions, kIsDelimiter };
constexpr const char* kInputs[] = {"sequence_length",
                                   "context_lengths",
                                   "host_request_types",
                                   "host_context_lengths",
                                   "host_past_key_value_lengths",
                                   "host_kv_cache_block_offsets",
                                   "qkv",
                                   "input_ids"};
constexpr int32_t kRanks[] = {1, 1, 1, 1, 1, 4, 2, 1};

/// What the node that this thread enqueued last keeps; see chunkkv_last_kept_tokens in entry.cc.
struct LastRun {
    bool is_known = false;
    Settings settings{};
};
thread_local LastRun last_run;

/// A table in device memory, owned by one object. A copy of the object starts without one and uploads its own.
class DeviceTable {
  public:
    DeviceTable() = default;
    DeviceTable(const DeviceTable&) noexcept {}
    DeviceTable& operator=(const DeviceTable&) = delete;
    ~DeviceTable() { chunkkv_release(data_); }

    chunkkv_status upload(const std::vector<int32_t>& words) {
        return chunkkv_upload(words.data(), words.size() * sizeof(int32_t), &data_);
    }
    const void* data() const { return data_; }

  private:
    void* data_ = nullptr;
};

class Prepare final : public PackedPlugin {
  public:
    Prepare() noexcept : PackedPlugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    Plugin* copy() const override { return new Prepare(*this); }
    int32_t inputs() const noexcept override { return isDelimited() ? kInputIds + 1 : kInputIds; }
    int32_t outputs() const noexcept override { return isDelimited() ? kIsDelimiter + 1 : kIsDelimiter; }
    int32_t rank(int32_t input) const noexcept override { return kRanks[input]; }

    bool checkFields() const override {
        const int32_t vocabulary = value(kVocabSize);
        const size_t words = array(kBitmap).size();
        if (!areSettings() || !isPowerOfTwo(kTokensPerBlock, "tokens_per_block")) return false;
        if (!isDelimited()) return words == 0 || fail("delimiter_bitmap is given, but boundaries is fixed; omit it");
        if (vocabulary < 1) return fail("vocab_size is 0, but boundaries is delimiter; set it");
        if (words == (static_cast<size_t>(vocabulary) + 31) / 32) return true;
        return report("%s: delimiter_bitmap has %zu words; vocab_size %d takes %d", getPluginName(), words, vocabulary,
                      (vocabulary + 31) / 32);
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        return index == kQkv ? isFloating(types[kQkv]) : types[index] == DataType::kINT32;
    }

    DataType outputType(int32_t, const DataType*) const override { return DataType::kINT32; }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
        for (int32_t i = 0; i < outputs(); ++i) {
            out[i].nbDims = 1;
            out[i].d[0] = i < kPositions ? in[kSequence].d[0] : in[kQkv].d[0];
        }
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override {
        for (int32_t i = 0; i < outputs(); ++i)
            out[i] = Dims{1, {i < kPositions ? in[kSequence].dims.d[0] : in[kQkv].dims.d[0]}};
    }

    bool check(const PluginTensorDesc* in) const override {
        if (!hasShape(kInputs[kSequence], in[kSequence], {-1}) || !hasShape(kInputs[kQkv], in[kQkv], {-1, -1}))
            return false;
        const int64_t rows = in[kSequence].dims.d[0];
        for (const int32_t i : {kContext, kHostTypes, kHostContext, kHostPast})
            if (!hasShape(kInputs[i], in[i], {rows})) return false;
        if (!hasShape(kInputs[kHostBlocks], in[kHostBlocks], {-1, rows, 2, -1})) return false;
        return !isDelimited() || hasShape(kInputs[kInputIds], in[kInputIds], {in[kQkv].dims.d[0]});
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc*) const override { return 0; }
    bool attach() override { return !isDelimited() || done(bitmap_.upload(array(kBitmap))); }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc*, const Buffers& buffers) const override {
        Batch batch;
        if (!readBatch(buffers.inputs[kHostTypes], buffers.inputs[kHostContext], in[kSequence].dims.d[0],
                       in[kQkv].dims.d[0], batch))
            return false;
        if (batch.rows == 0) return true;
        if (!isWholeContext(batch, buffers) || !isOnDevice(batch, in[kHostBlocks].dims, buffers)) return false;
        PrepareParams params{};
        params.settings = settings();
        params.sequence_lengths = static_cast<const int32_t*>(buffers.inputs[kSequence]);
        params.context_lengths = static_cast<const int32_t*>(buffers.inputs[kContext]);
        params.attention_lengths = static_cast<int32_t*>(buffers.outputs[kAttentionLengths]);
        params.kept_lengths = static_cast<int32_t*>(buffers.outputs[kKeptLengths]);
        params.row_starts = static_cast<int32_t*>(buffers.outputs[kRowStarts]);
        params.positions = static_cast<int32_t*>(buffers.outputs[kPositions]);
        params.num_tokens = batch.tokens;
        params.batch = batch.rows;
        params.contexts = batch.contexts;
        params.max_length = value(kMaxLength);
        if (isDelimited()) {
            if (!bitmap_.data()) return fail("the plugin is not attached to an execution context");
            params.token_ids = static_cast<const int32_t*>(buffers.inputs[kInputIds]);
            params.delimiter_bitmap = static_cast<const uint32_t*>(bitmap_.data());
            params.vocab_size = value(kVocabSize);
            params.is_delimiter = static_cast<int32_t*>(buffers.outputs[kIsDelimiter]);
        }
        last_run = {true, params.settings};
        return done(chunkkv_prepare(&params, buffers.stream));
    }

    /// Whether every context row holds its whole prompt: then host_past_key_value_lengths, which counts the tokens of
    /// this batch too, equals its prompt length.
    bool isWholeContext(const Batch& batch, const Buffers& buffers) const {
        const auto* lengths = static_cast<const int32_t*>(buffers.inputs[kHostContext]);
        const auto* past = static_cast<const int32_t*>(buffers.inputs[kHostPast]);
        if (!past) return fail("host_past_key_value_lengths is NULL");
        for (int32_t row = 0; row < batch.contexts; ++row)
            if (past[row] != lengths[row])
                return report(
                    "%s: context row %d has %d tokens, but %d in its cache; switch off chunked context "
                    "(enable_chunked_context) and KV cache reuse (enable_kv_cache_reuse)",
                    getPluginName(), row, lengths[row], past[row]);
        return true;
    }

    /// Whether all blocks of the context rows lie in the primary pool; bit 31 marks those that do not.
    bool isOnDevice(const Batch& batch, const Dims& dims, const Buffers& buffers) const {
        const auto* lengths = static_cast<const int32_t*>(buffers.inputs[kHostContext]);
        const auto* offsets = static_cast<const int32_t*>(buffers.inputs[kHostBlocks]);
        const int64_t pools = dims.d[0], width = dims.d[3];
        if (!offsets) return fail("host_kv_cache_block_offsets is NULL");
        for (int32_t row = 0; row < batch.contexts; ++row) {
            const int64_t blocks = (int64_t{lengths[row]} + value(kTokensPerBlock) - 1) / value(kTokensPerBlock);
            if (blocks > width)
                return report("%s: row %d has %d tokens, which take %lld blocks; the block table has %lld",
                              getPluginName(), row, lengths[row], static_cast<long long>(blocks),
                              static_cast<long long>(width));
            for (int64_t part = 0; part < pools * 2; ++part) {
                const int64_t first = ((part / 2 * batch.rows + row) * 2 + part % 2) * width;
                for (int64_t block = 0; block < blocks; ++block)
                    if (offsets[first + block] < 0)
                        return report(
                            "%s: block %lld of context row %d is in host memory; switch off offloading "
                            "(kv_cache_host_memory_bytes, host_cache_size)",
                            getPluginName(), static_cast<long long>(block), row);
            }
        }
        return true;
    }

    DeviceTable bitmap_;
};

}  // namespace

int64_t lastKeptTokens(int64_t length) noexcept {
    return last_run.is_known ? chunkkv_kept_tokens(&last_run.settings, length) : -1;
}

IPluginCreatorInterface* prepareCreator() {
    static Creator<Prepare> creator;
    return &creator;
}

}  // namespace chunkkv::trt
