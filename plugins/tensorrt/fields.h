// The settings of a plugin. One table per plugin drives parsing, checking, serialising and the names of its fields.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <vector>

namespace chunkkv::trt {

constexpr int32_t kMaxFields = 19;
constexpr int32_t kRequired = INT32_MIN;

/// One setting: an INT attribute in [low, high]; or, with `words`, a STRING attribute whose value is the place of the
/// given word in the list; or, with `most`, an INTS attribute of 1 to `most` values in [low, high].
struct Field {
    const char* name;
    int32_t low, high;
    int32_t fallback = kRequired;  // for a node without it, any value for INTS: empty; an engine stores all but those
    const char* const* words = nullptr;
    int32_t most = 0;
};

struct Table {
    const char* plugin;
    const Field* fields;
    int32_t count;
};

/// The values of a table's fields. A copy is a clone.
class FieldValues {
  public:
    explicit FieldValues(const Table& table) noexcept : table_(&table) {}

    /// Take over the values, which may die afterwards. Reports the first that is unknown, given twice, missing, of
    /// another type or length, or out of range, and returns false.
    bool parse(const nvinfer1::PluginFieldCollection* given, nvinfer1::TensorRTPhase phase);

    int32_t operator[](int32_t field) const noexcept { return values_[field]; }
    const std::vector<int32_t>& array(int32_t field) const noexcept { return arrays_[field]; }
    const Table& table() const noexcept { return *table_; }

    /// All fields as parse() takes them; points into this object.
    const nvinfer1::PluginFieldCollection* serialize() noexcept;

  private:
    bool take(const nvinfer1::PluginField& given, uint32_t& seen);
    bool takeWord(const Field& field, const nvinfer1::PluginField& given, int32_t& value) const noexcept;
    bool takeNumber(const Field& field, const void* data, int32_t& value) const noexcept;
    int32_t find(const char* name) const noexcept;

    const Table* table_;
    std::array<int32_t, kMaxFields> values_{};
    std::array<std::vector<int32_t>, kMaxFields> arrays_{};
    std::array<nvinfer1::PluginField, kMaxFields> fields_{};
    nvinfer1::PluginFieldCollection collection_{};
};

/// The names and types of a table's fields, for the parser of ONNX files.
class FieldNames {
  public:
    explicit FieldNames(const Table& table) noexcept;
    const nvinfer1::PluginFieldCollection* collection() const noexcept { return &collection_; }

  private:
    std::array<nvinfer1::PluginField, kMaxFields> fields_{};
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace chunkkv::trt
