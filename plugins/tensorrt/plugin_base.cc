#include "plugin_base.h"

#include <algorithm>
#include <memory>

using namespace nvinfer1;

namespace chunkkv::trt {
namespace {

/// The descriptors at the sizes of a profile's kOPT.
void atOpt(const DynamicPluginTensorDesc* from, int32_t count, PluginTensorDesc* to) {
    for (int32_t i = 0; i < count; ++i) {
        to[i] = from[i].desc;
        to[i].dims = from[i].opt;
    }
}

bool equal(const Dims& a, const Dims& b) {
    return a.nbDims == b.nbDims && a.nbDims <= Dims::MAX_DIMS && std::equal(a.d, a.d + std::max(a.nbDims, 0), b.d);
}

}  // namespace

int32_t storageType(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT:
            return CHUNKKV_FLOAT32;
        case DataType::kHALF:
            return CHUNKKV_FLOAT16;
        case DataType::kBF16:
            return CHUNKKV_BFLOAT16;
        case DataType::kINT8:
            return CHUNKKV_INT8;
        case DataType::kFP8:
            return CHUNKKV_FP8_E4M3;
        default:
            return -1;
    }
}

bool isFloating(DataType type) noexcept {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

int64_t elementBytes(DataType type) noexcept {
    return type == DataType::kFLOAT ? 4 : type == DataType::kHALF || type == DataType::kBF16 ? 2 : 1;
}

bool Plugin::parse(const PluginFieldCollection* fields, TensorRTPhase phase) {
    return values_.parse(fields, phase) && checkFields();
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* Plugin::clone() noexcept {
    return guarded("clone", static_cast<IPluginV3*>(nullptr), [this]() -> IPluginV3* { return copy(); });
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept {
    return guarded("attachToContext", static_cast<IPluginV3*>(nullptr), [this]() -> IPluginV3* {
        std::unique_ptr<Plugin> attached(copy());
        return attached->attach() ? attached.release() : nullptr;
    });
}

bool Plugin::hasCounts(int32_t nb_inputs, int32_t nb_outputs) const noexcept {
    if (nb_inputs == inputs() && nb_outputs == outputs()) return true;
    return report("%s: %d inputs and %d outputs; with these fields it has %d and %d", getPluginName(), nb_inputs,
                  nb_outputs, inputs(), outputs());
}

bool Plugin::hasTypes(const PluginTensorDesc* in, const PluginTensorDesc* out) const {
    DataType types[kMaxTensors];
    for (int32_t i = 0; i < inputs(); ++i) {
        types[i] = in[i].type;
        if (!isInputType(i, types) || in[i].format != TensorFormat::kLINEAR)
            return report("%s: input %d has data type %d and format %d, which it does not take", getPluginName(), i,
                          static_cast<int>(in[i].type), static_cast<int>(in[i].format));
    }
    for (int32_t i = 0; i < outputs(); ++i)
        if (out[i].type != outputType(i, types) || out[i].format != TensorFormat::kLINEAR)
            return report("%s: output %d has data type %d and format %d; it writes data type %d, linear",
                          getPluginName(), i, static_cast<int>(out[i].type), static_cast<int>(out[i].format),
                          static_cast<int>(outputType(i, types)));
    return true;
}

bool Plugin::hasShape(const char* name, const PluginTensorDesc& tensor, std::initializer_list<int64_t> sizes) const {
    if (tensor.dims.nbDims != static_cast<int32_t>(sizes.size()))
        return report("%s: %s has %d dimensions; it must have %zu", getPluginName(), name, tensor.dims.nbDims,
                      sizes.size());
    const int64_t* actual = tensor.dims.d;
    for (const int64_t size : sizes) {
        const int64_t low = size < 0 ? 0 : size, high = size < 0 ? INT32_MAX : size;
        if (*actual < low || *actual > high)
            return report("%s: dimension %td of %s is %lld; allowed is %lld to %lld", getPluginName(),
                          actual - tensor.dims.d, name, static_cast<long long>(*actual), static_cast<long long>(low),
                          static_cast<long long>(high));
        ++actual;
    }
    return true;
}

bool Plugin::hasOutputDims(const PluginTensorDesc* in, const PluginTensorDesc* out) const {
    Dims expected[kMaxTensors];
    outputDims(in, expected);
    for (int32_t i = 0; i < outputs(); ++i)
        if (!equal(out[i].dims, expected[i]))
            return report("%s: the shape of output %d does not follow from its inputs", getPluginName(), i);
    return true;
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nb_inputs,
                                const DynamicPluginTensorDesc* out, int32_t nb_outputs) noexcept {
    return guarded("configurePlugin", 1, [&] {
        if (!hasCounts(nb_inputs, nb_outputs)) return 1;
        for (int32_t i = 0; i < nb_inputs; ++i)
            if (!hasRank(i, in[i].min) || !hasRank(i, in[i].opt) || !hasRank(i, in[i].max)) return 1;
        PluginTensorDesc at[kMaxTensors], at_out[kMaxTensors];
        atOpt(in, nb_inputs, at);
        atOpt(out, nb_outputs, at_out);
        // Types are the same at kMIN, kOPT and kMAX. Sizes of different tensors must agree at kOPT alone: kMIN and kMAX
        // are bounds, which TensorRT computes for each tensor by itself.
        return hasTypes(at, at_out) && check(at) ? 0 : 1;
    });
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs, const DataType* input_types,
                                   int32_t nb_inputs) const noexcept {
    return guarded("getOutputDataTypes", 1, [&] {
        if (!hasCounts(nb_inputs, nb_outputs)) return 1;
        for (int32_t i = 0; i < nb_outputs; ++i) output_types[i] = outputType(i, input_types);
        return 0;
    });
}

int32_t Plugin::getOutputShapes(const DimsExprs* in, int32_t nb_inputs, const DimsExprs*, int32_t nb_shape_inputs,
                                DimsExprs* out, int32_t nb_outputs, IExprBuilder& builder) noexcept {
    return guarded("getOutputShapes", 1, [&] {
        if (!hasCounts(nb_inputs, nb_outputs)) return 1;
        if (nb_shape_inputs != 0) {
            report("%s: %d shape inputs; it takes none", getPluginName(), nb_shape_inputs);
            return 1;
        }
        for (int32_t i = 0; i < nb_inputs; ++i)
            if (!hasRank(i, in[i])) return 1;
        return shapeExpressions(in, out, builder) ? 0 : 1;
    });
}

bool Plugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t nb_inputs,
                                       int32_t nb_outputs) noexcept {
    return guarded("supportsFormatCombination", false, [&] {
        if (nb_inputs != inputs() || nb_outputs != outputs() || pos < 0 || pos >= nb_inputs + nb_outputs) return false;
        if (in_out[pos].desc.format != TensorFormat::kLINEAR) return false;
        DataType types[kMaxTensors];  // entries after pos are not known yet and not read
        for (int32_t i = 0; i <= pos; ++i) types[i] = in_out[i].desc.type;
        return pos < nb_inputs ? isInputType(pos, types) : types[pos] == outputType(pos - nb_inputs, types);
    });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nb_inputs, const DynamicPluginTensorDesc*,
                                int32_t nb_outputs) const noexcept {
    return guarded("getWorkspaceSize", size_t{0},
                   [&]() -> size_t { return hasCounts(nb_inputs, nb_outputs) ? workspaceBytes(in) : 0; });
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t nb_inputs, const PluginTensorDesc* out,
                              int32_t nb_outputs) noexcept {
    return guarded("onShapeChange", 1, [&] {
        return hasCounts(nb_inputs, nb_outputs) && hasTypes(in, out) && check(in) && hasOutputDims(in, out) ? 0 : 1;
    });
}

int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded("enqueue", 1, [&] {
        const Buffers buffers{inputs, outputs, workspace, stream};
        return hasTypes(in, out) && check(in) && hasOutputDims(in, out) && run(in, out, buffers) ? 0 : 1;
    });
}

}  // namespace chunkkv::trt
