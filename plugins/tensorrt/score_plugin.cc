// ChunkKVScore: chunk scores of this rank's heads. Tensor-parallel ranks add them up, so that all select the same
// tokens.
//   in   qkv [T,(Hq+2*Hkv)*D] float32, float16 or bfloat16, rotated; context_lengths, row_starts [B] int32;
//        host_request_types, host_context_lengths [B] int32, host; with delimiter boundaries is_delimiter [T] int32
//   out  chunk_scores [T] float32: chunk i of a row at row_starts + i; zero where nothing is scored
#include "packed_plugin.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum { kNumHeads = kSharedFields, kNumKvHeads, kHeadSize };
constexpr auto kFields = withShared({
    kNumHeadsField,
    kNumKvHeadsField,
    kHeadSizeField,
});
constexpr Table kTable{"ChunkKVScore", kFields.data(), static_cast<int32_t>(kFields.size())};

enum { kQkv, kContext, kRowStarts, kHostTypes, kHostContext, kIsDelimiter };
constexpr const char* kInputs[] = {
    "qkv", "context_lengths", "row_starts", "host_request_types", "host_context_lengths", "is_delimiter"};

class Score final : public PackedPlugin {
  public:
    Score() noexcept : PackedPlugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    Plugin* copy() const override { return new Score(*this); }
    int32_t inputs() const noexcept override { return isDelimited() ? kIsDelimiter + 1 : kIsDelimiter; }
    int32_t outputs() const noexcept override { return 1; }
    int32_t rank(int32_t input) const noexcept override { return input == kQkv ? 2 : 1; }
    Heads heads() const noexcept { return {value(kNumHeads), value(kNumKvHeads), value(kHeadSize)}; }
    bool checkFields() const override {
        size_t bytes;  // the data type is not known yet: float16, which has kernels, serves to check the rest
        if (value(kHeadReduce) == CHUNKKV_REDUCE_MAX)
            return fail(
                "head_reduce is max; ranks add up their scores, which makes a mean: use mean, or let each rank choose");
        return areSettings() && scoreBytes(heads(), DataType::kHALF, 0, 0, bytes);
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        return index == kQkv ? isFloating(types[kQkv]) : types[index] == DataType::kINT32;
    }

    DataType outputType(int32_t, const DataType*) const override { return DataType::kFLOAT; }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
        out->nbDims = 1;
        out->d[0] = in[kQkv].d[0];
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override { *out = Dims{1, {in[kQkv].dims.d[0]}}; }

    bool check(const PluginTensorDesc* in) const override {
        if (!hasShape(kInputs[kQkv], in[kQkv], {-1, heads().width()}) ||
            !hasShape(kInputs[kContext], in[kContext], {-1}))
            return false;
        for (const int32_t i : {kRowStarts, kHostTypes, kHostContext})
            if (!hasShape(kInputs[i], in[i], {in[kContext].dims.d[0]})) return false;
        return !isDelimited() || hasShape(kInputs[kIsDelimiter], in[kIsDelimiter], {in[kQkv].dims.d[0]});
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc* in) const override {
        const int64_t rows = largest(in, {kContext, kRowStarts, kHostTypes, kHostContext}, 0);
        const int64_t tokens = largest(in, {kQkv}, 0);
        size_t bytes = 0;
        if (!scoreBytes(heads(), in[kQkv].desc.type, rows, tokens, bytes)) return 0;
        return parts(nullptr, rows, tokens, bytes).bytes;
    }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc*, const Buffers& buffers) const override {
        Batch batch;
        if (!readBatch(buffers.inputs[kHostTypes], buffers.inputs[kHostContext], in[kContext].dims.d[0],
                       in[kQkv].dims.d[0], batch))
            return false;
        auto* scores = static_cast<float*>(buffers.outputs[0]);
        if (!done(chunkkv_zero(scores, batch.tokens * sizeof(float), buffers.stream))) return false;
        if (!batch.compresses) return true;
        if (!buffers.workspace) return fail("the workspace is NULL");
        const Rows rows = contextRows(batch, buffers.inputs[kContext], buffers.inputs[kRowStarts]);
        const Parts at = parts(buffers.workspace, batch.rows, batch.tokens, 0);
        return (!isDelimited() || findChunks(rows, buffers.inputs[kIsDelimiter], at, buffers.stream)) &&
               scoreChunks(heads(), in[kQkv].type, buffers.inputs[kQkv], rows, at, scores, buffers.stream);
    }
};

}  // namespace

IPluginCreatorInterface* scoreCreator() {
    static Creator<Score> creator;
    return &creator;
}

}  // namespace chunkkv::trt
