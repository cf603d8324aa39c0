// ChunkKVCompact: move the kept rows of one cache tensor, bytes unchanged.
//   in   x [B,Hkv,S,D] float32, float16, bfloat16, int8 or fp8; kept_indices [B,K] int32, or with heads = each
//        [B,Hkv,K]
//   out  y [B,Hkv,K,D] of x's type; where an index is negative, the row's first token
#include <algorithm>

#include "plugin_base.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

constexpr Field kFields[] = {fieldOf(limits::kHeads, CHUNKKV_HEADS_SHARED)};
enum { kHeads };
constexpr Table kTable{"ChunkKVCompact", kFields, 1};

enum { kX, kIndices };
constexpr int32_t kMaxHeadSize = 2048;

class Compact final : public Plugin {
  public:
    Compact() noexcept : Plugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    Plugin* copy() const override { return new Compact(*this); }
    int32_t inputs() const noexcept override { return 2; }
    int32_t outputs() const noexcept override { return 1; }
    bool isEach() const noexcept { return value(kHeads) == CHUNKKV_HEADS_EACH; }
    int32_t slotAxis() const noexcept { return isEach() ? 2 : 1; }
    int32_t rank(int32_t input) const noexcept override { return input == kX ? 4 : slotAxis() + 1; }
    bool checkFields() const override { return true; }

    bool isInputType(int32_t index, const DataType* types) const override {
        return index == kX ? storageType(types[kX]) >= 0 : types[kIndices] == DataType::kINT32;
    }

    DataType outputType(int32_t, const DataType* input_types) const override { return input_types[kX]; }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
        *out = in[kX];
        out->d[2] = in[kIndices].d[slotAxis()];
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override {
        *out = in[kX].dims;
        out->d[2] = in[kIndices].dims.d[slotAxis()];
    }

    bool check(const PluginTensorDesc* in) const override {
        if (!hasShape("x", in[kX], {-1, -1, -1, -1})) return false;
        const int64_t* size = in[kX].dims.d;
        const bool fits = isEach() ? hasShape("kept_indices", in[kIndices], {size[0], size[1], -1})
                                   : hasShape("kept_indices", in[kIndices], {size[0], -1});
        if (!fits) return false;
        if (size[1] > CHUNKKV_MAX_HEADS || size[2] > CHUNKKV_MAX_LENGTH || size[3] > kMaxHeadSize)
            return report("%s: x is [.., %lld, %lld, %lld]; allowed are at most %d heads, %d tokens and head size %d",
                          getPluginName(), static_cast<long long>(size[1]), static_cast<long long>(size[2]),
                          static_cast<long long>(size[3]), CHUNKKV_MAX_HEADS, CHUNKKV_MAX_LENGTH, kMaxHeadSize);
        if (size[3] * elementBytes(in[kX].type) % 2 != 0) return fail("a token of x has an odd number of bytes");
        if (size[2] > 0 || in[kIndices].dims.d[slotAxis()] == 0) return true;
        return fail("x holds no tokens, but kept_indices has entries");
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc*) const override { return 0; }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc* out, const Buffers& buffers) const override {
        const int64_t* size = out->dims.d;
        if (std::find(size, size + 4, 0) != size + 4) return true;
        // The op moves pairs of tensors. Here the pair is the two halves of every token of one tensor.
        const int64_t token = size[3] * elementBytes(in[kX].type), half = token / 2;
        const char* x = static_cast<const char*>(buffers.inputs[kX]);
        char* y = static_cast<char*>(buffers.outputs[0]);
        const Layer halves{x, x + half, y, y + half};
        CompactParams params{};
        params.rows.batch = static_cast<int32_t>(size[0]);
        params.rows.max_length = static_cast<int32_t>(in[kX].dims.d[2]);
        params.layout = layout(in[kX].dims, token);
        params.layout_out = layout(out->dims, token);
        params.kept_indices = static_cast<const int32_t*>(buffers.inputs[kIndices]);
        params.layers = &halves;  // without kept_lengths: every slot of y is written
        params.num_layers = 1;
        params.max_kept = static_cast<int32_t>(size[2]);
        params.kv_heads = static_cast<int32_t>(size[1]);
        params.choices = isEach() ? params.kv_heads : 1;
        params.row_bytes = static_cast<int32_t>(half);
        return done(chunkkv_compact(&params, buffers.stream));
    }

    static Layout layout(const Dims& dims, int64_t token_bytes) {
        Layout layout{};
        layout.stride_token = token_bytes;
        layout.stride_head = dims.d[2] * token_bytes;
        layout.stride_row = dims.d[1] * layout.stride_head;
        layout.extent = dims.d[2];
        return layout;
    }
};

}  // namespace

IPluginCreatorInterface* compactCreator() {
    static Creator<Compact> creator;
    return &creator;
}

}  // namespace chunkkv::trt
