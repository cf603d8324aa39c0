// Plays TensorRT's part towards a plugin library: what the registry, the builder, an engine and an execution context
// do with it, in their order and with their poison. Errors are exceptions that name the step.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "expressions.h"

namespace host {

/// A tensor of the network with the range of its profile.
struct Tensor {
    int32_t type;
    int32_t rank;
    int64_t min[Dims::MAX_DIMS], opt[Dims::MAX_DIMS], max[Dims::MAX_DIMS];
};

/// A tensor of one enqueue; `data` is a host or a device address, as the plugin's kernels want it.
struct Buffer {
    int32_t type;
    int32_t rank;
    int64_t dims[Dims::MAX_DIMS];
    void* data;
};

[[noreturn]] inline void refuse(const std::string& what) { throw std::runtime_error(what); }

inline void require(bool condition, const std::string& what) {
    if (!condition) refuse(what);
}

/// What an engine stores of one plugin: names, types and bytes of its own.
class Blob {
  public:
    Blob() = default;
    explicit Blob(const PluginFieldCollection& fields);
    Blob(const Blob& other) : Blob(other.view()) {}
    Blob& operator=(const Blob& other);

    /// Valid until the blob changes or dies.
    PluginFieldCollection view() const { return {static_cast<int32_t>(fields_.size()), fields_.data()}; }

  private:
    std::vector<std::string> names_;
    std::vector<std::unique_ptr<char[]>> bytes_;  // exactly sized, so that a sanitizer sees every read beside them
    std::vector<PluginField> fields_;
};

class Logger : public ILogger {
  public:
    void log(Severity severity, const AsciiChar* message) noexcept override;
    std::string take();

  private:
    std::mutex mutex_;
    std::string lines_;
};

class Finder : public ILoggerFinder {
  public:
    explicit Finder(Logger& logger) : logger_(logger) {}
    virtual ~Finder() = default;
    ILogger* findLogger() override { return &logger_; }

  private:
    Logger& logger_;
};

using PluginPointer = std::unique_ptr<IPluginV3>;

/// A loaded plugin library and its creators by "namespace::name:version".
class Library {
  public:
    explicit Library(const std::string& path);
    IPluginCreatorV3One& creator(const std::string& key) const;
    const std::map<std::string, IPluginCreatorV3One*>& creators() const { return creators_; }
    std::string takeLog() { return logger_.take(); }

    /// createPlugin on fields that die right behind it, as the ONNX parser's do.
    PluginPointer create(const std::string& key, const PluginFieldCollection& fields, TensorRTPhase phase) const;

  private:
    Logger logger_;
    Finder finder_{logger_};
    std::map<std::string, IPluginCreatorV3One*> creators_;
};

/// The build phase of one node. Nothing of the plugin outlives the constructor but the blob.
class Built {
  public:
    Built(const Library& library, const std::string& key, const PluginFieldCollection& fields,
          const std::vector<Tensor>& inputs);

    Dims outputDims(int32_t output, const Sizes& inputs) const;
    const std::vector<DataType>& outputTypes() const { return output_types_; }
    size_t workspace() const { return workspace_; }
    const Blob& blob() const { return blob_; }

  private:
    void askShapes(IPluginV3OneBuild& plugin, const std::vector<Tensor>& inputs);
    void tryFormats(IPluginV3OneBuild& plugin, std::vector<DynamicPluginTensorDesc> tensors, int32_t inputs) const;
    std::vector<DynamicPluginTensorDesc> describe(const std::vector<Tensor>& inputs) const;

    std::vector<DataType> output_types_;
    Expressions expressions_;
    std::vector<DimsExprs> output_shapes_;
    size_t workspace_ = 0;
    Blob blob_;
};

/// A deserialised plugin, made of the engine's bytes alone. It outlives the contexts that are made of it.
class Engine {
  public:
    Engine(const Library& library, const std::string& key, const PluginFieldCollection& stored);

    /// attachToContext; any number of contexts may attach, from several threads.
    PluginPointer attach() const;

  private:
    PluginPointer plugin_;
};

/// One execution context's plugin.
class Running {
  public:
    explicit Running(const Engine& engine);

    /// onShapeChange, then enqueue.
    void run(const std::vector<Buffer>& inputs, const std::vector<Buffer>& outputs, void* workspace, void* stream);

  private:
    PluginPointer plugin_;
    IPluginV3OneRuntime* runtime_;
};

/// Create the plugin from `rounds` damaged copies of a blob; whatever it accepts must serialise to what it accepts
/// again. Returns how many were accepted.
int32_t fuzz(const Library& library, const std::string& key, const PluginFieldCollection& valid, uint32_t seed,
             int32_t rounds);

}  // namespace host
