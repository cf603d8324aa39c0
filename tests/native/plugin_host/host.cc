#include "host.h"

#include <dlfcn.h>

#include <cstring>
#include <random>

namespace host {
namespace {

size_t elementSize(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kFLOAT64:
        case PluginFieldType::kINT64:
            return 8;
        case PluginFieldType::kFLOAT32:
        case PluginFieldType::kINT32:
            return 4;
        case PluginFieldType::kFLOAT16:
        case PluginFieldType::kBF16:
        case PluginFieldType::kINT16:
            return 2;
        case PluginFieldType::kDIMS:
            return sizeof(Dims);
        default:
            return 1;
    }
}

Dims dimsOf(int32_t rank, const int64_t* sizes) {
    Dims dims{};
    dims.nbDims = rank;
    std::copy(sizes, sizes + rank, dims.d);
    return dims;
}

/// The capability, which must be there and of the right kind.
template <class Interface>
Interface& capability(IPluginV3& plugin, PluginCapabilityType type, const char* kind) {
    IPluginCapability* found = plugin.getCapabilityInterface(type);
    require(found && std::string(found->getInterfaceInfo().kind) == kind, std::string("no capability ") + kind);
    return *static_cast<Interface*>(found);
}

std::string keyOf(const char* name_space, const char* name, const char* version) {
    return std::string(name_space) + "::" + name + ":" + version;
}

class ResourceContext : public IPluginResourceContext {
  public:
    IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

constexpr auto kNoType = static_cast<DataType>(0x7f);
constexpr auto kNoFormat = static_cast<TensorFormat>(0x7f);

}  // namespace

Blob::Blob(const PluginFieldCollection& fields) {
    names_.reserve(fields.nbFields);
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& field = fields.fields[i];
        names_.emplace_back(field.name ? field.name : "");
        const size_t size = field.data && field.length > 0 ? elementSize(field.type) * field.length : 0;
        bytes_.emplace_back(field.data ? new char[size] : nullptr);
        if (size > 0) std::memcpy(bytes_.back().get(), field.data, size);
        fields_.emplace_back(field.name ? names_.back().c_str() : nullptr, bytes_.back().get(), field.type,
                             field.length);
    }
}

Blob& Blob::operator=(const Blob& other) {
    Blob copy(other);
    names_.swap(copy.names_);
    bytes_.swap(copy.bytes_);
    fields_.swap(copy.fields_);
    return *this;
}

void Logger::log(Severity severity, const AsciiChar* message) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    lines_ += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
}

std::string Logger::take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string lines;
    lines.swap(lines_);
    return lines;
}

Library::Library(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(library, std::string("dlopen: ") + (library ? "" : dlerror()));
    using SetFinder = void (*)(ILoggerFinder*);
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto set_finder = reinterpret_cast<SetFinder>(dlsym(library, "setLoggerFinder"));
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    require(set_finder && get_creators, "setLoggerFinder or getCreators is not exported");
    set_finder(&finder_);
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        require(std::string(creators[i]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "a creator's kind");
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        creators_[keyOf(creator->getPluginNamespace(), creator->getPluginName(), creator->getPluginVersion())] =
            creator;
    }
}

IPluginCreatorV3One& Library::creator(const std::string& key) const {
    const auto found = creators_.find(key);
    require(found != creators_.end(), "no creator " + key);
    return *found->second;
}

PluginPointer Library::create(const std::string& key, const PluginFieldCollection& fields, TensorRTPhase phase) const {
    const Blob temporary(fields);
    const PluginFieldCollection view = temporary.view();
    PluginPointer plugin(creator(key).createPlugin("node", &view, phase));
    require(plugin != nullptr, "createPlugin returned nullptr");
    auto& core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
    require(keyOf(core.getPluginNamespace(), core.getPluginName(), core.getPluginVersion()) == key,
            "plugin's own name");
    return plugin;
}

