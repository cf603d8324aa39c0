// ChunkKVRope: rotate Q and K of packed QKV by logical positions. Attention then runs without RoPE of its own.
//   in   qkv [T,(Hq+2*Hkv)*D] float32, float16 or bfloat16; positions [T] int32;
//        rotary_cos_sin [1,P*rotary_dim] float32, TensorRT-LLM's table; with behind: done [1] int32, which is not read
//        and puts this node behind the ChunkKVCompress that gives it
//   out  the same as qkv
#include "plugin_base.h"

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

enum { kNumHeads, kNumKvHeads, kHeadSize, kRotaryDim, kNeox, kMaxPositions, kBehind, kFieldCount };
constexpr Field kFields[kFieldCount] = {
    kNumHeadsField, kNumKvHeadsField,
    kHeadSizeField, {"rotary_dim", 2, kHeadSizeField.high},
    {"neox", 0, 1}, {"max_positions", 1, INT32_MAX},
    {"behind", 0, 1, 0},
};
static_assert(kFieldCount <= kMaxFields, "FieldValues has room for every field");
constexpr Table kTable{"ChunkKVRope", kFields, kFieldCount};

enum { kQkv, kPositions, kCosSin, kDone };
constexpr int32_t kRanks[] = {2, 1, 2, 1};

class Rope final : public Plugin {
  public:
    Rope() noexcept : Plugin(kTable) {}
    static const Table& table() { return kTable; }

  private:
    Plugin* copy() const override { return new Rope(*this); }
    int32_t inputs() const noexcept override { return value(kBehind) ? kDone + 1 : kCosSin + 1; }
    int32_t outputs() const noexcept override { return 1; }
    int32_t rank(int32_t input) const noexcept override { return kRanks[input]; }

    RopeParams params() const {
        RopeParams params{};
        params.max_positions = value(kMaxPositions);
        params.heads = value(kNumHeads);
        params.kv_heads = value(kNumKvHeads);
        params.head_dim = value(kHeadSize);
        params.rotary_dim = value(kRotaryDim);
        params.style = value(kNeox) ? CHUNKKV_ROPE_NEOX : CHUNKKV_ROPE_GPTJ;
        return params;
    }

    bool checkFields() const override {
        const RopeParams none = params();  // without tokens, so that only sizes are checked
        return done(chunkkv_rope(&none, nullptr));
    }

    bool isInputType(int32_t index, const DataType* types) const override {
        if (index == kQkv) return isFloating(types[kQkv]);
        return types[index] == (index == kCosSin ? DataType::kFLOAT : DataType::kINT32);
    }

    DataType outputType(int32_t, const DataType* input_types) const override { return input_types[kQkv]; }

    bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
        *out = in[kQkv];
        return true;
    }

    void outputDims(const PluginTensorDesc* in, Dims* out) const override { *out = in[kQkv].dims; }

    bool check(const PluginTensorDesc* in) const override {
        const int64_t width = (value(kNumHeads) + 2LL * value(kNumKvHeads)) * value(kHeadSize);
        if (value(kBehind) && !hasShape("done", in[kDone], {1})) return false;
        return hasShape("qkv", in[kQkv], {-1, width}) && hasShape("positions", in[kPositions], {in[kQkv].dims.d[0]}) &&
               hasShape("rotary_cos_sin", in[kCosSin], {1, int64_t{value(kMaxPositions)} * value(kRotaryDim)});
    }

    size_t workspaceBytes(const DynamicPluginTensorDesc*) const override { return 0; }

    bool run(const PluginTensorDesc* in, const PluginTensorDesc*, const Buffers& buffers) const override {
        RopeParams rope = params();
        rope.qkv = buffers.inputs[kQkv];
        rope.qkv_out = buffers.outputs[0];
        rope.positions = static_cast<const int32_t*>(buffers.inputs[kPositions]);
        rope.cos_sin = static_cast<const float*>(buffers.inputs[kCosSin]);
        rope.num_tokens = in[kQkv].dims.d[0];
        rope.dtype = storageType(in[kQkv].type);
        return done(chunkkv_rope(&rope, buffers.stream));
    }
};

}  // namespace

IPluginCreatorInterface* ropeCreator() {
    static Creator<Rope> creator;
    return &creator;
}

}  // namespace chunkkv::trt
