// What the plugins have in common: TensorRT's IPluginV3, written once over a table of fields and a few plain functions.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string_view>

#include "chunkkv/chunkkv.h"
#include "fields.h"
#include "log.h"

namespace chunkkv::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "chunkkv";
constexpr int32_t kMaxTensors = 13;  // inputs and outputs together
constexpr size_t kAlignment = 256;   // of a workspace and its parts

/// Fields of every plugin that reads packed QKV. Which head sizes have a kernel is for the ops to check.
constexpr Field kNumHeadsField{"num_heads", 1, CHUNKKV_MAX_HEADS};
constexpr Field kNumKvHeadsField{"num_kv_heads", 1, CHUNKKV_MAX_HEADS};
constexpr Field kHeadSizeField{"head_size", 1, 65535};

static_assert(std::string_view(limits::kBoundariesWords[CHUNKKV_BOUNDARIES_FIXED]) == "fixed" &&
                  std::string_view(limits::kBoundariesWords[CHUNKKV_BOUNDARIES_DELIMITER]) == "delimiter" &&
                  std::string_view(limits::kScoreWords[CHUNKKV_SCORE_SOFTMAX]) == "softmax" &&
                  std::string_view(limits::kScoreWords[CHUNKKV_SCORE_LOGITS]) == "logits" &&
                  std::string_view(limits::kScoreWords[CHUNKKV_SCORE_GIVEN]) == "given" &&
                  std::string_view(limits::kWindowReduceWords[CHUNKKV_REDUCE_MAX]) == "max" &&
                  std::string_view(limits::kHeadReduceWords[CHUNKKV_REDUCE_MAX]) == "max" &&
                  std::string_view(limits::kValueNormWords[1]) == "on" &&
                  std::string_view(limits::kHeadsWords[CHUNKKV_HEADS_EACH]) == "each",
              "the index of a word is its code in the C ABI");

constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Device addresses of one enqueue.
struct Buffers {
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    void* stream;
};

/// Run `body`; report an exception and return `failure`, because TensorRT expects functions that do not throw.
template <class Result, class Body>
Result guarded(const char* where, Result failure, Body body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        report("%s: %s", where, error.what());
    } catch (...) {
        report("%s: unknown exception", where);
    }
    return failure;
}

/// A plugin with one format (linear) and one tactic. Its state is its field values and what attach() allocates. Every
/// execution context has an object of its own, and objects share nothing. A function of a derived class that finds a
/// mistake reports it and returns false.
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit Plugin(const Table& table) noexcept : values_(table) {}

    bool parse(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return values_.table().plugin; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nb_inputs, const DynamicPluginTensorDesc* out,
                            int32_t nb_outputs) noexcept override;
    int32_t getOutputDataTypes(DataType* output_types, int32_t nb_outputs, const DataType* input_types,
                               int32_t nb_inputs) const noexcept override;
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t nb_inputs, const DimsExprs* shape_inputs,
                            int32_t nb_shape_inputs, DimsExprs* outputs, int32_t nb_outputs,
                            IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t nb_inputs,
                                   int32_t nb_outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return outputs(); }
    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nb_inputs, const DynamicPluginTensorDesc* out,
                            int32_t nb_outputs) const noexcept override;

    int32_t onShapeChange(const PluginTensorDesc* in, int32_t nb_inputs, const PluginTensorDesc* out,
                          int32_t nb_outputs) noexcept override;
    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return values_.serialize(); }

  protected:
    int32_t value(int32_t field) const noexcept { return values_[field]; }
    const std::vector<int32_t>& array(int32_t field) const noexcept { return values_.array(field); }
    bool fail(const char* what) const noexcept { return report("%s: %s", getPluginName(), what); }
    bool done(chunkkv_status status) const noexcept { return status == CHUNKKV_OK || fail(chunkkv_last_error()); }

    /// Check the shape of a tensor; -1 stands for any size.
    bool hasShape(const char* name, const PluginTensorDesc& tensor, std::initializer_list<int64_t> sizes) const;

  private:
    virtual Plugin* copy() const = 0;
    virtual int32_t inputs() const noexcept = 0;
    virtual int32_t outputs() const noexcept = 0;
    /// Conditions between fields.
    virtual bool checkFields() const = 0;
    /// Whether input `index` may have types[index]. The types of earlier inputs are known; later ones are not set.
    virtual bool isInputType(int32_t index, const DataType* types) const = 0;
    virtual DataType outputType(int32_t index, const DataType* input_types) const = 0;
    virtual int32_t rank(int32_t input) const noexcept = 0;
    virtual bool shapeExpressions(const DimsExprs* in, DimsExprs* out, IExprBuilder& builder) const = 0;
    /// The dims of the outputs for inputs that check() has accepted.
    virtual void outputDims(const PluginTensorDesc* in, Dims* out) const = 0;
    virtual bool check(const PluginTensorDesc* in) const = 0;
    /// Bytes that suffice for all sizes within the profile. The bounds of two tensors may contradict each other,
    /// because TensorRT computes them for each tensor alone.
    virtual size_t workspaceBytes(const DynamicPluginTensorDesc* in) const = 0;
    /// Allocate what an execution context needs besides the field values; the destructor frees it.
    virtual bool attach() { return true; }
    /// Enqueue the work. Field values, types and shapes have been checked.
    virtual bool run(const PluginTensorDesc* in, const PluginTensorDesc* out, const Buffers& buffers) const = 0;

    bool hasCounts(int32_t nb_inputs, int32_t nb_outputs) const noexcept;
    /// Shape is Dims or DimsExprs.
    template <class Shape>
    bool hasRank(int32_t input, const Shape& shape) const noexcept {
        if (shape.nbDims == rank(input)) return true;
        return report("%s: input %d has %d dimensions; it must have %d", getPluginName(), input, shape.nbDims,
                      rank(input));
    }
    bool hasTypes(const PluginTensorDesc* in, const PluginTensorDesc* out) const;
    bool hasOutputDims(const PluginTensorDesc* in, const PluginTensorDesc* out) const;

    FieldValues values_;
};

/// float32, float16 or bfloat16.
bool isFloating(DataType type) noexcept;
/// CHUNKKV_FLOAT32 and the like, or -1.
int32_t storageType(DataType type) noexcept;
/// Bytes of one element of a storageType.
int64_t elementBytes(DataType type) noexcept;

template <class Derived>
class Creator : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded("createPlugin", static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
            Derived* plugin = new Derived();
            if (plugin->parse(fields, phase)) return plugin;
            delete plugin;
            return nullptr;
        });
    }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return names_.collection(); }
    const char* getPluginName() const noexcept override { return Derived::table().plugin; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const FieldNames names_{Derived::table()};
};

nvinfer1::IPluginCreatorInterface* selectCreator();
nvinfer1::IPluginCreatorInterface* compactCreator();
nvinfer1::IPluginCreatorInterface* prepareCreator();
nvinfer1::IPluginCreatorInterface* ropeCreator();
nvinfer1::IPluginCreatorInterface* scoreCreator();
nvinfer1::IPluginCreatorInterface* compressCreator();

/// N(length) of the ChunkKVPrepare node that this thread enqueued last; -1 before the first, and for a wrong length.
int64_t lastKeptTokens(int64_t length) noexcept;

}  // namespace chunkkv::trt