Built::Built(const Library& library, const std::string& key, const PluginFieldCollection& fields,
             const std::vector<Tensor>& inputs) {
    PluginPointer callers = library.create(key, fields, TensorRTPhase::kBUILD);
    const PluginPointer plugin(callers->clone());  // the network works on a clone; the caller deletes its own
    callers.reset();
    require(plugin != nullptr, "clone returned nullptr");
    auto& build = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
    auto& runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");

    const int32_t nb_inputs = static_cast<int32_t>(inputs.size()), nb_outputs = build.getNbOutputs();
    require(nb_outputs > 0, "getNbOutputs");
    std::vector<DataType> input_types;
    for (const Tensor& input : inputs) input_types.push_back(static_cast<DataType>(input.type));
    output_types_.assign(nb_outputs, DataType::kBOOL);
    require(build.getOutputDataTypes(output_types_.data(), nb_outputs, input_types.data(), nb_inputs) == 0,
            "getOutputDataTypes");
    for (const DataType type : output_types_)
        require(type != DataType::kBOOL && type != DataType::kUINT8, "an output's data type");
    askShapes(build, inputs);

    const std::vector<DynamicPluginTensorDesc> tensors = describe(inputs);
    tryFormats(build, tensors, nb_inputs);
    require(build.configurePlugin(tensors.data(), nb_inputs, tensors.data() + nb_inputs, nb_outputs) == 0,
            "configurePlugin");
    require(build.getNbTactics() == 0 && build.getFormatCombinationLimit() > 0, "tactics");
    workspace_ = build.getWorkspaceSize(tensors.data(), nb_inputs, tensors.data() + nb_inputs, nb_outputs);
    std::vector<PluginTensorDesc> at_opt;
    for (const DynamicPluginTensorDesc& tensor : tensors) {
        at_opt.push_back(tensor.desc);
        at_opt.back().dims = tensor.opt;
    }
    require(runtime.onShapeChange(at_opt.data(), nb_inputs, at_opt.data() + nb_inputs, nb_outputs) == 0,
            "onShapeChange at kOPT");
    const PluginFieldCollection* stored = runtime.getFieldsToSerialize();
    require(stored != nullptr, "getFieldsToSerialize");
    blob_ = Blob(*stored);
}

void Built::askShapes(IPluginV3OneBuild& plugin, const std::vector<Tensor>& inputs) {
    std::vector<DimsExprs> shapes;
    for (size_t i = 0; i < inputs.size(); ++i) {
        DimsExprs shape{};
        shape.nbDims = inputs[i].rank;
        for (int32_t axis = 0; axis < shape.nbDims; ++axis)
            shape.d[axis] = inputs[i].min[axis] == inputs[i].max[axis]
                                ? expressions_.constant(inputs[i].max[axis])
                                : expressions_.free(static_cast<int64_t>(i), axis);
        shapes.push_back(shape);
    }
    DimsExprs poison{};
    poison.nbDims = -7;
    output_shapes_.assign(output_types_.size(), poison);
    require(
        plugin.getOutputShapes(shapes.data(), static_cast<int32_t>(shapes.size()), nullptr, 0, output_shapes_.data(),
                               static_cast<int32_t>(output_shapes_.size()), expressions_) == 0,
        "getOutputShapes");
    for (const DimsExprs& shape : output_shapes_) {
        require(shape.nbDims >= 0 && shape.nbDims <= Dims::MAX_DIMS, "rank of an output");
        for (int32_t axis = 0; axis < shape.nbDims; ++axis) require(shape.d[axis], "a dimension without expression");
    }
}

Dims Built::outputDims(int32_t output, const Sizes& inputs) const {
    Dims dims{};
    dims.nbDims = output_shapes_.at(output).nbDims;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        dims.d[axis] = static_cast<const Expression*>(output_shapes_[output].d[axis])->at(inputs);
    return dims;
}

std::vector<DynamicPluginTensorDesc> Built::describe(const std::vector<Tensor>& inputs) const {
    std::vector<DynamicPluginTensorDesc> tensors;
    Sizes min, opt, max;
    for (const Tensor& input : inputs) {
        min.push_back(dimsOf(input.rank, input.min));
        opt.push_back(dimsOf(input.rank, input.opt));
        max.push_back(dimsOf(input.rank, input.max));
    }
    for (size_t i = 0; i < inputs.size() + output_types_.size(); ++i) {
        DynamicPluginTensorDesc tensor{};
        const bool is_input = i < inputs.size();
        const int32_t output = static_cast<int32_t>(i - inputs.size());
        tensor.desc.type = is_input ? static_cast<DataType>(inputs[i].type) : output_types_[output];
        tensor.desc.format = TensorFormat::kLINEAR;
        tensor.min = is_input ? min[i] : outputDims(output, min);
        tensor.opt = is_input ? opt[i] : outputDims(output, opt);
        tensor.max = is_input ? max[i] : outputDims(output, max);
        tensor.desc.dims = tensor.max;
        for (int32_t axis = 0; axis < tensor.max.nbDims; ++axis)
            if (tensor.min.d[axis] != tensor.max.d[axis]) tensor.desc.dims.d[axis] = -1;
        tensors.push_back(tensor);
    }
    return tensors;
}

void Built::tryFormats(IPluginV3OneBuild& plugin, std::vector<DynamicPluginTensorDesc> tensors, int32_t inputs) const {
    const std::vector<DynamicPluginTensorDesc> wanted = tensors;
    const int32_t outputs = static_cast<int32_t>(tensors.size()) - inputs;
    for (DynamicPluginTensorDesc& tensor : tensors) tensor.desc.type = kNoType, tensor.desc.format = kNoFormat;
    const auto accepts = [&](size_t pos, DataType type, TensorFormat format) {
        tensors[pos].desc.type = type;
        tensors[pos].desc.format = format;
        return plugin.supportsFormatCombination(static_cast<int32_t>(pos), tensors.data(), inputs, outputs);
    };
    for (size_t pos = 0; pos < tensors.size(); ++pos) {
        const DataType type = wanted[pos].desc.type;
        const std::string where = " at position " + std::to_string(pos);
        for (const TensorFormat format : {TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32, kNoFormat})
            require(!accepts(pos, type, format), "a format that is not linear was accepted" + where);
        for (const DataType other : {DataType::kBOOL, DataType::kUINT8, DataType::kINT64, kNoType})
            require(other == type || !accepts(pos, other, TensorFormat::kLINEAR),
                    "a wrong data type was accepted" + where);
        require(accepts(pos, type, TensorFormat::kLINEAR), "linear was refused" + where);
    }
}

Engine::Engine(const Library& library, const std::string& key, const PluginFieldCollection& stored)
    : plugin_(library.create(key, stored, TensorRTPhase::kRUNTIME)) {}

PluginPointer Engine::attach() const {
    ResourceContext context;
    auto& runtime = capability<IPluginV3OneRuntime>(*plugin_, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
    PluginPointer attached(runtime.attachToContext(&context));
    const bool is_new = attached != plugin_;
    if (!is_new) attached.release();  // it stays the engine's
    require(attached && is_new, "attachToContext");
    return attached;
}

Running::Running(const Engine& engine) : plugin_(engine.attach()) {
    runtime_ = &capability<IPluginV3OneRuntime>(*plugin_, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
    require(runtime_->setTactic(0) == 0, "setTactic");
    // Copies of a plugin that is in use come and go as TensorRT likes.
    require(PluginPointer(plugin_->clone()) != nullptr, "clone of an attached plugin");
}

void Running::run(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs, void* workspace,
                  void* stream) {
    std::vector<PluginTensorDesc> in, out;
    std::vector<const void*> in_data;
    std::vector<void*> out_data;
    const auto describe = [](const Buffer& buffer) {
        return PluginTensorDesc{dimsOf(buffer.rank, buffer.dims), static_cast<DataType>(buffer.type),
                                TensorFormat::kLINEAR, 1.0f};
    };
    for (const Buffer& buffer : inputs) in.push_back(describe(buffer)), in_data.push_back(buffer.data);
    for (const Buffer& buffer : outputs) out.push_back(describe(buffer)), out_data.push_back(buffer.data);
    require(runtime_->onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                    static_cast<int32_t>(out.size())) == 0,
            "onShapeChange");
    require(runtime_->enqueue(in.data(), out.data(), in_data.data(), out_data.data(), workspace,
                              static_cast<cudaStream_t>(stream)) == 0,
            "enqueue");
}

}  // namespace host
